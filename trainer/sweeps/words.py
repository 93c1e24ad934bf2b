"""The words of a sweep on the command line, told apart from those of its runs and held against their types."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import yaml

from trainer.config.sweep import SweepConfig
from trainer.errors import ConfigError, Problem
from trainer.schema import field_hints, fit, section_help, shape, unknown_key

SECTION = "sweep"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepWords:
    """``name``: the sweep file that was asked for ("" if none); ``overrides``: what is left for the runs."""

    name: str
    config: SweepConfig
    overrides: tuple[str, ...]


def read_words(words: Sequence[str]) -> SweepWords:
    """Sort ``sweep=NAME`` and ``sweep.KEY=VALUE`` out of ``words``.

    Raises:
        ConfigError: with every unknown key and wrong value.
    """
    found: list[Problem] = []
    hints, given, name, overrides = field_hints(SweepConfig), dict[str, Any](), "", list[str]()
    for word in words:
        path, _, value = word.lstrip("+").partition("=")
        section, _, key = path.partition(".")
        if section != SECTION or word.startswith("~"):
            overrides.append(word)
        elif not key:
            name = value
        elif key not in hints:
            found.append(unknown_key(f"command line: {path}", key, list(hints)))
        else:
            given[key] = value if shape(hints[key]).core is str and value != "null" else _read(value)
    fitted = fit(given, SweepConfig, SECTION, lambda where: f"command line: {where}", found)
    if found:
        raise ConfigError.of(found)
    return SweepWords(name=name, config=msgspec.convert(fitted, SweepConfig), overrides=tuple(overrides))


def _read(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def words_help() -> str:
    """The keys with type, default and meaning, for ``--help``."""
    return "\n".join(["", *section_help(SECTION, SweepConfig)]) + "\n"
