"""The Slurm job of a run: how it is called, where it is noted, and what the controller says of it."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from trainer.drive.progress import last_end
from trainer.paths import RunFolder, write_atomic
from trainer.plan import RunPlan
from trainer_launch import slurm
from trainer_launch.jobs import Job, same_run
from trainer_launch.slurm import SlurmError

COMMENT = "trimtab "


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """``launch/job.json``. ``submitted``: seconds since 1970; ``log``: the job's output; ``verb``: what it does."""

    job: int
    name: str
    submitted: float
    log: str
    verb: str


def job_name(plan: RunPlan) -> str:
    """What the job of a run is called: the run's name and identity."""
    return f"{plan.name}-{plan.identity}"


def job_comment(folder: RunFolder) -> str:
    """What tells apart the jobs of two run folders of one identity."""
    return f"{COMMENT}{folder.root}"


def log_path(folder: RunFolder) -> Path:
    """Where all jobs of the run write, one after the other."""
    return folder.logs / "slurm.log"


def live_job(name: str, comment: str) -> Job | None:
    """The oldest job of this run that is queued or runs; None: there is none.

    Raises:
        SlurmError: the controller does not answer.
    """
    return next((job for job in same_run(slurm.queued(name), comment) if not job.is_over), None)


def read_submission(folder: RunFolder) -> Submission | None:
    """The job that was submitted last; None: none was."""
    try:
        return msgspec.json.decode(folder.job_json.read_bytes(), type=Submission)
    except (OSError, msgspec.DecodeError):
        return None


def write_submission(folder: RunFolder, submission: Submission) -> None:
    """Note a job."""
    write_atomic(folder.job_json, msgspec.json.format(msgspec.json.encode(submission), indent=1) + b"\n")


def job_lines(folder: RunFolder) -> list[str]:
    """How the run's Slurm job stands, for people; empty where none was ever submitted."""
    submission = read_submission(folder)
    if submission is None:
        return []
    try:
        job = slurm.show(submission.job)
    except SlurmError as fault:
        last = last_end(folder, submission.job)
        own = [] if last is None else [f"  its last start ended with {last.ended}: {last.why}"]
        return [f"Slurm job {submission.job}: unknown ({fault})", *own]
    lines = [f"Slurm {job}, started {job.restarts + 1} times" if job.restarts else f"Slurm {job}"]
    if job.is_held:
        lines.append(f"  it waits for a person: scontrol release {job.id} starts it again, scancel {job.id} ends it")
    return lines
