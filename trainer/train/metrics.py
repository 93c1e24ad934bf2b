"""The record of a run, one line per optimizer step, that a later resume cannot make lie.

``metrics.jsonl`` is what people plot, compare and put into scripts, so its names are fixed, a resumed run cuts the
lines that its checkpoint does not know before it writes them again, and a value that is not finite is written as the
text "nan" or "inf" (JSON has no such number, and 0.0 would hide it).
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path

import msgspec

from trainer.errors import RunError
from trainer.paths import without_links, write_atomic


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


_NAMES = [field.name for field in fields(StepRecord)]


class MetricsFile:
    """``metrics.jsonl``, appended to by one process.

    ``still_ours`` is asked before every line and raises when another process has taken over the run. ``warn``: told
    once when lines cannot be written; they wait in memory and are written as soon as the disk lets them.
    """

    def __init__(
        self, path: Path, *, still_ours: Callable[[], None] = lambda: None, warn: Callable[[str], None] = lambda _: None
    ) -> None:
        self.path = path
        self._still_ours, self._warn = still_ours, warn
        self._inode: int | None = None
        self._waiting: list[bytes] = []
        self._lock = threading.Lock()  # a save beside the training syncs

    def continue_after(self, step: int) -> int:
        """Cut every line after ``step``, and a last line that was only half written; returns the lines cut.

        The file is always a new one: an older process that still has a line to write, writes it into the old one.

        Raises:
            RunError: a whole line is not one of ours.
        """
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for number, line in enumerate(lines, 1) if self._belongs(line, number, len(lines), step)]
        self._still_ours()
        write_atomic(self.path, b"".join(kept))
        self._inode = self.path.stat().st_ino
        return len(lines) - len(kept)

    def append(self, record: StepRecord, figures: Mapping[str, float]) -> None:
        """Add one step; ``figures`` of a validation of this step get ``val_`` before their names.

        Raises:
            RunError: another process writes this file.
        """
        values = {name: getattr(record, name) for name in _NAMES} | {
            f"val_{name}": value for name, value in figures.items()
        }
        self._still_ours()
        with self._lock:
            first = not self._waiting
            self._waiting.append(msgspec.json.encode(_as_json(values)) + b"\n")
            try:
                self._write()
            except OSError as fault:
                if first:
                    self._warn(f"{self.path} cannot be written ({fault.strerror}); its lines wait in memory")

    def _write(self) -> None:
        """Add the lines that wait, all or none of them."""
        with open(self.path, "ab", buffering=0, opener=without_links) as handle:
            status = os.fstat(handle.fileno())
            if self._inode is not None and status.st_ino != self._inode:
                raise RunError(
                    "another process writes the record of this run",
                    where=str(self.path),
                    got="another file than the one that this process began",
                    allowed="one process at a time",
                    do="leave the run to the other process",
                )
            data = b"".join(self._waiting)
            try:
                if handle.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                handle.truncate(status.st_size)
                raise
        self._waiting.clear()

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
        """Make the lines durable. Before a checkpoint is published: it must not know steps that the record lost.

        Raises:
            OSError: lines still wait, and cannot be written.
        """
        with self._lock:
            if self._waiting:
                self._write()
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
