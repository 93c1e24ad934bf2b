"""launch.wait=true: show what a job prints until it is over, and end with its exit code."""

import time
from pathlib import Path

from trainer import console
from trainer.drive.progress import last_end, read_starts
from trainer.drive.queue import log_path
from trainer.errors import EXIT_NEEDS_PERSON, EXIT_STOPPED
from trainer.paths import RunFolder
from trainer_launch import slurm
from trainer_launch.jobs import Job, end_code
from trainer_launch.slurm import NoAnswer, SlurmError, Unknown

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 15.0
"""Seconds between questions; controllers have many who ask."""


class Tail:
    """What is added to a file from now on, in whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = path.stat().st_size if path.exists() else 0

    def lines(self) -> list[str]:
        """The lines since the last call."""
        try:
            with self._path.open("rb") as handle:
                handle.seek(self._at)
                raw = handle.read()
        except FileNotFoundError:
            return []
        whole = raw[: raw.rfind(b"\n") + 1]
        self._at += len(whole)
        return whole.decode("utf-8", errors="replace").splitlines()


def follow(job: int, folder: RunFolder) -> int:
    """Wait until the job is over or held, and give what it ended with. Ctrl-C ends the waiting, not the job."""
    tail, pause, said = Tail(log_path(folder)), FIRST_PAUSE, ""
    try:
        with console.Relay() as show:
            while True:
                state = _state(job)
                for line in tail.lines():
                    show(line)
                if state is None:
                    return _end_on_record(job, folder)
                if str(state) != said:
                    said = str(state)
                    console.note(said)
                code = _end(state, folder)
                if code is not None:
                    return code
                time.sleep(pause)
                pause = min(LONGEST_PAUSE, pause * 1.2)
    except KeyboardInterrupt:
        console.say(f"job {job} goes on: this only looked at it (scancel {job} ends it)")
        return EXIT_STOPPED


def _state(job: int) -> Job | None:
    """None: nobody knows the job any more."""
    try:
        return slurm.show(job)
    except Unknown:
        return None
    except NoAnswer as fault:
        return Job(id=job, state="UNKNOWN", reason=str(fault))
    except SlurmError as fault:
        return Job(id=job, state="UNKNOWN", reason=str(fault))


def _end_on_record(job: int, folder: RunFolder) -> int:
    """The exit code of a job that Slurm knows no more, as its last start has put it on record."""
    last = last_end(folder, job)
    if last is None or last.ended is None:
        console.error(f"Slurm knows nothing of job {job} any more; the same command submits the run again")
        return EXIT_STOPPED
    console.say(f"job {job}: Slurm does not know any more how it ended; its last start: {last.why}")
    return last.ended


def _end(job: Job, folder: RunFolder) -> int | None:
    """The exit code of a job that is over, or held by its own decision; None: it goes on."""
    starts = [start for start in read_starts(folder) if start.job == job.id]
    if job.is_over:
        console.say(f"{job}; {starts[-1].why}" if starts and starts[-1].why else str(job))
        return end_code(job)
    if job.is_held and starts and starts[-1].ended == EXIT_NEEDS_PERSON:
        console.error(f"job {job.id} is held: {starts[-1].why}")
        console.say(f"scontrol release {job.id} starts it again, scancel {job.id} ends it")
        return EXIT_NEEDS_PERSON
    return None
