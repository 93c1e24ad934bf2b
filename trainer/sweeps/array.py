"""``sweep.engine=wandb launch=slurm``: the trials of a registered sweep as one Slurm array, a task for each.

The settings of ``launch`` are those of a task then. A trial is started inside its task, on the machine that it has, so
of these it keeps what is true there: how many ranks, on what, with how many threads.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import msgspec

from trainer.config import Config
from trainer.config.launch import LaunchConfig
from trainer.drive.submit import site_spec
from trainer.drive.trial import SWEEPS
from trainer.errors import ConfigError, Problem, RunError
from trainer.paths import shipped_slurm, write_atomic
from trainer.sweeps.registration import Registered
from trainer_launch import slurm
from trainer_launch.batch_script import BatchSpec, batch_script
from trainer_launch.slurm import SlurmError

OF_A_TRIAL = ("processes", "device", "threads", "grace", "gpu_memory_gb", "meet_seconds")
NOT_FOR_TRIALS = ("container", "python", "srun", "wait")


def words_in_a_task(overrides: Sequence[str], launch: LaunchConfig) -> list[str]:
    """``overrides`` for a trial inside a task: launched on the spot, with what ``launch`` says of its ranks."""
    others = [word for word in overrides if word.lstrip("+~").partition("=")[0].partition(".")[0] != "launch"]
    plain = LaunchConfig()
    said = {name: (msgspec.to_builtins(launch)[name], msgspec.to_builtins(plain)[name]) for name in OF_A_TRIAL}
    return [*others, *(f"launch.{name}={value}" for name, (value, default) in said.items() if value != default)]


def require_array_can(launch: LaunchConfig, trials: int | None) -> None:
    """Refuse what a task of an array cannot do.

    Raises:
        ConfigError: a trial on several machines or in a container, or nobody says how many trials.
    """
    found: list[Problem] = []
    if launch.nodes not in (None, 1):
        found.append(
            Problem(
                what="a trial of an array is on one machine",
                where="launch.nodes",
                got=str(launch.nodes),
                allowed="1",
                do="more GPUs on a machine: launch.gres=gpu:8",
            )
        )
    changed = {field.name for field in fields(launch) if msgspec.to_builtins(launch)[field.name]}
    found += [
        Problem(
            what="has no effect on the tasks of a sweep",
            where=f"launch.{name}",
            got=str(msgspec.to_builtins(launch)[name]),
            do="leave it out; a batch script of your own can do it (slurm/sweep.sbatch)",
        )
        for name in NOT_FOR_TRIALS
        if name in changed
    ]
    if trials is None:
        do = "sweep.trials=16, or run_cap in the sweep's file"
        found.append(Problem(what="must be given: an array has a number of tasks", where="sweep.trials", do=do))
    if found:
        raise ConfigError.of(found)


def require_slurm() -> None:
    """Refuse an array where no job can be submitted, before the sweep is registered.

    Raises:
        RunError: there is no sbatch.
    """
    if not slurm.is_here():
        raise RunError(
            "this machine submits no Slurm jobs",
            where="launch.name",
            got="slurm, and no sbatch on the PATH",
            do="log in on a machine that has it; or launch=local, and start agents where you want",
        )


def array_spec(config: Config, registered: Registered, trials: int, at_once: int | None, cwd: Path) -> BatchSpec:
    """The array of a sweep; its logs are in outputs/sweeps/wandb/ID/logs."""
    spec = site_spec(
        config.launch,
        name=f"sweep-{registered.id}",
        comment=f"trimtab sweep {registered.sweep}",
        log=str(cwd / SWEEPS / registered.id / "logs" / "task"),
        folder=str(cwd),
        words=(sys.executable, "-m", "trainer", "agent", registered.sweep),
        nodes=1,
    )
    return replace(spec, array=f"1-{trials}" + ("" if at_once is None else f"%{at_once}"))


def submit_array(spec: BatchSpec) -> int:
    """Write the script beside the logs and submit it, once; gives the number of the array.

    Raises:
        RunError: sbatch refused, or its reply was lost; the sweep is registered all the same.
    """
    logs = Path(spec.log).parent
    logs.mkdir(parents=True, exist_ok=True)
    script = logs.parent / "array.sbatch"
    write_atomic(script, batch_script(spec, (shipped_slurm() / "job.sbatch").read_text(encoding="utf-8")))
    try:
        return slurm.submit(script)
    except SlurmError as fault:
        raise RunError(
            "sbatch refused the array, or its reply was lost; the sweep is registered",
            where="launch",
            got=str(fault),
            allowed="what the cluster has (sinfo, sacctmgr show assoc user=$USER)",
            do=f"look into squeue; if there is no array, mend {script} and type: sbatch {script}",
        ) from None
