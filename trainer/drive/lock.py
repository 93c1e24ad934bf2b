"""One process at a time works on a run: two writers would publish each other's checkpoints.

The lock is ``flock`` on ``run.lock``. The ranks inherit its descriptor, so that it stays taken until the last of them
is gone, however the driver ended; a file left behind by a dead process locks nothing.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from trainer.errors import RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds the lock, as written into the file: ``started`` is an ISO 8601 time in UTC, ``doing`` the verb."""

    pid: int
    host: str
    started: str
    doing: str

    def __str__(self) -> str:
        return f"'{self.doing}' of process {self.pid} on {self.host}, since {self.started}"


@contextmanager
def hold(path: Path, doing: str) -> Iterator[int]:
    """Hold the lock at ``path`` while the block runs; gives the file descriptor, for the ranks to inherit.

    Raises:
        RunError: somebody else holds it (named), or the file system has no locks.
    """
    handle = _open(path)
    try:
        _take(handle, path)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        holder = Holder(pid=os.getpid(), host=socket.gethostname(), started=now, doing=doing)
        os.ftruncate(handle, 0)
        os.pwrite(handle, msgspec.json.encode(holder) + b"\n", 0)
        yield handle
    finally:
        os.close(handle)  # never LOCK_UN: a rank that outlives this process keeps the lock


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as fault:
        if fault.errno != errno.ELOOP:
            raise
        raise RunError(
            "the lock of the run is a symbolic link, which is not followed",
            where=str(path),
            got=str(path.readlink()),
            allowed="a file of this folder",
            do="remove the link; somebody else may write to this folder",
        ) from None


def _take(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as fault:
        if fault.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise RunError(
                "this run folder is in use",
                where=str(path.parent),
                got=_holder_text(path),
                allowed="one process at a time",
                do="wait for it or end it (it saves when it gets Ctrl-C or SIGTERM), then start the same command "
                "again; another copy of the run needs its own run.dir",
            ) from None
        raise RunError(
            "the file system of the run folder has no file locks",
            where=str(path.parent),
            got=os.strerror(fault.errno or 0),
            allowed="a file system with flock (local disks, NFS from version 4 on, Lustre mounted with -o flock)",
            do="set run.root to a folder on another file system",
        ) from None


def holder_of(path: Path) -> str | None:
    """Who holds the lock at ``path`` at this moment, in words; None: nobody.

    Waits for nobody. The only way to ask is to share the lock for an instant, which is too short to matter.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as fault:
        return _holder_text(path) if fault.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    finally:
        os.close(handle)
    return None


def _holder_text(path: Path) -> str:
    try:
        return str(msgspec.json.decode(path.read_bytes(), type=Holder))
    except (OSError, msgspec.DecodeError):
        return "a process that has not written its name yet"
