"""Who writes the ledger of a process while it works: its wall time, CPU time and energy, under the name of its stage.

A thread adds a line every half minute, so that a process that is killed has told almost all; writing never stops the
work: a line that cannot be written waits, and its figures go into the next.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from trainer.cost.ledger import Meter, Spell, append
from trainer.cost.power import GpuMeter, Sockets

BETWEEN = "start"
"""What a process does outside of the stages: starting, loading, waiting for the others."""
EVERY = 30.0
"""Seconds between two lines."""
MOMENT = 1e-3
"""Seconds that are not worth a line; they count to what comes next."""


class Book:
    """The ledger of this process, from its construction to ``close``.

    Args:
        path: of the ledger; no other living process writes it.
        rank: of this process, -1 for one that the driver runs.
        gpu: the name of the GPU that it holds, "" for none; ``meter``: that GPU's, None where it says nothing.
        sockets: of this machine, for the one process on it that tells their energy; ``told_by_another``: another
            process does, so that this one has 0 to add.
        cpu_seconds: CPU time so far of what is counted.
        lived: seconds that this process had lived and held its GPU before; its CPU time until now belongs to them.
        now: the clock, in seconds.
        warn: told once that a line could not be written.
        every: seconds between two lines; None: none but those at the ends of stages.
    """

    def __init__(
        self,
        path: Path,
        *,
        rank: int,
        gpu: str = "",
        meter: GpuMeter | None = None,
        sockets: Sockets | None = None,
        told_by_another: bool = False,
        cpu_seconds: Callable[[], float] = time.process_time,
        lived: float = 0.0,
        now: Callable[[], float] = time.monotonic,
        warn: Callable[[str], None] = lambda _: None,
        every: float | None = EVERY,
    ) -> None:
        self._path, self._rank, self._gpu = path, rank, gpu
        self._meter, self._sockets, self._told_by_another = meter, sockets, told_by_another
        self._cpu_seconds, self._now, self._warn = cpu_seconds, now, warn
        self._began = datetime.now(UTC).isoformat(timespec="microseconds")
        self._stage, self._since, self._cpu = BETWEEN, now(), cpu_seconds()
        self._lock = threading.Lock()
        self._waiting = [self._line(lived, self._cpu, None, "", None)] if lived else list[Spell]()
        self._warned = False
        self._closed = threading.Event()
        if every is not None:
            threading.Thread(target=self._write_often, args=(every,), name="ledger", daemon=True).start()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens inside is spent on the stage ``name``, also when it ends with an error."""
        self._turn_to(name)
        try:
            yield
        finally:
            self._turn_to(BETWEEN)

    def close(self) -> None:
        """Write the last line."""
        self._closed.set()
        self._turn_to(BETWEEN)

    def _turn_to(self, stage: str) -> None:
        with self._lock:
            self._write()
            self._stage = stage

    def _write_often(self, every: float) -> None:
        while not self._closed.wait(every):
            with self._lock:
                self._write()

    def _write(self) -> None:
        if self._now() - self._since >= MOMENT:
            self._waiting.append(self._spell())
        try:
            while self._waiting:
                append(self._path, self._waiting[0])
                self._waiting.pop(0)
        except OSError as fault:
            if not self._warned:
                self._warn(f"{self._path} cannot be written ({fault}); what is spent is written when it can be")
            self._warned = True

    def _spell(self) -> Spell:
        now, cpu = self._now(), self._cpu_seconds()
        seconds, used = now - self._since, cpu - self._cpu
        self._since, self._cpu = now, cpu
        joules, meter = (None, "") if self._meter is None else self._meter.used(seconds)
        of_sockets = None if self._sockets is None else self._sockets.used()
        return self._line(seconds, used, joules, meter, 0.0 if self._told_by_another else of_sockets)

    def _line(
        self, seconds: float, core_seconds: float, gpu_joules: float | None, meter: Meter, cpu_joules: float | None
    ) -> Spell:
        return Spell(
            stage=self._stage,
            began=self._began,
            rank=self._rank,
            seconds=seconds,
            gpus=1 if self._gpu else 0,
            gpu=self._gpu,
            core_seconds=core_seconds,
            gpu_joules=gpu_joules,
            gpu_meter=meter,
            cpu_joules=cpu_joules,
        )
