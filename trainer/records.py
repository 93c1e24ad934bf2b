"""The lines of ``metrics.jsonl`` for those who look at a run: ``show``, trackers, sweeps.

The training writes them (``train/metrics.py``); everybody else reads them here, also while more are being written.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from trainer.errors import RunError

Record = Mapping[str, object]
"""One optimizer step: ``step``, ``loss``, ``lr``, ``grad_norm``, ``tokens_per_second``, ``val_*`` where validated."""


@dataclass(frozen=True, slots=True)
class Curve:
    """``values`` of one figure over a run, at ``steps``."""

    steps: list[int]
    values: list[float]


def read_records(path: Path) -> list[Record]:
    """The lines of ``metrics.jsonl``; a last line that is still being written is left out.

    Raises:
        RunError: another line is not a step.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return _decoded([line for line in lines if line.endswith(b"\n")], path)


class GrowingRecords:
    """The lines of a file as they come. One that was replaced, by a resume that cut it, is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._at = 0, 0

    def new(self) -> list[Record]:
        """The whole lines since the last call.

        Raises:
            RunError: one of them is not a record.
        """
        try:
            with self.path.open("rb") as handle:
                status = os.fstat(handle.fileno())
                if status.st_ino != self._inode or status.st_size < self._at:
                    self._inode, self._at = status.st_ino, 0
                handle.seek(self._at)
                raw = handle.read()
        except FileNotFoundError:
            return []
        whole = raw[: raw.rfind(b"\n") + 1]
        self._at += len(whole)
        return _decoded(whole.splitlines(), self.path)


def _decoded(lines: Sequence[bytes], path: Path) -> list[Record]:
    try:
        return [msgspec.json.decode(line, type=dict[str, object]) for line in lines]
    except msgspec.DecodeError as fault:
        raise RunError(
            "the record of this run has a line that is not a step",
            where=str(path),
            got=str(fault),
            allowed="one JSON object per line",
            do="remove the line, or move the file away",
        ) from fault


def curve_of(records: Sequence[Record], name: str) -> Curve | None:
    """The figure ``name`` at the steps that have it; None when no step has. Not finite ones ("nan") are left out."""
    found = [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)]
    steps, values = [int(as_number(step)) for step, _ in found], [as_number(value) for _, value in found]
    return Curve(steps, values) if found else None


def as_number(value: object) -> float:
    """``value`` if it is a number, else nan."""
    return float(value) if isinstance(value, int | float) else float("nan")
