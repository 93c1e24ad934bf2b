"""The command line, taken apart with Hydra's own parser: experiments, choices of groups, values of keys.

Also what ``-m`` makes of it. Everything that cannot be meant is collected, so that a user sees all of it at once.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from trainer.compose.library import SECTIONS, SEVERAL, Choice, Library, unknown_choice
from trainer.config import Config
from trainer.errors import Problem, nearest
from trainer.schema import OTHER_NAMES, field_hints, hint_at, shape


@dataclass(slots=True)
class Request:
    """The command line, taken apart. ``experiments`` and ``choices`` are known names; ``values`` are known keys."""

    experiments: list[str] = field(default_factory=list[str])
    choices: dict[str, Choice | None] = field(default_factory=dict[str, Choice | None])
    values: list[Override] = field(default_factory=list[Override])


def read_command_line(overrides: Sequence[str], library: Library, found: list[Problem]) -> Request:
    """Sort overrides into experiment, choices and values; what is wrong with one goes to ``found`` and is left out."""
    request = Request()
    for text, override in _parsed(overrides, library, found):
        key = override.key_or_group
        problem = _refused(override, text)
        if problem is not None:
            found.append(problem)
        elif key in library.groups:
            _read_choice(override, library, request, found)
        elif isinstance(hint := hint_at(Config, key.split(".")), Problem):
            found.append(_with_group_hint(hint, key, library))
        else:
            request.values.append(override)
    return request


def _parsed(overrides: Sequence[str], library: Library, found: list[Problem]) -> Iterator[tuple[str, Override]]:
    """Yield every override as typed and as read; the problem of one that cannot be read goes to ``found``."""
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            found.append(_unreadable(text, library))
        else:
            yield text, override


def _unreadable(text: str, library: Library) -> Problem:
    """Explain an override that Hydra's grammar cannot read."""
    key, equals, value = text.partition("=")
    experiments = list(library.groups.get("experiment", {}))
    if equals:
        do = f'quote the value, for the shell too: "{key}={quoted(value)}"'
    elif text in experiments:
        do = f"write experiment={text}"
    else:
        do = nearest(text, experiments) or "see python -m trainer --help"
    return Problem(what="cannot read this override", where="command line", got=text, allowed="key=value", do=do)


def quoted(text: str) -> str:
    """``text`` in quotes, as Hydra's grammar takes any text."""
    return "'" + text.replace("'", "\\'") + "'"


def _refused(override: Override, text: str) -> Problem | None:
    """Return the problem of an override that Hydra would read but that has no meaning here."""
    key = override.key_or_group
    if key.partition(".")[0].partition("/")[0] == "hydra":
        return Problem(
            what="Hydra's own settings have no effect here",
            where=f"command line: {key}",
            got=text,
            allowed="groups and keys of this project",
            do="set the run folder with run.dir or run.root",
        )
    if override.package is not None:
        return Problem(
            what="a group cannot be put into another place",
            where=f"command line: {key}",
            got=text,
            allowed="group=choice",
            do=f"remove '@{override.package}'",
        )
    if override.is_sweep_override():
        value = text.partition("=")[2]
        return Problem(
            what="several values for one run",
            where=f"command line: {key}",
            got=value,
            allowed="one value",
            do=f"a list is {key}=[{value}]; several runs are started with -m {text}",
        )
    return None


def _read_choice(override: Override, library: Library, request: Request, found: list[Problem]) -> None:
    """Record ``group=choice`` or ``~group`` when the choice exists."""
    group = override.key_or_group
    value = cast(Any, override.value())
    several = isinstance(value, list) and group in ("experiment", *SEVERAL)
    names = cast("list[Any]", value) if several else [value]
    if override.is_delete() or value is None:
        request.experiments = [] if group == "experiment" else request.experiments
        request.choices |= {} if group == "experiment" else {group: None}
        return
    known = [name for name in names if isinstance(name, str) and name in library.groups[group]]
    found += [unknown_choice(f"command line: {group}", group, name, library) for name in names if name not in known]
    if group == "experiment":
        request.experiments = list(dict.fromkeys([*request.experiments, *known]))
    elif several:
        request.choices[group] = known
    elif known:
        request.choices[group] = known[0]


def _with_group_hint(problem: Problem, key: str, library: Library) -> Problem:
    """Head a problem of a key with where it stands; a bare unknown word may have been meant as a group."""
    top = list(dict.fromkeys([*SECTIONS, "experiment"]))
    allowed, do = problem.allowed, problem.do
    if "." not in key:
        allowed, do = ", ".join(top), _elsewhere(key) or nearest(key, top) or problem.do
    elif problem.do == "remove it":
        do = _elsewhere(key.rpartition(".")[2]) or problem.do
    return Problem(what=problem.what, where=f"command line: {key}", got=problem.got, allowed=allowed, do=do)


def _elsewhere(name: str) -> str:
    """Return ``did you mean 'optim.lr'?`` when a section has a field of this name, or another tool calls it so."""
    if name in OTHER_NAMES:
        return f"did you mean '{OTHER_NAMES[name]}'?"
    paths = [
        f"{section}.{name}" for section, hint in field_hints(Config).items() if name in field_hints(shape(hint).core)
    ]
    return f"did you mean '{paths[0]}'?" if paths else ""


def multirun(overrides: Sequence[str], library: Library, found: list[Problem]) -> list[list[str]]:
    """Return one list of overrides per run of ``a=1,2 b=3,4``; the last key varies fastest."""
    columns: list[list[str]] = []
    for text, override in _parsed(overrides, library, found):
        if override.is_interval_sweep():
            allowed, do = "a list of values: a=1,2, range(1,4), choice(a,b)", "name the values"
            found.append(Problem(what="has no fixed values", where="command line", got=text, allowed=allowed, do=do))
        else:
            columns.append(list(_variants(override, text, library)))
    return [list(row) for row in itertools.product(*columns)]


def _variants(override: Override, text: str, library: Library) -> Iterator[str]:
    """Yield the single-valued overrides that one override stands for."""
    if not override.is_sweep_override():
        yield text
        return
    key = text.partition("=")[0]
    value = override.value()
    if isinstance(value, Glob):
        names = value.filter(list(library.groups.get(override.key_or_group, {})))
        yield from (f"{key}={name}" for name in names)
    else:
        yield from (f"{key}={variant}" for variant in override.sweep_string_iterator())
