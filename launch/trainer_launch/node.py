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
- With several machines, ``Peers`` is the line to the other agents (``meeting.py``): a signal here is a signal there, a
  failure there ends the ranks here.
"""

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Protocol

from trainer_launch import children
from trainer_launch.children import Child, Running
from trainer_launch.command import rank_arguments, rank_environment
from trainer_launch.signals import heeding
from trainer_launch.spec import LaunchSpec
from trainer_launch.verdict import STOPPED, Failed, NodeResult, blame, has_failed

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


@dataclass(frozen=True, slots=True)
class StopThere:
    """Another machine got a signal that asks all ranks to stop in good order."""

    number: signal.Signals


@dataclass(frozen=True, slots=True)
class FailureThere:
    """Ranks failed on another machine, or it is gone; those here are gone ``grace`` seconds from now."""

    cause: str
    grace: float = GRACE_SECONDS


@dataclass(frozen=True, slots=True)
class PublisherEnded:
    """The machine of rank 0 is done; what still runs here has nothing to wait for."""


PeerNews = StopThere | FailureThere | PublisherEnded


class Peers(Protocol):
    """The other machines, as the agent of this one sees them."""

    def listen(self, notify: Callable[[PeerNews], None] | None) -> None:
        """Call ``notify``, from any thread, for all news from now on and for a stop that came before; None: nobody."""

    def stop(self, number: signal.Signals) -> None:
        """This machine got a signal that asks all ranks to stop."""

    def failure(self) -> None:
        """A rank of this machine has failed; which one and why is in the result."""


@dataclass(frozen=True, slots=True)
class _Line:
    text: str


@dataclass(frozen=True, slots=True)
class _Exit:
    index: int


@dataclass(frozen=True, slots=True)
class _Signal:
    number: signal.Signals


_Event = _Line | _Exit | _Signal | PeerNews


def run_node(
    spec: LaunchSpec, on_line: Callable[[str], None], *, keep_open: Sequence[int] = (), peers: Peers | None = None
) -> NodeResult:
    """Start this machine's ranks and wait for their end. Rank lines go to ``on_line``, called from this thread.

    ``keep_open``: file descriptors that the ranks inherit (the run's lock: it stays taken until the last rank is gone).
    Must be called from the main thread, which receives the signals.
    """
    ranks = [
        Child(
            name=f"rank {spec.rank(local)}",
            arguments=rank_arguments(spec),
            variables=rank_environment(spec, local),
            log=spec.log(spec.rank(local)),
            shown=local == 0,
        )
        for local in range(spec.processes)
    ]
    return supervise(ranks, on_line, keep_open=keep_open, peers=peers)


def supervise(
    started: Sequence[Child],
    on_line: Callable[[str], None],
    *,
    keep_open: Sequence[int] = (),
    grace: float = GRACE_SECONDS,
    peers: Peers | None = None,
) -> NodeResult:
    """Start children together and see them through to their end (see the module's words)."""
    return _Supervisor(started, on_line, tuple(keep_open), grace, peers).run()


class _Supervisor:
    def __init__(
        self,
        started: Sequence[Child],
        on_line: Callable[[str], None],
        keep_open: tuple[int, ...],
        grace: float,
        peers: Peers | None,
    ) -> None:
        self._children = started
        self._on_line = on_line
        self._keep_open = keep_open
        self._grace = grace
        self._peers = peers
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._running: list[Running] = []
        self._ended: list[Running] = []  # in the order in which they ended
        self._stop: signal.Signals | None = None
        self._stopped_here = False
        self._at_once = False
        self._failure_there = ""
        self._ask_at: float | None = None
        self._kill_at: float | None = None
        self._linger_until: float | None = None
        self._linger_after = ""

    def run(self) -> NodeResult:
        with heeding(FORWARDED, self._on_signal):
            try:
                self._start()
                if self._peers is not None:
                    self._peers.listen(self._events.put)
                while len(self._ended) < len(self._running):
                    self._handle(self._next_event())
                    self._enforce()
                self._drain()
                return replace(self._result(), signal=self._stop.name if self._stop is not None else "")
            finally:
                if self._peers is not None:
                    self._peers.listen(None)
                for running in self._running:
                    if running.code is None:
                        children.kill_session(running.process.pid)
                        running.process.wait()

    def _start(self) -> None:
        foreign = children.foreign_variables()
        if foreign:
            self._on_line(f"warning: not passed on, because the run's config decides: {', '.join(foreign)}")
        for index, child in enumerate(self._children):
            self._running.append(
                children.start(
                    child,
                    on_line=lambda text: self._events.put(_Line(text)),
                    on_exit=lambda ended=_Exit(index): self._events.put(ended),
                    keep_open=self._keep_open,
                )
            )

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
        match event:
            case None:
                return
            case _Line(text):
                self._on_line(text)
            case _Exit(index):
                self._finish(self._running[index])
            case _Signal(number):
                self._forward(number)
            case StopThere(number):
                if self._stop is None:  # one signal reaches all machines of a job; the copy of it is no second Ctrl-C
                    self._on_line(f"another machine got {number.name}: stopping in good order")
                    self._pass_on(number)
            case FailureThere(cause, grace):
                self._failure_there = self._failure_there or cause
                self._end_within(min(grace, self._grace))
            case PublisherEnded():
                self._linger("the machine of rank 0")

    def _forward(self, number: signal.Signals) -> None:
        if self._stopped_here and number == signal.SIGINT:
            self._at_once = True
            self._end_all(signal.SIGKILL)
            return
        if self._stop is None:
            self._on_line("stopping in good order; Ctrl-C once more ends everything at once")
            if self._peers is not None:
                self._peers.stop(FORWARDED[number])
        self._stopped_here = True
        self._pass_on(FORWARDED[number])

    def _pass_on(self, number: signal.Signals) -> None:
        self._stop = number
        for running in self._alive():
            running.process.send_signal(number)

    def _finish(self, running: Running) -> None:
        children.kill_session(running.process.pid)  # what it may have left behind; not reaped yet, so the id is its own
        running.code = running.process.wait()
        self._ended.append(running)
        if has_failed(running.code) and not running.was_ended and self._kill_at is None:
            self._end_within(self._grace)
            if self._peers is not None:
                self._peers.failure()
        elif running is self._running[0] and not has_failed(running.code):
            self._linger(running.child.name)

    def _linger(self, after: str) -> None:
        self._linger_until, self._linger_after = time.monotonic() + self._grace, after

    def _end_within(self, seconds: float) -> None:
        if self._kill_at is None:
            now = time.monotonic()
            self._ask_at, self._kill_at = now + min(SETTLE_SECONDS, seconds / 4), now + seconds

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
                late = f"{running.child.name} did not end {self._grace:.0f} s after {self._linger_after}"
                self._on_line(f"warning: {late}; ended it")
            self._end_all(signal.SIGKILL)

    def _alive(self) -> list[Running]:
        return [running for running in self._running if running.code is None]

    def _end_all(self, number: signal.Signals) -> None:
        for running in self._alive():
            running.was_ended = True
            if number == signal.SIGKILL:
                children.kill_session(running.process.pid)
            else:
                running.process.send_signal(number)

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
        failed = [
            Failed(
                name=running.child.name,
                code=running.code,
                log=running.child.log,
                log_start=running.log_start,
                shown=running.child.shown,
            )
            for running in self._ended
            if running.code is not None and has_failed(running.code) and not running.was_ended
        ]
        if failed:
            return blame(failed)
        if self._failure_there:
            return NodeResult(exit_code=1, cause=self._failure_there, lost_peer=True)
        if any(running.code == STOPPED for running in self._ended):
            return NodeResult(exit_code=STOPPED, cause="stopped in good order")
        return NodeResult(exit_code=0)
