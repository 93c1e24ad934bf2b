"""The record of a run, one line per optimizer step, that a later resume cannot make lie.

``metrics.jsonl`` is what people plot, compare and put into scripts, so its names are fixed, a resumed run cuts the
lines that its checkpoint does not know before it writes them again, and a value that is not finite is written as the
text "nan" or "inf" (JSON has no such number, and 0.0 would hide it).
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

import msgspec

from trainer.errors import RunError
from trainer.paths import write_atomic


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step, over all ranks.

    ``step`` counts from 1. ``loss``: nats per target token of this step. ``grad_norm``: global, before clipping.
    ``tokens_per_second``: tokens without padding, by the wall time of the step (validation and saving left out).
    ``tokens``: seen since the start of the run. ``targets``: learnt in this step. ``epoch``: passes over the data, a
    fraction. ``seconds``: wall time of rank 0 by part. ``memory_gb``: peak so far of rank 0 in 10^9 bytes (CUDA:
    allocated on the device; CPU: resident).
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    tokens: int
    targets: int
    epoch: float
    seconds: dict[str, float]
    memory_gb: float


class MetricsFile:
    """``metrics.jsonl``, appended to by one process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def continue_after(self, step: int) -> int:
        """Cut every line after ``step``, and a last line that was only half written; returns the lines cut.

        Raises:
            RunError: a whole line is not one of ours.
        """
        if not self.path.exists():
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for number, line in enumerate(lines, 1) if self._belongs(line, number, len(lines), step)]
        if len(kept) < len(lines):
            write_atomic(self.path, b"".join(kept))
        return len(lines) - len(kept)

    def append(self, record: StepRecord, figures: Mapping[str, float]) -> None:
        """Add one step; ``figures`` of a validation of this step get ``val_`` before their names."""
        values = asdict(record) | {f"val_{name}": value for name, value in figures.items()}
        with self.path.open("ab") as handle:
            handle.write(msgspec.json.encode(_as_json(values)) + b"\n")

    def step_seconds(self) -> list[tuple[int, float]]:
        """Step and wall time in seconds of every recorded step, without validation and saving.

        The time is the sum of the parts but ``validation``: what a step itself takes.
        """
        found: list[tuple[int, float]] = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            record = msgspec.json.decode(line)
            parts = {name: seconds for name, seconds in record["seconds"].items() if name != "validation"}
            found.append((int(record["step"]), sum(parts.values())))
        return found

    def sync(self) -> None:
        """Make the lines durable. Before a checkpoint is published: it must not know steps that the record lost."""
        if self.path.exists():
            with self.path.open("rb") as handle:
                os.fsync(handle.fileno())

    def _belongs(self, line: bytes, number: int, count: int, step: int) -> bool:
        if not line.endswith(b"\n"):
            return False
        try:
            return int(msgspec.json.decode(line)["step"]) <= step
        except (msgspec.DecodeError, KeyError, TypeError, ValueError) as fault:
            raise RunError(
                "the record of this run has a line that is not a step",
                where=f"{self.path}:{number}",
                got=line[:80].decode("utf-8", "replace").rstrip(),
                allowed='one JSON object with "step" per line',
                do=f"remove the line (there are {count}), or move the file away",
            ) from fault


def _as_json(value: object) -> object:
    """``value`` with every number that is not finite as text, at any depth."""
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    return value


class StepTimer:
    """Wall time of one step by part. Parts may come several times (once per micro-batch); they add up."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds since the timer was made."""
        return time.perf_counter() - self._start
