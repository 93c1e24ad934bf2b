"""From what a Slurm job needs to the exact words: the batch script, the step in it, where its machines meet.

Pure functions, like ``command``. What they return is recorded in ``tests/golden/launch`` and compared word by word.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

OWN_OPTIONS = (
    "job-name",
    "comment",
    "output",
    "error",
    "open-mode",
    "requeue",
    "no-requeue",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "signal",
    "time",
    "account",
    "partition",
    "qos",
    "constraint",
    "gres",
    "cpus-per-task",
    "mem",
    "array",
    "wrap",
    "parsable",
    "wait",
    "hold",
    "test-only",
)
"""Options of sbatch that have a key of their own, or that the submission depends on."""
FIRST_PORT, PORTS = 15_000, 15_000
"""Below what systems give to outgoing connections, which begins at 32768."""
_MARK = re.compile(r"@([A-Z]+)@")
_GPUS = re.compile(r"(?:gres[:/])?gpu(?::[A-Za-z_][\w.\-]*)?(?::(\d+))?(?:\(.*\))?")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_PLAIN = re.compile(r"[\w@%+=:,./\-\[\]&|*()]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSpec:
    """A Slurm job. None: the cluster decides.

    ``comment`` tells jobs of one name apart. ``log``: a file; ``folder``: where ``words``, the program of the batch
    step, is started after the shell lines ``prolog``. ``time``, ``mem`` and the others are as sbatch takes them;
    ``grace``: seconds before the time limit at which the processes of the step get SIGUSR1. ``options``: further
    options of sbatch. ``array``: the numbers of the tasks (``1-16%4``); each has a log of its own, LOG-JOB_TASK.log.
    """

    name: str
    comment: str
    log: str
    folder: str
    words: tuple[str, ...]
    nodes: int
    grace: int
    time: str | None = None
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    cpus: int | None = None
    mem: str | None = None
    options: tuple[str, ...] = ()
    prolog: tuple[str, ...] = ()
    array: str | None = None


def batch_script(spec: BatchSpec, template: str) -> str:
    """The text of ``job.sbatch``.

    Raises:
        ValueError: the template has a mark that is not known, or lacks one.
    """
    parts = {
        "OPTIONS": "\n".join(f"#SBATCH {option}" for option in sbatch_options(spec)),
        "PROLOG": "\n".join(spec.prolog),
        "FOLDER": shlex.quote(spec.folder),
        "WORDS": shlex.join(spec.words),
    }
    found = set(_MARK.findall(template))
    if found != set(parts):
        raise ValueError(f"the template has {sorted(found)}, and needs {sorted(parts)}")
    return _MARK.sub(lambda mark: parts[mark.group(1)], template)


def sbatch_options(spec: BatchSpec) -> list[str]:
    """The options of sbatch, each as one word.

    The signal goes to the processes of the step and not to the batch shell, which learns from the step's end. A job
    that is requeued goes on in the same log.
    """
    given: list[tuple[str, str | int | None]] = [
        ("job-name", spec.name),
        ("comment", spec.comment),
        ("array", spec.array),
        ("account", spec.account),
        ("partition", spec.partition),
        ("qos", spec.qos),
        ("constraint", spec.constraint),
        ("nodes", spec.nodes),
        ("ntasks-per-node", 1),
        ("gres", spec.gres),
        ("cpus-per-task", spec.cpus),
        ("mem", spec.mem),
        ("time", spec.time),
        ("signal", f"USR1@{spec.grace}"),  # a partition may have a limit, too
        ("output", spec.log.replace("%", "%%") + ("" if spec.array is None else "-%A_%a.log")),
        ("open-mode", "append"),
    ]
    options = [f"--{name}={_quoted(str(value))}" for name, value in given if value is not None]
    return [*options, "--requeue", *spec.options]


def _quoted(value: str) -> str:
    """``value`` as one word of a #SBATCH line, which knows quotes and backslashes, and comments."""
    if _PLAIN.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def step_words(
    agent: Sequence[str], *, nodes: int, cpus: int | None = None, options: Sequence[str] = ()
) -> tuple[str, ...]:
    """What runs ``agent`` once on every machine of the job, with its ``--node-rank``."""
    with_number = ("bash", "-c", 'exec "$@" --node-rank "$SLURM_NODEID"', "agent", *agent)
    return (*srun_words(nodes=nodes, cpus=cpus, options=options), *with_number)


def srun_words(*, nodes: int, cpus: int | None = None, options: Sequence[str] = ()) -> tuple[str, ...]:
    """What stands before a command that runs once on every machine of the job.

    No task is ended because another one ended badly or earlier: the agents see to that, after a checkpoint.
    """
    of_cpus = () if cpus is None else (f"--cpus-per-task={cpus}",)  # srun does not take it over from the job
    return (
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        *of_cpus,
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--input=none",
        *options,
    )


def meeting_port(job: int, restarts: int) -> int:
    """The port at which the agents of a job meet: another one for every job on a machine, and for every start of it."""
    return FIRST_PORT + (job * 7 + restarts) % PORTS


def gpus_in(gres: str | None) -> int:
    """GPUs on a machine that ``gres`` asks for: ``gpu``, ``gpu:4``, ``gpu:a100:4``, among others after commas."""
    found = [_GPUS.fullmatch(part) for part in re.split(r",(?![^(]*\))", gres or "")]
    return sum(int(match.group(1) or 1) for match in found if match is not None)


def limit_seconds(time: str) -> int | None:
    """Seconds of a time limit as sbatch takes it; None: it is none, or has none (``UNLIMITED``)."""
    match = _TIME.fullmatch(time.strip())
    if match is None:
        return None
    days, first = int(match["days"] or 0), int(match["first"])
    second, third = int(match["second"] or 0), int(match["third"] or 0)
    if match["days"] is not None or match["third"] is not None:  # days-hours[:minutes[:seconds]], hours:minutes:seconds
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second


def option_name(option: str) -> str:
    """``reservation`` of ``--reservation=me``; "" for what is no long option."""
    match = re.match(r"--([a-z][a-z\-]*)(?:=|$)", option)
    return match.group(1) if match else ""


def follow_lines(job: int, log: str, *, array: bool = False) -> list[tuple[str, str]]:
    """How to look at a job and how to end it: what the line is for, and the line. ``log``: as in ``BatchSpec``."""
    logs = f"{shlex.quote(log)}-{job}_*.log" if array else shlex.quote(log)
    return [
        ("state", f"squeue -j {job}"),
        ("output", f"tail -F {logs}"),
        ("end it", f"scancel {job}"),
    ]
