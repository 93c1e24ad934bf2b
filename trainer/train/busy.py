"""Whether this process is doing anything at all, told from outside of what it does.

Loading, exporting, scoring and saving have no steps that could be counted, and may take as long as they need. But
whoever waits for a rank that never comes computes nothing, reads and writes nothing, and waits for no disk either. The
kernel knows: times of this process and its children (compilers), bytes it passed, threads in an uninterruptible wait.
What spins while it waits (the host of a GPU's queue) looks busy here; there NCCL's own timeout comes, later.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SHARE = 0.01
"""Of a core, over the time since the last look: a thread that sleeps and wakes up to look around uses less."""
BYTES = 1 << 16
"""Read or written since the last look; signs of life and logs are less."""
PROCESS = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class Used:
    """What a process has used since its start: ``cpu`` in seconds, ``passed`` in bytes read and written."""

    at: float
    cpu: float
    passed: int


class Busy:
    """Asked again and again by one thread, whose own time does not count.

    Args:
        used: what the process has used so far; None: nobody knows on this system, which counts as busy.
        waits_for_disk: whether a thread is in an uninterruptible wait now.
    """

    def __init__(
        self, used: Callable[[], Used | None] | None = None, waits_for_disk: Callable[[], bool] | None = None
    ) -> None:
        self._used, self._waits_for_disk = used or used_so_far, waits_for_disk or waits_for_disk_now
        self._before = self._used()

    def since_last(self) -> bool:
        """Whether the process did anything since the last call."""
        now, before = self._used(), self._before
        self._before = now
        if now is None or before is None:
            return True
        worked = now.cpu - before.cpu > SHARE * (now.at - before.at)
        return worked or now.passed - before.passed > BYTES or self._waits_for_disk()


def used_so_far() -> Used | None:
    """Of this process with its children, less the calling thread; None where the system does not tell."""
    try:
        lines = (PROCESS / "io").read_text("ascii").split()
    except OSError:
        return None
    passed = sum(
        int(value) for name, value in zip(lines[::2], lines[1::2], strict=True) if name in ("rchar:", "wchar:")
    )
    cpu = time.process_time() - time.thread_time()
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                times = child.cpu_times()
                cpu += times.user + times.system
    return Used(time.monotonic(), cpu, passed)


def waits_for_disk_now() -> bool:
    """Whether a thread of this process is in an uninterruptible wait ("D")."""
    for task in (PROCESS / "task").iterdir():
        with suppress(OSError):
            if (task / "stat").read_text("utf-8").rpartition(") ")[2].startswith("D"):
                return True
    return False
