"""``conf/`` and the command line become a ``Config``, or one error that lists everything wrong with them.

The only module that knows Hydra and OmegaConf. Hydra composes the groups; values are laid over the defaults of the
dataclasses in ``config.py`` and held against their types by ``schema.py``. Hydra itself stops at the first problem
and names neither file nor nearest key; a job that waited in a queue should not fail five times for five typing errors.
Nothing is ever instantiated: ``_target_`` is an unknown key like any other, and YAML tags are refused.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import msgspec
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import Config
from trainer.errors import ConfigError, Problem, nearest
from trainer.paths import conf_directories
from trainer.redaction import REDACTED, is_secret_name, looks_secret, redact
from trainer.schema import describe, field_docs, field_hints, fit, hint_at, shape

_SECTIONS = tuple(entry.name for entry in fields(Config))
_PACKAGE_LINE = re.compile(r"^#\s*@package\s+(\S+)\s*$", re.MULTILINE)
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\b|\$\{\s*env:")


@dataclass(frozen=True, slots=True)
class Library:
    """All config files: ``groups[group][choice]`` is the file that a choice means; earlier directories win."""

    directories: tuple[Path, ...]
    groups: dict[str, dict[str, Path]]

    @classmethod
    def open(cls, config_dir: Path | None, cwd: Path) -> "Library":
        """List the files of ``--config-dir``, ``./conf`` and the shipped conf.

        Raises:
            ConfigError: ``config_dir`` is given and is not a folder.
        """
        if config_dir is not None and not config_dir.is_dir():
            raise ConfigError(
                "there is no such config folder",
                where="--config-dir",
                got=config_dir,
                allowed="a folder with config groups (experiment/, model/, ...)",
                do="check the path",
            )
        directories = tuple(conf_directories(config_dir, cwd))
        groups: dict[str, dict[str, Path]] = {}
        for group in (*_SECTIONS, "experiment"):
            choices: dict[str, Path] = {}
            for folder in (directory / group for directory in directories):
                for file in sorted(folder.rglob("*.yaml")):
                    choices.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
            if choices:
                groups[group] = dict(sorted(choices.items()))
        return cls(directories, groups)

    @property
    def primary(self) -> Path:
        """``config.yaml``, the first one found."""
        return next(path for path in (folder / "config.yaml" for folder in self.directories) if path.is_file())


@dataclass(slots=True)
class Request:
    """The command line, taken apart. ``experiments`` and ``choices`` are known names; ``values`` are known keys."""

    experiments: list[str] = field(default_factory=list[str])
    choices: dict[str, str | None] = field(default_factory=dict[str, str | None])
    values: list[Override] = field(default_factory=list[Override])


@dataclass(frozen=True, slots=True)
class Layer:
    """What one file says, placed where its package puts it; ``name`` is how messages call the file."""

    name: str
    body: dict[str, Any]
    defaults: list[Any]


def compose(overrides: Sequence[str], *, config_dir: Path | None, cwd: Path) -> Config:
    """Return the config that the groups, the experiment and ``overrides`` make together.

    Overrides are Hydra's: ``group=choice``, ``key=value``, ``+key=value``, ``++key=value``, ``~key`` (back to the
    default), and ``experiment=NAME`` with or without ``+``. A key that ``config.py`` does not know is an error with
    any of these signs.

    Raises:
        ConfigError: with all problems of names, choices, files, types and ranges.
    """
    library = Library.open(config_dir, cwd)
    found: list[Problem] = []
    request = _read_command_line(overrides, library, found)
    layers = _layers(request, library, cwd, found)
    tree = _base(request, library, layers, found)
    _apply_values(tree, request.values, found)
    locate = _locator(request.values, layers)
    plain = _resolve(tree, "", locate, found)
    fitted = fit(plain, Config, "", locate, found)
    _refuse_secrets(plain, "", locate, found)
    if found:
        raise ConfigError.of([_without_secrets(problem) for problem in dict.fromkeys(found)])
    return msgspec.convert(fitted, Config)


# ---- the command line


def _read_command_line(overrides: Sequence[str], library: Library, found: list[Problem]) -> Request:
    """Sort overrides into experiment, choices and values; what is wrong with one goes to ``found`` and is left out."""
    request = Request()
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            found.append(_unreadable(text, library))
            continue
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


def _unreadable(text: str, library: Library) -> Problem:
    """Explain an override that Hydra's grammar cannot read."""
    key, equals, value = text.partition("=")
    experiments = list(library.groups.get("experiment", {}))
    if equals:
        quoted = value.replace("'", "\\'")
        do = f"quote the value, for the shell too: \"{key}='{quoted}'\""
    elif text in experiments:
        do = f"write experiment={text}"
    else:
        do = nearest(text, experiments) or "see python -m trainer --help"
    return Problem(what="cannot read this override", where="command line", got=text, allowed="key=value", do=do)


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
    names = value if isinstance(value, list) and group == "experiment" else [value]
    if override.is_delete() or value is None:
        request.experiments = [] if group == "experiment" else request.experiments
        request.choices |= {} if group == "experiment" else {group: None}
        return
    for name in cast("list[Any]", names):
        if not isinstance(name, str) or name not in library.groups[group]:
            found.append(_unknown_choice(f"command line: {group}", group, name, library))
        elif group == "experiment":
            request.experiments.append(name)
        else:
            request.choices[group] = name


def _unknown_choice(where: str, group: str, name: object, library: Library) -> Problem:
    choices = list(library.groups.get(group, {}))
    what = "unknown experiment" if group == "experiment" else f"unknown choice of the group '{group}'"
    folders = ", ".join(str(directory) for directory in library.directories)
    do = nearest(str(name), choices) or f"choose one of these, or add {group}/{name}.yaml to one of: {folders}"
    return Problem(what=what, where=where, got=str(name), allowed=", ".join(choices), do=do)


def _with_group_hint(problem: Problem, key: str, library: Library) -> Problem:
    """Head a problem of a key with where it stands; a bare unknown word may have been meant as a group."""
    top = list(dict.fromkeys([*_SECTIONS, "experiment"]))
    allowed, do = problem.allowed, problem.do
    if "." not in key:
        allowed, do = ", ".join(top), nearest(key, top) or _elsewhere(key) or problem.do
    elif problem.do == "remove it":
        do = _elsewhere(key.rpartition(".")[2]) or problem.do
    return Problem(what=problem.what, where=f"command line: {key}", got=problem.got, allowed=allowed, do=do)


def _elsewhere(name: str) -> str:
    """Return ``did you mean 'optim.lr'?`` when some section has a field of this name."""
    paths = [
        f"{section}.{name}" for section, hint in field_hints(Config).items() if name in field_hints(shape(hint).core)
    ]
    return f"did you mean '{paths[0]}'?" if paths else ""


# ---- the files


def _layers(request: Request, library: Library, cwd: Path, found: list[Problem]) -> list[Layer]:
    """Return every file that takes part, lowest first: config.yaml, groups, experiments with what they build on."""
    seen: dict[Path, Layer] = {}
    primary = _read_layer(library.primary, "", cwd, seen, found)
    choices: dict[str, str] = {}
    experiments: list[Layer] = []
    for entry in primary.defaults:
        choices |= _group_choice(entry)
    for name in request.experiments:
        experiments += _experiment_layers(name, library, cwd, seen, found)
    for layer in experiments:
        for entry in layer.defaults:
            choices |= _checked_choice(entry, layer, library, found)
    choices |= {group: name for group, name in request.choices.items() if name is not None}
    chosen = [
        _read_layer(library.groups[group][name], group, cwd, seen, found)
        for group, name in choices.items()
        if request.choices.get(group, name) is not None and name in library.groups.get(group, {})
    ]
    return [primary, *chosen, *experiments]


def _experiment_layers(
    name: str, library: Library, cwd: Path, seen: dict[Path, Layer], found: list[Problem]
) -> list[Layer]:
    """Return the experiment ``name`` after the experiments that its defaults list names."""
    path = library.groups["experiment"][name]
    if path in seen:
        return []
    layer = _read_layer(path, "experiment", cwd, seen, found)
    below: list[Layer] = []
    for entry in layer.defaults:
        if not isinstance(entry, str) or entry == "_self_":
            continue
        parent = entry.removeprefix("/experiment/")
        if parent in library.groups["experiment"]:
            below += _experiment_layers(parent, library, cwd, seen, found)
        else:
            found.append(_unknown_choice(f"{layer.name}: defaults", "experiment", parent, library))
    return [*below, layer]


def _group_choice(entry: object) -> dict[str, str]:
    """Return ``{group: choice}`` of one entry of a defaults list, or nothing for ``_self_`` and plain names."""
    if not isinstance(entry, dict):
        return {}
    return {
        str(key).removeprefix("override ").removeprefix("optional ").strip().removeprefix("/"): str(choice)
        for key, choice in cast("dict[Any, Any]", entry).items()
        if choice is not None
    }


def _checked_choice(entry: object, layer: Layer, library: Library, found: list[Problem]) -> dict[str, str]:
    """Return what ``_group_choice`` does, without groups and choices that do not exist: those go to ``found``."""
    checked: dict[str, str] = {}
    for group, choice in _group_choice(entry).items():
        where = f"{layer.name}: defaults"
        if group not in library.groups:
            do = nearest(group, list(library.groups)) or "remove it"
            found.append(
                Problem(what="unknown group", where=where, got=group, allowed=", ".join(library.groups), do=do)
            )
        elif choice not in library.groups[group]:
            found.append(_unknown_choice(where, group, choice, library))
        else:
            checked[group] = choice
    return checked


def _read_layer(path: Path, group: str, cwd: Path, seen: dict[Path, Layer], found: list[Problem]) -> Layer:
    """Read one YAML file; one that cannot be read goes to ``found`` and counts as empty."""
    name = path.relative_to(cwd).as_posix() if path.is_relative_to(cwd) else str(path)
    body: dict[str, Any] = {}
    package = group
    try:
        text = path.read_text(encoding="utf-8")
        header = _PACKAGE_LINE.search(text.partition("defaults:")[0])
        package = header[1].replace("_global_", "").replace("_group_", group) if header else group
        loaded = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
        if isinstance(loaded, dict):
            body = cast("dict[str, Any]", loaded)
        else:
            found.append(Problem(what="not a mapping of keys", where=name, allowed="key: value", do="mend the file"))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        problem = " ".join(str(error).split())
        found.append(Problem(what="not a readable YAML file", where=name, got=problem, do="mend the file"))
    defaults = body.pop("defaults", None) or []
    for key in reversed([part for part in package.split(".") if part]):
        body = {key: body}
    seen[path] = Layer(name, body, cast("list[Any]", defaults))
    return seen[path]


# ---- composition


def _base(request: Request, library: Library, layers: list[Layer], found: list[Problem]) -> DictConfig:
    """Return defaults, groups and experiments laid over each other.

    When some file or choice is already known to be wrong, Hydra would stop; then the files are merged in the order
    that it would use, so that their other problems are found as well.
    """
    defaults = OmegaConf.create(cast("dict[str, Any]", msgspec.to_builtins(Config())))
    if request.experiments:
        defaults.run.name = request.experiments[-1].rpartition("/")[2]
    composed: list[Any] = [layer.body for layer in layers]
    if not found:
        try:
            composed = [_with_hydra(request, library, layers[0])]
        except (HydraException, OmegaConfBaseException) as error:
            found.append(
                Problem(
                    what="the files cannot be composed",
                    where=", ".join(layer.name for layer in layers if layer.defaults),
                    got=" ".join(str(error).split()),
                    do="check the defaults lists of these files",
                )
            )
    return cast(DictConfig, OmegaConf.merge(defaults, *composed))


def _with_hydra(request: Request, library: Library, primary: Layer) -> DictConfig:
    """Let Hydra compose the groups; values are applied afterwards."""
    known: dict[str, str] = {}
    for entry in primary.defaults:
        known |= _group_choice(entry)
    overrides = [
        f"~{group}" if name is None else f"{'' if group in known else '+'}{group}={name}"
        for group, name in request.choices.items()
        if name is not None or group in known
    ]
    if request.experiments:
        overrides.append(f"+experiment=[{','.join(request.experiments)}]")
    first, *others = (str(directory) for directory in library.directories)
    paths = ",".join("'file://" + path.replace("'", "\\'") + "'" for path in others)
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=first, version_base="1.3", job_name="trainer"):
        return hydra_compose("config", [*overrides, f"hydra.searchpath=[{paths}]"])


def _apply_values(tree: DictConfig, values: Sequence[Override], found: list[Problem]) -> None:
    """Lay ``key=value`` over the composed tree, in order; ``~key`` brings the default back."""
    OmegaConf.set_struct(tree, False)
    for override in values:
        key = override.key_or_group
        if override.is_delete():
            _delete(tree, override, found)
            continue
        try:
            OmegaConf.update(tree, key, _value_for(override), merge=True, force_add=True)
        except (OmegaConfBaseException, IndexError) as error:
            got = " ".join(str(error).split())
            found.append(Problem(what="cannot be set", where=f"command line: {key}", got=got, do="check the key"))


def _delete(tree: DictConfig, override: Override, found: list[Problem]) -> None:
    """Bring back the default of a key (``~key``), or only if it has a value (``~key=value``)."""
    key = override.key_or_group
    expected = override.value()
    current: object = OmegaConf.select(tree, key)
    if expected is not None and current != expected:
        what = "is not removed, because it has another value"
        found.append(
            Problem(what=what, where=f"command line: ~{key}", got=str(current), allowed=str(expected), do=f"~{key}")
        )
        return
    defaults = OmegaConf.create(cast("dict[str, Any]", msgspec.to_builtins(Config())))
    above, _, last = key.rpartition(".")
    node = OmegaConf.select(tree, above) if above else tree
    if OmegaConf.select(defaults, key) is not None:
        OmegaConf.update(tree, key, OmegaConf.select(defaults, key), merge=False)
    elif isinstance(node, DictConfig):
        node.pop(last, None)


def _value_for(override: Override) -> Any:
    """Return the value as Hydra reads it, except that a key for text keeps what was typed (``revision=007``)."""
    value = cast(Any, override.value())
    core = shape(hint_at(Config, override.key_or_group.split("."))).core
    if isinstance(value, bool | int | float) and core in (str, list[str]):
        return (override.input_line or "").partition("=")[2].strip()
    return value


def _locator(values: Sequence[Override], layers: Sequence[Layer]) -> Any:
    """Return a function that heads a problem with the last place that set its key."""
    keys = [override.key_or_group for override in values]

    def locate(path: str) -> str:
        parts = [part for part in re.split(r"[.\[\]]+", path) if part]
        if any(parts[: len(key.split("."))] == key.split(".") for key in keys):
            return f"command line: {path}"
        for layer in reversed(layers):
            if _says(layer.body, parts):
                return f"{layer.name}: {path}"
        return path

    return locate


def _says(body: Any, parts: Sequence[str]) -> bool:
    """Say whether a file's content has something at this path."""
    for part in parts:
        if isinstance(body, dict) and part in body:
            body = cast("dict[str, Any]", body)[part]
        elif isinstance(body, list) and part.isdecimal() and int(part) < len(cast("list[Any]", body)):
            body = cast("list[Any]", body)[int(part)]
        else:
            return False
    return bool(parts)


def _resolve(node: Any, path: str, locate: Any, found: list[Problem]) -> Any:
    """Return plain dicts and lists with all interpolations replaced; those that cannot be go to ``found``."""
    if not isinstance(node, DictConfig | ListConfig):
        return node
    keys: list[Any] = list(range(len(node))) if isinstance(node, ListConfig) else list(node)
    plain: dict[Any, Any] = {}
    for key in keys:
        below = f"{path}[{key}]" if isinstance(node, ListConfig) else f"{path}.{key}" if path else str(key)
        problem, value = _read_node(node, key, locate(below))
        if problem is not None:
            found.append(problem)
        else:
            plain[key] = _resolve(value, below, locate, found)
    return list(plain.values()) if isinstance(node, ListConfig) else plain


def _read_node(node: DictConfig | ListConfig, key: Any, where: str) -> tuple[Problem | None, Any]:
    """Return the value below ``key``, or the problem with it."""
    raw = str(OmegaConf.to_container(node, resolve=False)[key])  # type: ignore[index]
    if OmegaConf.is_missing(node, key):
        return Problem(what="must be given", where=where, got="???", do="give it a value"), None
    if _ENVIRONMENT.search(raw) and OmegaConf.is_interpolation(node, key):
        do = "give the value on the command line, where the shell fills in variables"
        return Problem(what="the environment is not read", where=where, got=raw, allowed="${section.key}", do=do), None
    try:
        return None, node[key]
    except OmegaConfBaseException as error:
        got = f"{raw}: {' '.join(str(error).split())}"
        allowed = "${section.key} of a key that exists"
        return Problem(what="cannot be filled in", where=where, got=got, allowed=allowed, do="check the name"), None


def _refuse_secrets(value: Any, path: str, locate: Any, found: list[Problem]) -> None:
    """Append a problem for every text in the config that looks like a secret."""
    if isinstance(value, dict):
        for key, entry in cast("dict[Any, Any]", value).items():
            _refuse_secrets(entry, f"{path}.{key}" if path else str(key), locate, found)
    elif isinstance(value, list):
        for index, entry in enumerate(cast("list[Any]", value)):
            _refuse_secrets(entry, f"{path}[{index}]", locate, found)
    elif isinstance(value, str) and (looks_secret(value) or is_secret_name(path.rpartition(".")[2])):
        do = "remove it here, change it where it was issued, and set it as an environment variable (HF_TOKEN, ...)"
        found.append(
            Problem(
                what="looks like a secret",
                where=locate(path),
                got=REDACTED,
                allowed="no secrets: config is written into run folders",
                do=do,
            )
        )


def _without_secrets(problem: Problem) -> Problem:
    """Return the problem with secrets removed from all its parts."""
    return Problem(
        what=redact(problem.what),
        where=redact(problem.where),
        got=redact(problem.got),
        allowed=redact(problem.allowed),
        do=redact(problem.do),
    )


# ---- several runs, and text for people


def expand_multirun(overrides: Sequence[str], *, config_dir: Path | None, cwd: Path) -> list[list[str]]:
    """Return one list of overrides per run for ``-m a=1,2 b=3,4``; the last key varies fastest.

    ``group=glob(*)`` means all matching choices of a group.

    Raises:
        ConfigError: an override cannot be read, or asks for a sweep without fixed values (``interval(0,1)``).
    """
    library = Library.open(config_dir, cwd)
    parser = OverridesParser.create()
    found: list[Problem] = []
    columns: list[list[str]] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            found.append(_unreadable(text, library))
            continue
        if override.is_interval_sweep():
            allowed, do = "a list of values: a=1,2, range(1,4), choice(a,b)", "name the values"
            found.append(Problem(what="has no fixed values", where=f"command line: {text}", allowed=allowed, do=do))
        else:
            columns.append(list(_variants(override, text, library)))
    if found:
        raise ConfigError.of([_without_secrets(problem) for problem in found])
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


def config_text(config: Config) -> str:
    """Return the whole config as YAML, sections in the order of ``config.py``."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, allow_unicode=True, width=120)


def help_text(*, config_dir: Path | None, cwd: Path) -> str:
    """Return the groups with their choices, the experiments, and every key with type, default and meaning."""
    library = Library.open(config_dir, cwd)
    lines = ["Groups (group=choice):"]
    lines += [
        f"  {group:10} {', '.join(choices)}" for group, choices in library.groups.items() if group != "experiment"
    ]
    lines += ["", "Experiments (+experiment=NAME):"]
    lines += [f"  {name:20} {_first_comment(path)}" for name, path in library.groups.get("experiment", {}).items()]
    lines += ["", "Searched: " + ", ".join(str(directory) for directory in library.directories), ""]
    lines.append("Keys (key=value):")
    defaults = cast("dict[str, dict[str, Any]]", msgspec.to_builtins(Config()))
    for section, hint in field_hints(Config).items():
        kind = shape(hint).core
        docs = field_docs(kind)
        lines += ["", f"{section}: {' '.join((kind.__doc__ or '').split())}"]
        for name, entry in field_hints(kind).items():
            default = msgspec.json.encode(defaults[section][name]).decode()
            lines.append(f"  {section}.{name}={default}  ({describe(entry)})")
            lines.append(f"      {docs[name]}")
    return "\n".join(lines) + "\n"


def _first_comment(path: Path) -> str:
    """Return the first comment line of a YAML file that says something to people."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not _PACKAGE_LINE.match(line):
            return line.lstrip("# ").strip()
    return ""
