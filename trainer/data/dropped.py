"""Counts rows that are left out, by reason, so that no stage can lose one in silence."""

from trainer.samples import Dropped

SHOWN = 5
"""Rows listed per reason."""


class Leftovers:
    """Collects left-out rows; ``report`` gives them by reason, the most frequent first."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return sum(self._count.values())

    def add(self, reason: str, row: str, detail: str = "") -> None:
        """Leave out ``row`` (``file:line``) for ``reason``; ``detail`` is shown with the row."""
        self._count[reason] = self._count.get(reason, 0) + 1
        first = self._first.setdefault(reason, [])
        if len(first) < SHOWN:
            first.append(f"{row} ({detail})" if detail else row)

    def report(self) -> list[Dropped]:
        """Return one entry per reason."""
        order = sorted(self._count, key=lambda reason: (-self._count[reason], reason))
        return [Dropped(reason=reason, count=self._count[reason], first=self._first[reason]) for reason in order]


def merge(*reports: list[Dropped]) -> list[Dropped]:
    """Add reports of several stages or splits up, reason by reason."""
    counts: dict[str, int] = {}
    first: dict[str, list[str]] = {}
    for item in (item for report in reports for item in report):
        counts[item.reason] = counts.get(item.reason, 0) + item.count
        first[item.reason] = (first.get(item.reason, []) + item.first)[:SHOWN]
    order = sorted(counts, key=lambda reason: (-counts[reason], reason))
    return [Dropped(reason=reason, count=counts[reason], first=first[reason]) for reason in order]
