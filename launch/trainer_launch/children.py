"""One process that the agent starts: its own session, its log, its lines, and the news of its end.

Nothing here decides anything: ``node.py`` does.
"""

import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import IO

from trainer_launch import leash
from trainer_launch.command import without_foreign

APPENDED = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """One process to start. ``variables`` are added to this process's environment.

    ``shown``: pass its lines on, with ``prefix`` before each.
    """

    name: str
    arguments: tuple[str, ...]
    variables: dict[str, str]
    log: Path
    shown: bool
    prefix: str = ""


@dataclass(slots=True)
class Running:
    """A child that was started. ``code``: None until it was reaped; ``was_ended``: it was told to end."""

    child: Child
    process: subprocess.Popen[bytes]
    log_start: int
    reader: threading.Thread | None
    waiter: threading.Thread
    code: int | None = None
    was_ended: bool = False


def foreign_variables() -> list[str]:
    """Names of the variables of other launchers that no child gets."""
    return without_foreign(os.environ)[1]  # noqa: TID251


def start(
    child: Child, *, on_line: Callable[[str], None], on_exit: Callable[[], None], keep_open: Sequence[int]
) -> Running:
    """Start ``child``; it is tied to this process (``leash.py``). Both callbacks are called from other threads.

    ``on_exit``: it has ended but was not reaped, so that its process id is still its own. ``keep_open``: descriptors
    that it inherits.
    """
    environment, _ = without_foreign(os.environ)  # noqa: TID251
    child.log.parent.mkdir(parents=True, exist_ok=True)
    # With a buffer, closing it on a full disk would fail once more. A link would send a run's words elsewhere.
    log = FileIO(os.open(child.log, APPENDED, 0o666), "ab")
    stamp = datetime.now().astimezone().isoformat(timespec="seconds")
    log.write(f"=== {stamp} {child.name}: {shlex.join(child.arguments)}\n".encode())
    log_start = log.tell()
    process = subprocess.Popen(
        [child.arguments[0], "-I", "-S", leash.__file__, str(os.getpid()), *child.arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if child.shown else log,
        stderr=subprocess.STDOUT,
        env={**environment, **child.variables},
        start_new_session=True,
        pass_fds=tuple(keep_open),
    )
    reader = None
    if process.stdout is not None:
        reader = threading.Thread(target=_read, args=(process.stdout, log, child.prefix, on_line), daemon=True)
        reader.start()
    else:
        log.close()
    waiter = threading.Thread(target=_wait, args=(process.pid, on_exit), daemon=True)
    waiter.start()
    return Running(child, process, log_start, reader, waiter)


def _read(pipe: IO[bytes], log: FileIO, prefix: str, on_line: Callable[[str], None]) -> None:
    writable = True
    with pipe, log:
        for raw in pipe:
            try:
                if writable:
                    log.write(raw)
            except OSError as fault:  # a full disk: the pipe has to be read on, or the rank would hang
                writable = False
                on_line(f"warning: {log.name} is not written any further: {fault.strerror}")
            text = raw.decode("utf-8", errors="replace").rstrip("\r\n")
            on_line(prefix + text.rsplit("\r", 1)[-1])  # a bar drawn with \r: its last state


def _wait(pid: int, on_exit: Callable[[], None]) -> None:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    on_exit()


def kill_session(pid: int) -> None:
    """Kill a child and all that it left behind."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
