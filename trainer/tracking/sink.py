"""What every tracker can do, whatever it is: the four calls with which ``send.py`` feeds it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trainer.tracking.texts import Table, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is told once, at the end: ``code`` is the run's exit code; tables and weights only where asked for."""

    code: int
    summary: Mapping[str, float]
    lineage: Mapping[str, Any]
    tables: Sequence[Table] = ()
    weights: Weights | None = None
    sent: Mapping[str, str] = field(default_factory=dict[str, str])

    def fresh_tables(self) -> list[Table]:
        """The tables that were not sent as they are."""
        return [table for table in self.tables if self.sent.get(f"text/{table.name}") != table.digest]

    def fresh_weights(self) -> Weights | None:
        """The weights, if they were not sent as they are."""
        return None if self.weights is None or self.sent.get("weights") == self.weights.digest else self.weights

    def digests(self) -> dict[str, str]:
        """What ``sent`` is once all this has arrived."""
        found = dict(self.sent) | {f"text/{table.name}": table.digest for table in self.tables}
        return found if self.weights is None else found | {"weights": self.weights.digest}


class Sink(Protocol):
    """One run at one tracker."""

    @property
    def url(self) -> str:
        """Where a person looks at it; known after ``open``."""
        ...

    def open(self) -> int:
        """Begin, or go on; gives the last step that the tracker has, 0: none."""
        ...

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Add the figures of a step."""
        ...

    def finish(self, facts: Facts) -> None:
        """Tell the facts and end; returns when everything was sent, as far as the tracker's client knows."""
        ...

    def arrived(self) -> int:
        """Ask the tracker for the last step that it has, after ``finish``; 0: none."""
        ...
