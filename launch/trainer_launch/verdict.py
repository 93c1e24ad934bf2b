"""Why the ranks ended: out of exit codes and the last words in logs, one line for a person who looks for the cause."""

import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STOPPED = 75
AGAIN = 74
"""Something outside the ranks failed: what is saved is intact, and the same commands go on."""
LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote (process|error)|lost connection|failed to recv"
    r"|recvvalue failed|waitforinput|timed out|ncclremoteerror|distbackenderror|disterror",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResult:
    """``exit_code``: 0, 74, 75, 76, that of the first rank that failed, or 128 + the signal that ended it.

    ``cause``: one line, empty when all is done. ``log``: the log of that rank, when one is to blame. ``shown``: its
    output was passed on already. ``lost_peer``: all that went wrong here is that somebody else was gone. ``signal``:
    the signal that asked for a stop, "" when none came.
    """

    exit_code: int
    cause: str = ""
    log: str = ""
    shown: bool = False
    lost_peer: bool = False
    signal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A process that failed by itself. ``log_start``: the byte of its log at which this start begins."""

    name: str
    code: int
    log: Path
    log_start: int
    shown: bool


def has_failed(code: int | None) -> bool:
    """Whether an exit code (negative: the signal that ended the process; None: still running) is a failure."""
    return code not in (0, STOPPED, None)


def blame(failed: Sequence[Failed]) -> NodeResult:
    """Name the cause among processes that failed (at least one, in the order in which they ended).

    The first one, unless all it says is that it lost a peer and another failed by itself too.
    """
    words = [(one, last_words(one.log, one.log_start)) for one in failed]
    own = [(one, said) for one, said in words if not LOST_PEER.search(said)]
    first, said = (own or words)[0]
    same = [one for one, other in words if other == said and one.shown]
    one = same[0] if same else first  # all ranks found the same fault: the user has read it already
    how = f"was ended by {_signal_name(-one.code)}" if one.code < 0 else f"ended with exit code {one.code}"
    detail = f": {said}" if said else ""
    return NodeResult(
        exit_code=one.code if one.code > 0 else 128 - one.code,
        cause=f"{one.name} {how}{detail} (log: {one.log})",
        log=str(one.log),
        shown=one.shown,
        lost_peer=not own,
    )


def last_words(log: Path, start: int) -> str:
    """The line after byte ``start`` of ``log`` that says most about the end: the last error, else the last line."""
    with log.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(start, size - 64 * 1024))
        lines = [line for line in handle.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors[-1] if errors else lines[-1] if lines else "").strip()


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name} (out of memory, or killed by someone)" if number == signal.SIGKILL else name
