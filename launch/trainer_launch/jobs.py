"""What Slurm says about jobs, as values, and what follows from it when a start of a job has ended. Nothing is called.

scontrol and squeue show COMPLETING while a job's processes are still ending, whatever ended it: cancelled, requeued or
finished. The count of restarts tells the requeued one apart; what neither runs nor was requeued, somebody has ended.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

DONE = 0
AGAIN = (75, 74, 128 + 1, 128 + 9, 128 + 10, 128 + 15)
"""Stopped in good order, something outside failed, SIGHUP, SIGUSR1 or SIGTERM came before anybody listened (x86 and Arm
numbers), or a process was killed (by a person, or by the kernel for its memory): the same command goes on."""
NEEDS_PERSON = 76
OVER = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "LAUNCH_FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "RECONFIG_FAIL",
        "REVOKED",
        "TIMEOUT",
    }
)
"""States of a job that will not start again by itself."""
CAN_GO_ON = frozenset({"BOOT_FAIL", "CANCELLED", "LAUNCH_FAILED", "NODE_FAIL", "PREEMPTED", "TIMEOUT"})
"""Those of them in which the run did nothing wrong. Accounting has no exit code of a cancelled job, and has one as
cancelled that the controller lost."""
LOST_REPLY = re.compile(
    r"timed? ?out|unable to contact|connection (refused|reset)|transport|communication|zero bytes"
    r"|temporarily|try again|backup controller|send/recv",
    re.IGNORECASE,
)
"""Errors of sbatch after which the controller may have the job all the same."""
_FIELD = re.compile(r"(?:^| )(JobId|JobState|Reason|Restarts|ExitCode|EndTime|TimeLimit)=(\S*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the controller knows it. ``end``: when its time is over, in seconds since 1970; None: no limit known.

    ``exit_code``, ``signal``: of its last start that has ended; None: not told.
    """

    id: int
    state: str
    reason: str = ""
    restarts: int = 0
    exit_code: int | None = None
    signal: int | None = None
    end: float | None = None
    comment: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it will not start again by itself."""
        return self.state in OVER

    @property
    def is_held(self) -> bool:
        """Whether it waits until a person releases it."""
        held = ("JobHeld", "job_requeued_in_held_state", "job requeued in held state")
        return self.state in ("REQUEUE_HOLD", "SPECIAL_EXIT") or self.reason.startswith(held)

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason not in ("", "None") else ""
        return f"job {self.id}: {self.state}{reason}"


def parse_show(text: str) -> Job | None:
    """A job out of ``scontrol show job -o``; None: it is not that."""
    fields = dict(reversed(_FIELD.findall(text)))  # the first of a name counts: values may hold anything
    if not fields.get("JobId", "").isdecimal() or "JobState" not in fields:
        return None
    code, _, number = fields.get("ExitCode", "").partition(":")
    return Job(
        id=int(fields["JobId"]),
        state=fields["JobState"],
        reason=fields.get("Reason", ""),
        restarts=_number(fields.get("Restarts", "")) or 0,
        exit_code=_number(code),
        signal=_number(number),
        end=None if fields.get("TimeLimit") == "UNLIMITED" else _seconds(fields.get("EndTime", "")),
    )


def parse_queue(text: str) -> list[Job]:
    """The jobs in lines of ``squeue -o '%A|%T|%r|%k'``, the oldest first."""
    rows = [line.split("|", 3) for line in text.splitlines() if line.count("|") >= 3]
    jobs = [
        Job(id=int(number), state=state, reason=reason, comment=comment)
        for number, state, reason, comment in rows
        if number.isdecimal()
    ]
    return sorted(jobs, key=lambda job: job.id)


def parse_accounting(text: str) -> list[Job]:
    """The jobs in lines of ``sacct -X -P -n -o JobIDRaw,State,ExitCode,Comment``, the oldest first."""
    jobs: list[Job] = []
    for number, state, end, comment in (line.split("|", 3) for line in text.splitlines() if line.count("|") >= 3):
        code, _, by = end.partition(":")
        if number.isdecimal() and state:
            name, _, who = state.partition(" ")  # "CANCELLED by 1000"
            job = Job(
                id=int(number),
                state=name,
                reason=who,
                exit_code=_number(code),
                signal=_number(by),
                comment=comment,
            )
            jobs.append(job)
    return sorted(jobs, key=lambda job: job.id)


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _seconds(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None  # "Unknown"


class Next(Enum):
    """What is done with a job when a start of it has ended."""

    NOTHING = "nothing"
    REQUEUE = "requeue"
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows, why in words, and the exit code of the batch step."""

    next: Next
    why: str
    code: int


def decide(code: int, job: Job | None, *, restarts: int, stalls: int, max_stalls: int) -> Decision:
    """Decide what follows on a start that ended with ``code``.

    ``job``: as the controller has it now, None when it does not answer, or does not know it. ``restarts``: of this
    start. ``stalls``: starts in a row, this one included, that left no new checkpoint and no finished stage.
    """
    if code == DONE:
        return Decision(Next.NOTHING, "finished", DONE)
    if job is None:
        return Decision(Next.NOTHING, "the controller does not say how the job stands, so nothing is asked of it", code)
    if job.restarts > restarts:
        return Decision(Next.NOTHING, "Slurm has requeued the job already", code)
    if job.state != "RUNNING":
        return Decision(Next.NOTHING, f"the job was ended from outside ({job.state}); it is not requeued", code)
    if code in AGAIN and stalls >= max_stalls:
        why = f"{stalls} starts in a row brought no new checkpoint and finished no stage (launch.max_stalls)"
        return Decision(Next.HOLD, why, NEEDS_PERSON)
    if code in AGAIN:
        return Decision(Next.REQUEUE, "stopped before the end; the next start goes on from there", code)
    if code == NEEDS_PERSON:
        return Decision(Next.HOLD, "a person has to look", NEEDS_PERSON)
    return Decision(Next.NOTHING, f"failed with exit code {code}; it would fail again", code)


def end_code(job: Job) -> int:
    """What a job that is over stands for as an exit code: its own, else 75 where the run may go on, else 1."""
    if job.state == "COMPLETED":
        return DONE
    if job.exit_code:
        return job.exit_code
    if job.state in CAN_GO_ON:
        return AGAIN[0]
    return 128 + job.signal if job.signal else 1


def same_run(jobs: Sequence[Job], comment: str) -> list[Job]:
    """Those of ``jobs``, which have one name, that belong to the run with this comment.

    Accounting may have kept no comments; then the name has to do.
    """
    return [job for job in jobs if job.comment in ("", "(null)", comment)]
