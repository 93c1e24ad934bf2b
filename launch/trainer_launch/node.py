"""The agent of one machine: starts the ranks, passes signals on, and says why the run ended.

torchrun is not used because it turns every exit code into 1 and kills the other ranks while one of them may be
publishing a checkpoint. What happens here instead:

- Every rank is the leader of its own session. Ctrl-C in the terminal reaches this process alone, which forwards it, so
  a rank sees it exactly once. Children of a rank never see it.
- SIGTERM, SIGINT and SIGUSR1 are forwarded as they are, SIGHUP (the terminal went away) as SIGTERM; one that this
  process was told to ignore (nohup) stays ignored. A SIGINT after any of them ends all ranks at once.
- Ranks that end with 0 or 75 wait for the first one as long as it takes: it publishes. Once that one has ended so, the
  others have 30 s, and then are killed with a warning. When a rank fails, the others get SIGTERM a moment later and
  SIGKILL 30 s after the failure.
- The first rank that failed is the cause, unless all it says is that it lost a peer and another failed by itself too.
- All output of a rank goes to its log; that of the first rank is passed on line by line as well.
- When this process is killed, the kernel ends the ranks (``leash.py``).
"""

import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import IO

from trainer_launch import leash
from trainer_launch.command import rank_arguments, rank_environment, without_foreign
from trainer_launch.spec import LaunchSpec

STOPPED = 75
INTERRUPTED = 128 + signal.SIGINT
GRACE_SECONDS = 30.0
"""The other ranks are gone this long after one failed."""
SETTLE_SECONDS = 1.0
"""Other ranks may fail by themselves for so long after the first; then they are asked to end."""

FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}
LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote (process|error)|lost connection|failed to recv"
    r"|recvvalue failed|waitforinput|timed out|ncclremoteerror|distbackenderror|disterror",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResult:
    """``exit_code``: 0, 75, 76, that of the first rank that failed, or 128 + the signal that ended it.

    ``cause``: one line, empty when all is done. ``log``: the log of that rank, when one is to blame. ``shown``: its
    output was passed on already.
    """

    exit_code: int
    cause: str = ""
    log: str = ""
    shown: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """One process to start. ``variables`` are added to this process's environment; ``shown``: pass its lines on."""

    name: str
    arguments: tuple[str, ...]
    variables: dict[str, str]
    log: Path
    shown: bool


@dataclass(frozen=True, slots=True)
class _Line:
    text: str


@dataclass(frozen=True, slots=True)
class _Exit:
    index: int


@dataclass(frozen=True, slots=True)
class _Signal:
    number: signal.Signals


_Event = _Line | _Exit | _Signal


@dataclass(slots=True)
class _Running:
    child: Child
    process: subprocess.Popen[bytes]
    log_start: int
    reader: threading.Thread | None
    waiter: threading.Thread
    code: int | None = None
    was_ended: bool = False


def run_node(spec: LaunchSpec, on_line: Callable[[str], None], *, keep_open: Sequence[int] = ()) -> NodeResult:
    """Start this machine's ranks and wait for their end. Rank lines go to ``on_line``, called from this thread.

    ``keep_open``: file descriptors that the ranks inherit (the run's lock: it stays taken until the last rank is gone).
    Must be called from the main thread, which receives the signals.
    """
    children = [
        Child(
            name=f"rank {spec.rank(local)}",
            arguments=rank_arguments(spec),
            variables=rank_environment(spec, local),
            log=spec.log(spec.rank(local)),
            shown=local == 0,
        )
        for local in range(spec.processes)
    ]
    return supervise(children, on_line, keep_open=keep_open)


def supervise(
    children: Sequence[Child],
    on_line: Callable[[str], None],
    *,
    keep_open: Sequence[int] = (),
    grace: float = GRACE_SECONDS,
) -> NodeResult:
    """Start ``children`` together and see them through to their end (see the module's words)."""
    return _Supervisor(children, on_line, tuple(keep_open), grace).run()


class _Supervisor:
    def __init__(
        self, children: Sequence[Child], on_line: Callable[[str], None], keep_open: tuple[int, ...], grace: float
    ) -> None:
        self._children = children
        self._on_line = on_line
        self._keep_open = keep_open
        self._grace = grace
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._running: list[_Running] = []
        self._ended: list[_Running] = []  # in the order in which they ended
        self._stop: signal.Signals | None = None
        self._at_once = False
        self._ask_at: float | None = None
        self._kill_at: float | None = None
        self._linger_until: float | None = None

    def run(self) -> NodeResult:
        heeded = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]  # nohup, ``&``
        previous = {number: signal.signal(number, self._on_signal) for number in heeded}
        try:
            for index, child in enumerate(self._children):
                self._running.append(self._start(index, child))
            while len(self._ended) < len(self._running):
                self._handle(self._next_event())
                self._enforce()
            self._drain()
            return self._result()
        finally:
            for running in self._running:
                if running.code is None:
                    _kill_session(running.process.pid)
                    running.process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)

    # -- events ----------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._events.put(_Signal(signal.Signals(number)))  # SimpleQueue.put may be called from a signal handler

    def _next_event(self) -> _Event | None:
        deadlines = [at for at in (self._ask_at, self._kill_at, self._linger_until) if at is not None]
        try:
            if not deadlines:
                return self._events.get()
            return self._events.get(timeout=max(0.0, min(deadlines) - time.monotonic()))
        except Empty:
            return None

    def _handle(self, event: _Event | None) -> None:
        if isinstance(event, _Line):
            self._on_line(event.text)
        elif isinstance(event, _Signal):
            self._forward(event.number)
        elif isinstance(event, _Exit):
            self._finish(self._running[event.index])

    def _forward(self, number: signal.Signals) -> None:
        if self._stop is not None and number == signal.SIGINT:
            self._at_once = True
            self._end_all(signal.SIGKILL)
            return
        if self._stop is None:
            self._on_line("stopping in good order; Ctrl-C once more ends everything at once")
        self._stop = FORWARDED[number]
        for running in self._alive():
            running.process.send_signal(self._stop)

    def _finish(self, running: _Running) -> None:
        _kill_session(running.process.pid)  # what it may have left behind; it is not reaped yet, so the id is its own
        running.code = running.process.wait()
        self._ended.append(running)
        if _failed(running.code) and not running.was_ended and self._kill_at is None:
            now = time.monotonic()
            self._ask_at, self._kill_at = now + min(SETTLE_SECONDS, self._grace / 4), now + self._grace
        elif running is self._running[0] and not _failed(running.code):
            self._linger_until = time.monotonic() + self._grace

    def _enforce(self) -> None:
        now = time.monotonic()
        if self._ask_at is not None and now >= self._ask_at:
            self._ask_at = None
            self._end_all(signal.SIGTERM)
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._end_all(signal.SIGKILL)
        if self._linger_until is not None and now >= self._linger_until:
            self._linger_until = None
            for running in self._alive():
                first = self._running[0].child.name
                self._on_line(f"warning: {running.child.name} did not end {self._grace:.0f} s after {first}; ended it")
            self._end_all(signal.SIGKILL)

    def _alive(self) -> list[_Running]:
        return [running for running in self._running if running.code is None]

    def _end_all(self, number: signal.Signals) -> None:
        for running in self._alive():
            running.was_ended = True
            if number == signal.SIGKILL:
                _kill_session(running.process.pid)
            else:
                running.process.send_signal(number)

    # -- processes -------------------------------------------------------------------------------------------------

    def _start(self, index: int, child: Child) -> _Running:
        environment, foreign = without_foreign(os.environ)  # noqa: TID251
        if foreign and index == 0:
            self._on_line(f"warning: not passed on, because the run's config decides: {', '.join(foreign)}")
        child.log.parent.mkdir(parents=True, exist_ok=True)
        log = child.log.open("ab", buffering=0)  # with a buffer, closing it on a full disk would fail once more
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        log.write(f"=== {stamp} {child.name}: {shlex.join(child.arguments)}\n".encode())
        start = log.tell()
        process = subprocess.Popen(
            [child.arguments[0], "-I", "-S", leash.__file__, str(os.getpid()), *child.arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if child.shown else log,
            stderr=subprocess.STDOUT,
            env={**environment, **child.variables},
            start_new_session=True,
            pass_fds=self._keep_open,
        )
        reader = None
        if process.stdout is not None:
            reader = threading.Thread(target=self._read, args=(process.stdout, log), daemon=True)
            reader.start()
        else:
            log.close()
        waiter = threading.Thread(target=self._wait, args=(index, process.pid), daemon=True)
        waiter.start()
        return _Running(child, process, start, reader, waiter)

    def _read(self, pipe: IO[bytes], log: FileIO) -> None:
        writable = True
        with pipe, log:
            for raw in pipe:
                try:
                    if writable:
                        log.write(raw)
                except OSError as fault:  # a full disk: the pipe has to be read on, or the rank would hang
                    writable = False
                    self._events.put(_Line(f"warning: {log.name} is not written any further: {fault.strerror}"))
                text = raw.decode("utf-8", errors="replace").rstrip("\r\n")
                self._events.put(_Line(text.rsplit("\r", 1)[-1]))  # a bar drawn with \r: its last state

    def _wait(self, index: int, pid: int) -> None:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # left for ``_finish`` to reap
        self._events.put(_Exit(index))

    def _drain(self) -> None:
        for running in self._running:
            running.waiter.join()
            if running.reader is not None:
                running.reader.join()
        while True:
            try:
                event = self._events.get_nowait()
            except Empty:
                return
            if isinstance(event, _Line):
                self._on_line(event.text)

    # -- the verdict -----------------------------------------------------------------------------------------------

    def _result(self) -> NodeResult:
        if self._at_once:
            return NodeResult(exit_code=INTERRUPTED, cause="ended at once at the second Ctrl-C")
        stopped_early = self._stop is not None and any(
            running.code in (-self._stop, 128 + self._stop) for running in self._ended
        )
        if stopped_early and self._stop is not None:
            return NodeResult(exit_code=STOPPED, cause=f"stopped by {self._stop.name}")
        failed = [running for running in self._ended if _failed(running.code) and not running.was_ended]
        if failed:
            return self._blame(failed)
        if any(running.code == STOPPED for running in self._ended):
            return NodeResult(exit_code=STOPPED, cause="stopped in good order")
        return NodeResult(exit_code=0)

    def _blame(self, failed: list[_Running]) -> NodeResult:
        words = [(running, last_words(running.child.log, running.log_start)) for running in failed]
        own = [(running, said) for running, said in words if not LOST_PEER.search(said)]
        first, said = (own or words)[0]
        same = [running for running, other in words if other == said and running.child.shown]
        running = same[0] if same else first  # all ranks found the same fault: the user has read it already
        code = running.code if running.code is not None else 1
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        detail = f": {said}" if said else ""
        return NodeResult(
            exit_code=code if code > 0 else 128 - code,
            cause=f"{running.child.name} {how}{detail} (log: {running.child.log})",
            log=str(running.child.log),
            shown=running.child.shown,
        )


def last_words(log: Path, start: int) -> str:
    """The line after byte ``start`` of ``log`` that says most about the end: the last error, else the last line."""
    with log.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(start, size - 64 * 1024))
        lines = [line for line in handle.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors[-1] if errors else lines[-1] if lines else "").strip()


def _failed(code: int | None) -> bool:
    return code not in (0, STOPPED, None)


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name} (out of memory, or killed by someone)" if number == signal.SIGKILL else name


def _kill_session(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
