"""The stages of a run: which are still to be done, and the processes that do them, one after the other.

A stage is done when its marker names the digest of its present inputs (``markers.py``). ``prepare``, ``verify`` and
``card`` are one process each; ``baseline``, ``train``, ``evaluate`` and ``export`` are done by the ranks in one go. A
process that ends well without leaving its markers is an error: nothing is taken as done on trust.
"""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from trainer import console
from trainer.drive.folder import write_inputs
from trainer.drive.prepared import is_still_there, on_disk, read_prepared, settled
from trainer.drive.space import bytes_needed, model_width, require_space, trained_parameters, weight_bytes
from trainer.drive.spending import spending
from trainer.drive.trial import note_stop
from trainer.errors import EXIT_AGAIN, EXIT_DONE, EXIT_STOPPED, EXIT_USER, TrainingFault
from trainer.markers import BY_RANKS, STAGES, Marker, is_current, write_marker
from trainer.paths import RunFolder, write_atomic
from trainer.plan import RunPlan, estimate_memory, layout_of, stage_inputs
from trainer_launch.chair import Chair
from trainer_launch.children import Child
from trainer_launch.command import THREADS
from trainer_launch.leash import can_leash
from trainer_launch.machines import parse_address
from trainer_launch.node import supervise
from trainer_launch.run import run, run_together, write_hand_files
from trainer_launch.spec import LaunchSpec
from trainer_launch.verdict import NodeResult

NEED_PREPARED = (*BY_RANKS, "verify")
TAIL_LINES = 15
KILLED = 128 + signal.SIGKILL
"""A rank was killed from outside: out of memory, a machine that goes down, a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """The module that does a stage, started as ``python -m MODULE RUN_DIR``; ``ranks`` gets ``--stages`` as well."""

    prepare: str = "trainer.prepare"
    ranks: str = "trainer.worker"
    verify: str = "trainer.export.verify"
    card: str = "trainer.export.card"


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverJob:
    """A run that this process holds the lock of (``lock``: its descriptor); ``command`` is what the user typed.

    ``chair``: the meeting with the other machines, for a run on several.
    """

    plan: RunPlan
    folder: RunFolder
    lock: int
    command: str
    programs: Programs
    chair: Chair | None = None


def pending(plan: RunPlan, folder: RunFolder, wanted: Sequence[str]) -> list[str]:
    """Those of ``wanted`` that are not done with their present inputs, in the order of a run.

    ``prepare`` is done again when another stage needs the tokens or the base model and they have gone from the cache.
    """
    todo = [stage for stage in STAGES if stage in wanted and not is_current(folder, stage, stage_inputs(plan, stage))]
    needs = any(stage in NEED_PREPARED for stage in todo)
    if needs and "prepare" in wanted and "prepare" not in todo and not is_still_there(folder):
        return ["prepare", *todo]
    return todo


def run_stages(job: DriverJob, wanted: Sequence[str]) -> int:
    """Do what is pending of ``wanted``; gives the exit code of the first process that did not end well, else 0.

    Raises:
        ConfigError: no layout fits into the memory.
        RunError: no space for what the ranks will write.
        TrainingFault: a process ended well without leaving its markers.
    """
    if "prepare" in pending(job.plan, job.folder, wanted):
        code = _run_alone(job, "prepare", job.programs.prepare)
        if code != EXIT_DONE:
            return code
    by_ranks = [stage for stage in pending(job.plan, job.folder, wanted) if stage in BY_RANKS]
    if by_ranks:
        job = _settle(job)
        _require_space_for(job, by_ranks)
        code = _run_by_ranks(job, by_ranks)
        if code != EXIT_DONE:
            return code
    if job.plan.config.export.nothing and "verify" in pending(job.plan, job.folder, wanted):
        _nothing_to_verify(job)
    for stage, module in (("verify", job.programs.verify), ("card", job.programs.card)):
        if stage in pending(job.plan, job.folder, wanted):
            code = _run_alone(job, stage, module)
            if code != EXIT_DONE:
                return code
    return EXIT_DONE


def _nothing_to_verify(job: DriverJob) -> None:
    """Mark ``verify`` as done where nothing is exported: a process that loads nothing takes seconds to say so."""
    console.say("verify: nothing was exported")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    inputs = stage_inputs(job.plan, "verify")
    write_marker(job.folder, Marker(stage="verify", inputs=inputs, seconds=0.0, finished=now))


def mark_done(folder: RunFolder, identity: str) -> None:
    """Write DONE: every stage is finished."""
    write_atomic(folder.done, f"{identity} {datetime.now(UTC).isoformat(timespec='seconds')}\n")


def launch_spec(plan: RunPlan, programs: Programs, stages: Sequence[str], *, node: int = 0) -> LaunchSpec:
    """What the agent of ``node`` starts for ``stages``."""
    spec = LaunchSpec(
        run_dir=plan.run_dir,
        module=programs.ranks,
        arguments=(plan.run_dir, "--stages", ",".join(stages)),
        processes=plan.processes,
        threads=plan.threads,
        python=sys.executable,
    )
    meeting = parse_address(plan.config.launch.address or "")
    if plan.nodes == 1 or meeting is None:
        return spec
    return replace(spec, nodes=plan.nodes, node_rank=node, master_addr=meeting.host, master_port=meeting.port)


def _run_alone(job: DriverJob, stage: str, module: str) -> int:
    child = Child(
        name=stage,
        arguments=(sys.executable, "-m", module, str(job.folder.root)),
        variables={"PYTHONUNBUFFERED": "1", **THREADS},
        log=job.folder.logs / f"{stage}.log",
        shown=True,
    )
    with console.Relay() as show, spending(job.folder, stage):
        result = supervise([child], show, keep_open=(job.lock,), peers=job.chair)
    return _judge(job, result, [stage])


def _run_by_ranks(job: DriverJob, stages: list[str]) -> int:
    spec = launch_spec(job.plan, job.programs, stages)
    by_hand = job.folder.launch / "by_hand.txt"
    lines = write_hand_files(spec, job.folder.launch, device=job.plan.device)
    by_hand.write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.note(f"{spec.world_size} rank(s) on {job.plan.device}: {', '.join(stages)}")
    console.note(f"the same ranks by hand, with torchrun or accelerate: the lines are in {by_hand}")
    if not can_leash():
        console.warn("on this system the ranks go on by themselves should this process be killed with SIGKILL")
    with console.Relay() as show:
        if job.chair is not None:
            result = run_together(spec, job.chair, show, keep_open=(job.lock,))
        else:
            result = run(spec, show, keep_open=(job.lock,))
    return _judge(job, result, stages)


def _judge(job: DriverJob, result: NodeResult, stages: Sequence[str]) -> int:
    killed = result.exit_code == KILLED and not set(stages).isdisjoint(BY_RANKS)
    if job.chair is not None:
        job.chair.ends_with(EXIT_AGAIN if killed else result.exit_code, result.cause)
    if result.exit_code == EXIT_DONE:
        _require_markers(job, stages)
        return EXIT_DONE
    note_stop(result.signal)
    if result.exit_code == EXIT_STOPPED:
        console.say(f"{result.cause}. Nothing is lost; to continue, type:\n  {job.command}")
        return EXIT_STOPPED
    if result.exit_code == EXIT_AGAIN or killed:
        console.error(result.cause)
        console.say(f"what was saved is intact; to continue, type:\n  {job.command}")
        return EXIT_STOPPED
    if result.shown and result.exit_code == EXIT_USER:
        return EXIT_USER  # the process has said what is wrong and what to do
    if result.log and not result.shown:
        for line in _tail(Path(result.log)):
            console.note(f"  | {line}")
    console.error(result.cause)
    return result.exit_code


def _require_markers(job: DriverJob, stages: Sequence[str]) -> None:
    missing = pending(job.plan, job.folder, stages)
    if missing:
        raise TrainingFault(
            "a process ended well without finishing its work",
            where=str(job.folder.stages),
            got=f"no current marker of: {', '.join(missing)}",
            allowed="a marker of every finished stage",
            do=f"look into {job.folder.logs} and report it: this is a defect of the program",
        )


def _settle(job: DriverJob) -> DriverJob:
    """Choose the layout for the model that is on disk now, and tell the ranks if it is another one than planned."""
    plan = settled(job.plan, read_prepared(job.folder))
    if plan == job.plan:
        return job
    write_inputs(job.folder, plan)
    if layout_of(plan) != layout_of(job.plan):
        console.note(f"layout: {layout_of(plan).label}")
    return replace(job, plan=plan)


def _require_space_for(job: DriverJob, stages: Sequence[str]) -> None:
    prepared = read_prepared(job.folder)
    config = job.plan.config
    base = Path(prepared.base.directory)
    memory = estimate_memory(on_disk(job.plan, prepared), prepared.dtype)
    lora_rank = config.method.rank if config.method.name == "lora" else None
    guessed = trained_parameters(prepared.base.parameters, rank=lora_rank, width=model_width(base))
    need = bytes_needed(
        weight_bytes=weight_bytes(base),
        trainable=guessed if memory is None else memory.trainable,
        keep=config.checkpoint.keep,
        trains="train" in stages,
        exports_adapter="export" in stages
        and config.method.name == "lora"
        and (config.export.adapter or config.export.merged),
        exports_merged="export" in stages and config.export.merged,
    )
    require_space(job.folder.root, need)


def _tail(log: Path) -> list[str]:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-TAIL_LINES:]
