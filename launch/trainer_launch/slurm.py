"""The commands of Slurm: asked with a limit of time, because a controller that restarts does not answer for a while."""

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainer_launch.jobs import LOST_REPLY, Job, parse_accounting, parse_queue, parse_show

T = TypeVar("T")
SECONDS = 60.0
"""One call; Slurm itself gives up after ``MessageTimeout``, which is 10 s unless the site says otherwise."""
QUEUE_FORMAT = "%A|%T|%r|%k"
ACCOUNTING_FORMAT = "JobIDRaw,State,ExitCode,Comment"


class SlurmError(Exception):
    """A command of Slurm failed: its own words."""


class NoAnswer(SlurmError):
    """The controller did not answer; it may have done what it was asked all the same."""


class Unknown(SlurmError):
    """The controller does not know the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The job that this process is in. ``restarts``: how often it was requeued before this start.

    ``name``: what the controller is asked for: the number, or ``ARRAY_TASK`` for a task of an array. One task of an
    array has the number of the whole array, and with that all of its tasks would be requeued, held or signalled.
    """

    job: int
    restarts: int
    nodes: int
    node_list: str
    cpus: int | None
    name: str


def allocation() -> Allocation | None:
    """What Slurm's variables say; None: this process is in no job."""
    told = os.environ.get  # noqa: TID251
    number = told("SLURM_JOB_ID", "")
    if not number.isdecimal():
        return None
    cpus = told("SLURM_CPUS_PER_TASK", "")
    array, task = told("SLURM_ARRAY_JOB_ID", ""), told("SLURM_ARRAY_TASK_ID", "")
    return Allocation(
        job=int(number),
        restarts=int(told("SLURM_RESTART_COUNT", "0")),
        nodes=int(told("SLURM_JOB_NUM_NODES", told("SLURM_NNODES", "1"))),
        node_list=told("SLURM_JOB_NODELIST", ""),
        cpus=int(cpus) if cpus.isdecimal() else None,
        name=f"{array}_{task}" if array.isdecimal() and task.isdecimal() else number,
    )


def is_here() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def submit(script: Path) -> int:
    """Submit a batch script; gives the job's number.

    Raises:
        NoAnswer: the reply was lost; there may be a job.
        SlurmError: refused; there is no job.
    """
    said = _call("sbatch", "--parsable", str(script))
    number = said.strip().splitlines()[-1].partition(";")[0] if said.strip() else ""  # "12;cluster"
    if not number.isdecimal():
        raise NoAnswer(f"sbatch said {said.strip()!r}, and no number of a job")
    return int(number)


def controlled(job: int | str) -> Job:
    """The job (a number, or ``ARRAY_TASK``) as the controller has it, which alone can requeue or signal it.

    Raises:
        Unknown: it does not know it: jobs that are over are forgotten after ``MinJobAge``, 300 s unless the site says
            otherwise.
        SlurmError: there is no answer.
    """
    try:
        found = parse_show(_call("scontrol", "show", "job", "-o", str(job)))
    except SlurmError as fault:
        if "invalid job id" not in str(fault).lower():
            raise
        found = None
    if found is None:
        raise Unknown(f"the controller does not know job {job}")
    return found


def show(job: int | str) -> Job:
    """The job as the controller has it, or else as accounting says that it ended.

    Raises:
        Unknown: the controller does not know it (any more), so it is over, and accounting does not say how.
        SlurmError: there is no answer.
    """
    try:
        return controlled(job)
    except Unknown as fault:
        found = next(iter(_accounting("-j", str(job))), None)
        if found is None:
            raise Unknown(f"{fault}, and accounting says nothing of it") from None
        if not found.is_over:  # it was lost by the controller, or accounting was not told its end
            raise Unknown(f"{fault}, and accounting has it as {found.state} still") from None
        return found


def name_and_comment(job: int) -> tuple[str, str]:
    """What a job of this user is called, and its comment.

    Raises:
        SlurmError: there is no answer.
    """
    name, _, comment = _call("squeue", "--noheader", f"--jobs={job}", "--format=%j|%k").strip().partition("|")
    return name, comment


def queued(name: str) -> list[Job]:
    """This user's jobs of that name that the controller still has, ended ones too, the oldest first.

    Raises:
        SlurmError: there is no answer.
    """
    words = ("--noheader", f"--user={getpass.getuser()}", "--states=all", f"--name={name}", f"--format={QUEUE_FORMAT}")
    return parse_queue(_call("squeue", *words))


def recorded(name: str, since: float) -> list[Job]:
    """This user's jobs of that name since a time (in seconds since 1970) in accounting, where the site has one."""
    began = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))
    return _accounting(f"--name={name}", f"--user={getpass.getuser()}", f"--starttime={began}")


def _accounting(*words: str) -> list[Job]:
    try:
        return parse_accounting(_call("sacct", "-X", "-P", "-n", "-o", ACCOUNTING_FORMAT, *words))
    except SlurmError:
        return []  # many sites have none


def hosts(node_list: str) -> list[str]:
    """The machines of ``n[1-2,7]``, in the order of their SLURM_NODEID.

    Raises:
        SlurmError: there is no answer.
    """
    return _call("scontrol", "show", "hostnames", node_list).split()


def requeue(job: int | str) -> None:
    """Requeue a job: it is ended and starts again. The process that asks ends with it.

    Raises:
        SlurmError: refused, or no answer.
    """
    _call("scontrol", "requeue", str(job))


def hold(job: int | str) -> None:
    """Requeue a job so that it waits until a person releases it.

    Raises:
        SlurmError: refused, or no answer.
    """
    _call("scontrol", "requeuehold", str(job))


def signal_steps(job: int | str, name: str) -> None:
    """Send a signal to all processes of the job's steps, and not to its batch shell.

    Raises:
        SlurmError: refused, or no answer.
    """
    _call("scancel", f"--signal={name}", str(job))


def persistently(call: Callable[[], T], *, tries: int, pause: float) -> T:
    """``call``, again after ``pause`` seconds as long as there is no answer, ``tries`` times at most.

    Raises:
        SlurmError: of the last try, or at once what is an answer.
    """
    for left in range(tries - 1, -1, -1):
        try:
            return call()
        except NoAnswer:
            if not left:
                raise
            time.sleep(pause)
    raise AssertionError("the last try returns")


def _call(*words: str) -> str:
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except FileNotFoundError:
        raise SlurmError(f"there is no {words[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{words[0]} did not end within {SECONDS:.0f} s") from None
    said = _own_words(done.stderr.splitlines(), words[0])
    if done.returncode != 0:
        kind = NoAnswer if done.returncode < 0 or LOST_REPLY.search(said) else SlurmError
        raise kind(said or f"{words[0]} ended with {done.returncode}")
    return done.stdout


def _own_words(lines: Sequence[str], tool: str) -> str:
    return "; ".join(line.removeprefix(f"{tool}: ").removeprefix("error: ").strip() for line in lines if line.strip())
