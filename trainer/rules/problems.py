"""Two problems that many rules report: a field without effect, and a name that is not among the known ones."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from trainer.errors import Problem, nearest


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


def not_among(what: str, *, where: str, got: str, allowed: Sequence[str], otherwise: str) -> Problem:
    """Return the problem of ``got``, which is not in ``allowed``; ``otherwise`` is the advice when none is near."""
    do = nearest(got, allowed) or otherwise
    return Problem(what=what, where=where, got=got, allowed=", ".join(allowed), do=do)
