"""A run that no longer moves ends by itself, names who stands still, and leaves the stacks of all ranks.

A frozen rank keeps the others waiting in a collective for as long as the group's timeout, and then they all say "timed
out" and nobody knows why. So a thread of every rank leaves a sign of life in the run folder, every few seconds: which
phase and step its rank is in, a number that grows with every sign, and one that grows with every move of its work. It
reads the signs of the others as well. Two things are wrong, from the moment the ranks have met to their end:

- a rank whose signs have ceased: it is frozen or dead, whatever it was doing;
- no move of any rank for too long: all wait for something that does not come. In training steps a forward pass is a
  move, and nothing else: ranks that spin are stuck too. Whatever else they do (loading, measuring, saving, exporting)
  may take as long as it needs: there, it is a move when a rank has computed, read or written anything (``busy.py``).

Times are this process's own; clocks of two machines are never compared, and a process that was itself stopped for a
while (a suspended job) begins anew. The rank that notices first writes the stacks of all its threads, has the others of
its machine write that of their main thread (``faulthandler`` on SIGUSR2; one that is stopped is continued for that) and
ends with an exit code of which the driver makes "run me again".
"""

import ctypes
import faulthandler
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import psutil

from trainer.errors import EXIT_AGAIN
from trainer.train.busy import Busy

TRAINING = "train"
"""The phase in which only a forward pass is a move."""
SIGNS_PER_TIMEOUT = 10
ALARM_SECONDS = 1.0
"""Between looks for an alarm of another machine."""
STACKS_SECONDS = 5.0
"""What ranks on other machines have to write their stacks, before the first one ends and all are ended."""
SETTLE_SECONDS = 0.5
"""What ranks of this machine have to write their stacks."""
STACKS = signal.SIGUSR2
TGKILL = {"x86_64": 234, "aarch64": 131}
"""The system call by its number: glibc has a function for it from 2.30 on, and clusters still run 2.28."""
ALARM = "alarm"
"""A file beside the signs, with the words of the rank that noticed, for ranks on other machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """``signs/rank{r}.json``. ``started``: of the process, in seconds since 1970; with the pid it names a process.

    ``count`` grows with every sign, ``moves`` with every move since the phase began, ``work`` whenever the process was
    found busy outside of training steps.
    """

    pid: int
    host: str
    started: float
    phase: str
    step: int
    count: int
    moves: int
    work: int = 0

    @property
    def progress(self) -> tuple[str, int, int, int]:
        """What changes when the rank gets anywhere."""
        return self.phase, self.step, self.moves, self.work


@dataclass(slots=True)
class _Seen:
    """The last sign of a rank and when, by our clock, its count and its progress were seen to change."""

    sign: Sign
    alive: float
    moved: float


class Watchdog:
    """Leaves signs of this rank and watches those of all.

    Args:
        folder: where the signs lie; emptied of those of earlier starts by rank 0 before the ranks meet.
        rank, world_size: of this process.
        timeout: seconds.
        end: what is done at last, with an exit code; it does not return.
        now: the clock.
        is_busy: whether this process did anything since the last call; None: ask the system.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        *,
        timeout: float,
        end: Callable[[int], None] = os._exit,
        now: Callable[[], float] = time.monotonic,
        is_busy: Callable[[], bool] | None = None,
    ) -> None:
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._timeout, self._end, self._now = timeout, end, now
        self._is_busy = is_busy or Busy().since_last
        started = psutil.Process().create_time()
        self._own = Sign(
            pid=os.getpid(), host=socket.gethostname(), started=started, phase="start", step=0, count=0, moves=0
        )
        self._seen: dict[int, _Seen] = {}
        self._looked = self._began = now()
        self._mute = False
        self._over = threading.Event()

    def enter(self, phase: str, step: int) -> None:
        """The rank begins ``phase``, of ``step`` in training."""
        self._own = replace(self._own, phase=phase, step=step, moves=0)

    def move(self) -> None:
        """Something was done within the phase."""
        self._own = replace(self._own, moves=self._own.moves + 1)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._begin_anew(self._now())
        self._looked = self._began
        # Whoever has left a sign may be asked, so before the first one. The thread that the signal finds, and no other:
        # the rest run on while the handler reads, and reading frames of running threads crashed two of three ranks that
        # were continued for it (Python 3.11).
        faulthandler.register(STACKS, file=2, all_threads=False)
        self.give_sign()
        thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            faulthandler.unregister(STACKS)

    def _run(self) -> None:
        pause = self._timeout / SIGNS_PER_TIMEOUT
        due = time.monotonic() + pause
        while not self._over.wait(min(ALARM_SECONDS, pause)):
            if self._is_raised():
                return
            if time.monotonic() < due:
                continue
            due = time.monotonic() + pause
            self.give_sign()
            trouble = self.look()
            if trouble:
                self._raise_alarm(trouble)
                return

    def give_sign(self) -> None:
        """Leave a sign of life; half a sign is never seen. A disk that fails is remembered, and is no error here."""
        worked = self._is_busy()  # asked in every phase: it counts from call to call
        work = self._own.work + (worked and self._own.phase != TRAINING)
        self._own = replace(self._own, count=self._own.count + 1, work=work)
        path = self._folder / f"rank{self._rank}.json"
        partial = path.with_suffix(".new")
        try:
            partial.write_bytes(msgspec.json.encode(self._own))
            partial.replace(path)
            self._mute = False
        except OSError:
            self._mute = True

    def look(self) -> str:
        """What is wrong, in words; empty: nothing."""
        now = self._now()
        if now - self._looked > self._timeout / 2:
            self._begin_anew(now)  # this process was stopped itself, perhaps with all the others: nobody can be blamed
        self._looked = now
        for rank in range(self._world_size):
            sign = self._own if rank == self._rank else read_sign(self._folder / f"rank{rank}.json")
            if sign is not None:
                self._note(rank, sign, now)
        if self._mute:
            self._begin_anew(now)  # whoever cannot leave signs must not expect any: the disk is at fault
            return ""
        silent = [text for rank in range(self._world_size) if rank != self._rank and (text := self._silence(rank, now))]
        return "; ".join(silent) or self._standstill(now)

    def _begin_anew(self, now: float) -> None:
        self._seen.clear()
        self._began = now

    def _silence(self, rank: int, now: float) -> str:
        seen = self._seen.get(rank)
        if now - (self._began if seen is None else seen.alive) <= self._timeout:
            return ""
        if seen is None:
            return f"rank {rank} has given no sign of life for {now - self._began:.0f} s: frozen or dead"
        sign = seen.sign
        return (
            f"rank {rank} (process {sign.pid} on {sign.host}) has given no sign of life for {now - seen.alive:.0f} s, "
            f"last in '{sign.phase}'{_of_step(sign)}: frozen or dead"
        )

    def _note(self, rank: int, sign: Sign, now: float) -> None:
        before = self._seen.get(rank)
        if before is None or before.sign.pid != sign.pid:
            self._seen[rank] = _Seen(sign, now, now)
            return
        alive = now if sign.count != before.sign.count or rank == self._rank else before.alive
        moved = now if sign.progress != before.sign.progress else before.moved
        self._seen[rank] = _Seen(sign, alive, moved)

    def _standstill(self, now: float) -> str:
        if len(self._seen) < self._world_size or min(now - seen.moved for seen in self._seen.values()) <= self._timeout:
            return ""
        places = {rank: f"'{seen.sign.phase}'{_of_step(seen.sign)}" for rank, seen in sorted(self._seen.items())}
        latest = max((seen.sign.step, seen.sign.moves) for seen in self._seen.values())
        behind = [rank for rank, seen in sorted(self._seen.items()) if (seen.sign.step, seen.sign.moves) < latest]
        if all(seen.sign.phase == TRAINING for seen in self._seen.values()) and behind:
            who = f"rank {', '.join(map(str, behind))} is behind the others in step {self._seen[behind[0]].sign.step}"
        elif len(set(places.values())) == 1:
            who = f"all ranks are in {places[0]}"
        else:
            who = "; ".join(f"rank {rank} is in {place}" for rank, place in places.items())
        return f"nothing has moved for {self._timeout:.0f} s: {who}"

    def _is_raised(self) -> bool:
        """Whether a rank has raised the alarm; then this one writes its stacks and is done: it will be ended."""
        try:
            trouble = (self._folder / ALARM).read_text("utf-8")
        except OSError:
            return False
        self._write_stacks(trouble)
        return True

    def _write_stacks(self, trouble: str) -> None:
        _write(f"=== stacks of rank {self._rank}, because {trouble}\n")
        faulthandler.dump_traceback(file=2, all_threads=True)

    def _raise_alarm(self, trouble: str) -> None:
        self._write_stacks(trouble)
        others = [(rank, seen.sign) for rank, seen in self._seen.items() if rank != self._rank]
        here = {rank: sign for rank, sign in others if sign.host == self._own.host and is_running(sign)}
        for sign in here.values():
            ask_for_stack(sign.pid)
        self._over.wait(SETTLE_SECONDS)
        for rank in here:
            _write(f"=== rank {rank} was asked to write its stack into its own log\n")
        if any(sign.host != self._own.host for _, sign in others):
            with suppress(OSError):
                (self._folder / ALARM).write_text(trouble, "utf-8")
            self._over.wait(STACKS_SECONDS)
        _write(f"error: {trouble}. The run ends; the same command goes on from what was saved\n")
        self._end(EXIT_AGAIN)


def _of_step(sign: Sign) -> str:
    return f" of step {sign.step}" if sign.step else ""


def read_sign(path: Path) -> Sign | None:
    """The last sign of a rank; None: there is none that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Sign)
    except (OSError, msgspec.DecodeError):
        return None


def is_running(sign: Sign) -> bool:
    """Whether the process that left ``sign`` on this machine is still that process."""
    try:
        return abs(psutil.Process(sign.pid).create_time() - sign.started) < 1.0
    except psutil.Error:
        return False


def ask_for_stack(pid: int) -> None:
    """Have the main thread of another process write its stack; one that is stopped is continued for that.

    The question comes first, and to that thread alone: it answers before it runs on, so from where it stood. Asked as
    a whole, a process that was stopped answers in any of its threads, and those of gloo have no stack of Python.
    """
    with suppress(ProcessLookupError, PermissionError):
        if not _signal_main_thread(pid, STACKS):
            os.kill(pid, STACKS)
        os.kill(pid, signal.SIGCONT)


def _signal_main_thread(pid: int, number: signal.Signals) -> bool:
    """Signal the thread of another process that has the number of the process; False: not possible here."""
    call = TGKILL.get(platform.machine()) if sys.platform == "linux" else None
    return call is not None and ctypes.CDLL(None).syscall(call, pid, pid, int(number)) == 0


def clear_signs(folder: Path) -> None:
    """Remove the signs of earlier starts; by rank 0, before the others begin to read."""
    for path in (*folder.glob("rank*.json"), folder / ALARM):
        path.unlink(missing_ok=True)


def _write(text: str) -> None:
    os.write(2, text.encode())  # the main thread may hold the lock of sys.stderr
