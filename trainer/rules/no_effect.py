"""The problem that most rules report: a field was set that has no effect beside another one."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from trainer.errors import Problem


def changed(section: Any, names: tuple[str, ...]) -> list[str]:
    """Return those of ``names`` that differ from the default of their dataclass."""
    given, defaults = asdict(section), asdict(type(section)())
    return [name for name in names if given[name] != defaults[name]]


def no_effect(section: str, values: Any, names: tuple[str, ...], because: str, do: str) -> Iterator[Problem]:
    """Yield a problem for each of ``names`` that was set although it has no effect."""
    given, defaults = asdict(values), asdict(type(values)())
    for name in changed(values, names):
        yield Problem(
            what=f"has no effect with {because}",
            where=f"{section}.{name}",
            got=_shown(given[name]),
            allowed=f"its default, {_shown(defaults[name])}",
            do=do,
        )


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
