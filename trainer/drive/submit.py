"""launch=slurm: put a run into the queue, once, and say how to follow it or follow it.

The same command may be typed at any time. A run that is finished needs no job; one that has a job gets no second one,
also when the reply to an earlier submission was lost: jobs are looked for by name and run folder, before and after.
"""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from trainer import console
from trainer.config import Config
from trainer.config.launch import LaunchConfig
from trainer.drive.environment import usable_cores
from trainer.drive.folder import make_folder, write_inputs
from trainer.drive.follow import follow
from trainer.drive.lock import hold
from trainer.drive.progress import write_starts
from trainer.drive.queue import (
    Submission,
    job_comment,
    job_name,
    live_job,
    log_path,
    read_submission,
    write_submission,
)
from trainer.errors import EXIT_DONE, EXIT_STOPPED, RunError
from trainer.paths import RunFolder, shipped_slurm, write_atomic
from trainer.plan import Devices, RunPlan
from trainer_launch import slurm
from trainer_launch.batch_script import BatchSpec, batch_script, follow_lines, gpus_in
from trainer_launch.jobs import Job, same_run
from trainer_launch.slurm import NoAnswer, SlurmError

TRIES = 3
PAUSE = 5.0
"""Seconds between questions to a controller that does not answer."""
LOOKS = 4
"""How often a job is looked for after the reply to its submission was lost."""
JOB = "trainer.drive.job"


def devices_of_job(config: Config) -> Devices:
    """What a machine of the job will have, as far as the config says; this machine need not have it."""
    launch = config.launch
    gpus = gpus_in(launch.gres)
    if launch.device == "cuda":
        gpus = max(gpus, launch.processes or 1)
    return Devices(
        gpus=0 if launch.device == "cpu" else gpus,
        cores=launch.cpus or usable_cores(),
        deepspeed=find_spec("deepspeed") is not None,
    )


def batch_spec(plan: RunPlan, folder: RunFolder, words: Sequence[str], cwd: Path) -> BatchSpec:
    """The job of a run; ``words`` is what its batch step runs."""
    return site_spec(
        plan.config.launch,
        name=job_name(plan),
        comment=job_comment(folder),
        log=str(log_path(folder)),
        folder=str(cwd),
        words=tuple(words),
        nodes=plan.nodes,
    )


def site_spec(
    launch: LaunchConfig, *, name: str, comment: str, log: str, folder: str, words: tuple[str, ...], nodes: int
) -> BatchSpec:
    """A job with what ``launch`` asks of the cluster: time, place, devices and shell lines."""
    return BatchSpec(
        name=name,
        comment=comment,
        log=log,
        folder=folder,
        words=words,
        nodes=nodes,
        grace=launch.grace,
        time=launch.time,
        account=launch.account,
        partition=launch.partition,
        qos=launch.qos,
        constraint=launch.constraint,
        gres=launch.gres,
        cpus=launch.cpus,
        mem=launch.mem,
        options=tuple(launch.options),
        prolog=tuple(launch.prolog),
    )


def submit_run(plan: RunPlan, verb: str, *, cwd: Path, check: Callable[[RunFolder], list[str]]) -> int:
    """Submit the run, unless it is finished or has a job; gives the exit code.

    ``check`` refuses a run folder that is another run's, and gives the stages that are left to do.

    Raises:
        RunError: there is no Slurm here, or sbatch refused; nothing of it is left.
    """
    if not slurm.is_here():
        raise RunError(
            "this machine submits no Slurm jobs",
            where="launch.name",
            got="slurm, and no sbatch on the PATH",
            allowed="a login node, or another machine with the commands of Slurm",
            do="log in there, or launch=local, or launch=torchrun",
        )
    folder = RunFolder(Path(plan.run_dir))
    try:
        job = slurm.persistently(lambda: live_job(job_name(plan), job_comment(folder)), tries=TRIES, pause=PAUSE)
    except SlurmError as fault:
        console.error(f"Slurm does not say which jobs there are, so nothing was submitted: {fault}")
        return EXIT_STOPPED
    if job is not None:
        console.say(f"run {plan.name}/{plan.identity} has a job, so nothing was submitted: {job}")
        if job.is_held:
            console.say(f"it waits for a person: scontrol release {job.id} starts it again, scancel {job.id} ends it")
    else:
        job = _submit_new(plan, folder, verb, cwd, check)
        if job is None:
            return EXIT_DONE
        if job.id == 0:
            return EXIT_STOPPED
        console.say(f"submitted job {job.id}: run {plan.name}/{plan.identity} in {folder.root}")
    for what, line in follow_lines(job.id, str(log_path(folder))):
        console.say(f"  {what:8}{line}")
    return follow(job.id, folder) if plan.config.launch.wait else EXIT_DONE


def _submit_new(
    plan: RunPlan, folder: RunFolder, verb: str, cwd: Path, check: Callable[[RunFolder], list[str]]
) -> Job | None:
    """Write the folder and submit. None: nothing is left to do; number 0: nobody knows whether there is a job."""
    made = first_missing(folder.root)
    make_folder(folder)
    with hold(folder.lock, "submit"):
        if not check(folder):
            console.say(f"everything was done before, with the same inputs: {folder.root}")
            return None
        folder.done.unlink(missing_ok=True)
        write_inputs(folder, plan)
        words = [sys.executable, "-m", JOB, str(folder.root), "--verb", verb]
        template = (shipped_slurm() / "job.sbatch").read_text(encoding="utf-8")
        write_atomic(folder.job_sbatch, batch_script(batch_spec(plan, folder, words, cwd), template))
        folder.logs.mkdir(exist_ok=True)
        write_starts(folder, [])
        try:
            number = submit_once(folder, job_name(plan), verb)
        except NoAnswer as fault:
            console.error(f"the reply of sbatch was lost, and no job is found ({fault})")
            console.say("the same command looks again, and submits if there is still none")
            return Job(id=0, state="")
        except SlurmError as fault:
            if made is not None:
                shutil.rmtree(made)
            folder.job_sbatch.unlink(missing_ok=True)
            raise RunError(
                "sbatch refused the job",
                where="launch",
                got=str(fault),
                allowed="what the cluster has (sinfo, sacctmgr show assoc user=$USER)",
                do="change the keys of launch; nothing was submitted",
            ) from None
    return Job(id=number, state="PENDING")


def first_missing(path: Path) -> Path | None:
    """The highest of ``path`` and its parents that does not exist; None: all do."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    return missing[-1] if missing else None


def submit_once(folder: RunFolder, name: str, verb: str) -> int:
    """Submit ``launch/job.sbatch``, note the job, and give its number. After a lost reply the job is looked for.

    Raises:
        NoAnswer: the reply was lost and no job is found; there may be one still.
        SlurmError: refused.
    """
    began, comment = time.time(), job_comment(folder)
    before = read_submission(folder)
    known = 0 if before is None else before.job
    try:
        number = slurm.submit(folder.job_sbatch)
    except NoAnswer:
        found = _look_for(name, comment, began, newer_than=known)
        if found is None:
            raise
        console.warn(f"the reply of sbatch was lost; the job is there: {found}")
        number = found.id
    log = str(log_path(folder))
    write_submission(folder, Submission(job=number, name=name, submitted=began, log=log, verb=verb))
    return number


def _look_for(name: str, comment: str, since: float, *, newer_than: int) -> Job | None:
    for look in range(LOOKS):
        if look:
            time.sleep(PAUSE)
        try:
            jobs = same_run(slurm.queued(name), comment)
        except SlurmError:
            jobs = []
        jobs = jobs or same_run(slurm.recorded(name, since), comment)
        newer = [job for job in jobs if job.id > newer_than]
        if newer:
            return replace(newer[0], comment=comment)
    return None
