"""Stops a run in good order before somebody else stops it: at the end of its own time, or of its Slurm job's.

At that moment this process sends itself SIGUSR1, which does what it always does: the ranks vote, save and end with 75.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer import console
from trainer_launch import slurm
from trainer_launch.slurm import SlurmError


def seconds_left(limit: float | None, job_end: float | None, now: float, *, grace: float) -> float | None:
    """Seconds until the stop; None: there is no limit.

    ``limit``: of this start, in seconds. ``job_end`` and ``now``: in seconds since 1970. ``grace`` is left before the
    end of a job, or half of what is left when that is less.
    """
    of_job = None if job_end is None else max(job_end - now - grace, (job_end - now) / 2, 0.0)
    given = [seconds for seconds in (limit, of_job) if seconds is not None]
    return min(given, default=None)


def end_of_job() -> float | None:
    """When the Slurm job of this process ends, in seconds since 1970; None: never, there is none, or nobody knows."""
    here = slurm.allocation()
    if here is None:
        return None
    try:
        return slurm.controlled(here.name).end
    except SlurmError:
        return None  # in a container without Slurm's commands; the job's own signal stops it there


def _stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


@contextmanager
def stopping_in_time(
    limit: float | None,
    *,
    grace: float,
    end_of_job: Callable[[], float | None] = end_of_job,
    stop: Callable[[], None] = _stop_this_process,
) -> Iterator[None]:
    """Stop this process in good order when ``limit`` seconds are over, or ``grace`` seconds before its job ends.

    The controller is asked by a thread: it may be slow, and nobody waits for it.
    """
    over = threading.Event()

    def watch() -> None:
        began = time.monotonic()
        left = seconds_left(limit, end_of_job(), time.time(), grace=grace)
        if left is None or over.wait(left - (time.monotonic() - began if left == limit else 0.0)):
            return
        console.note("the time of this start is over")
        stop()

    thread = threading.Thread(target=watch, name="deadline", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
