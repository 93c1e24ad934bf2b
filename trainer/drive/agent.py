"""The verb ``agent``: one trial of a W&B sweep, by hand or as a task of a Slurm array, through to its end.

``wandb agent`` alone starts another trial whenever it is started. In a job that was preempted or requeued, the trial of
before has to go on under the same run of W&B. So a task keeps on record which trial is its own (``trial.py``), and asks
the sweep for one only where there is none. In a Slurm job this process is the batch step, and decides what becomes of
the job as ``job.py`` does; the agent and its trial are a step of the job, because Slurm signals steps.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

from trainer import console
from trainer.config.launch import LaunchConfig
from trainer.drive.job import Step, lock_is_free, most_stalls, one_start
from trainer.drive.lock import hold, holder_of
from trainer.drive.progress import progress_of
from trainer.drive.trial import SWEEPS, UNFINISHED, read_trial, write_trial
from trainer.errors import EXIT_DONE, EXIT_STOPPED, UserError
from trainer.paths import RunFolder
from trainer_launch import agents, slurm
from trainer_launch.batch_script import srun_words
from trainer_launch.jobs import AGAIN
from trainer_launch.slurm import Allocation

AGENT_HELP = "one trial of a W&B sweep (agent ENTITY/PROJECT/SWEEP), also as a task of a Slurm array"
STEP = "trainer.drive.agent"
KILLED = 137
_SWEEP = re.compile(r"(?!-)(?:(?:[^/\s]+/)?[^/\s]+/)?(?P<id>[A-Za-z0-9_\-]+)")


@dataclass(frozen=True, slots=True)
class Task:
    """What does one trial: a task of an array, a job, or a command by hand. ``root`` holds its records."""

    root: Path

    @property
    def trial_json(self) -> Path:
        """The trial of this task."""
        return self.root / "trial.json"

    @property
    def starts(self) -> RunFolder:
        """Where the starts of its Slurm job are on record."""
        return RunFolder(self.root)

    @property
    def run(self) -> RunFolder | None:
        """The run folder of its trial; None: there is none yet."""
        trial = read_trial(self.trial_json)
        return RunFolder(Path(trial.folder)) if trial is not None and trial.folder else None


def do_agent(words: Sequence[str], cwd: Path) -> int:
    """Do one trial of the sweep that ``words`` name; gives its exit code.

    Raises:
        UserError: no sweep, or more than that.
    """
    sweep = read_sweep(words)
    tasks = cwd / SWEEPS / sweep.rpartition("/")[2] / "tasks"
    here = slurm.allocation()
    if here is None:
        with ExitStack() as stack:
            task = free_task(tasks, stack)
            return one_trial(task, sweep, in_step=False)
    task = Task(tasks / here.name)
    task.starts.launch.mkdir(parents=True, exist_ok=True)
    trial = read_trial(task.trial_json)
    if trial is not None and trial.is_over:
        console.say(f"the trial of task {here.name} is over: run {trial.run} in {trial.folder}")
        return EXIT_DONE
    work = partial(_do_step, task, sweep, here, Step(here))
    return one_start(task.starts, here, work, progress=lambda: _progress(task), most=lambda: _most_stalls(task))


def read_sweep(words: Sequence[str]) -> str:
    """The sweep, as ENTITY/PROJECT/ID, PROJECT/ID or ID.

    Raises:
        UserError: it is none of these.
    """
    if len(words) != 1 or _SWEEP.fullmatch(words[0]) is None:
        raise UserError(
            "agent does one trial of one sweep",
            where="command line",
            got=" ".join(words) or "no sweep",
            allowed="ENTITY/PROJECT/ID, as `wandb sweep` prints it; settings of trials are part of the sweep's command",
            do="python -m trainer agent ENTITY/PROJECT/ID",
        )
    return words[0]


def free_task(tasks: Path, stack: ExitStack) -> Task:
    """The first task by hand with a stopped trial that nobody works on, or a new one; ``stack`` keeps its lock."""
    for number in count(1):
        task = Task(tasks / f"by_hand-{number}")
        task.root.mkdir(parents=True, exist_ok=True)
        trial = read_trial(task.trial_json)
        goes_on = trial is None or (trial.code in UNFINISHED and not trial.over)
        if goes_on and holder_of(task.starts.lock) is None:
            stack.enter_context(hold(task.starts.lock, "agent"))
            return task
    raise AssertionError("there is another number")


# -- as a Slurm job ------------------------------------------------------------------------------------------------


def _do_step(task: Task, sweep: str, here: Allocation, step: Step) -> int:
    """The agent and its trial as a step of the job; gives the exit code of the trial."""
    run = task.run
    if run is not None and not lock_is_free(run, step.signalled):
        return EXIT_STOPPED
    words = (sys.executable, "-m", STEP, str(task.root), sweep)
    code = step.run((*srun_words(nodes=1, cpus=here.cpus), *words))
    trial = read_trial(task.trial_json)
    return EXIT_DONE if code != EXIT_DONE and trial is not None and trial.is_over else code


def _progress(task: Task) -> str:
    run = task.run
    return "no trial yet" if run is None else progress_of(run)


def _most_stalls(task: Task) -> int:
    run = task.run
    return LaunchConfig().max_stalls if run is None else most_stalls(run)


# -- the trial -----------------------------------------------------------------------------------------------------


def one_trial(task: Task, sweep: str, *, in_step: bool) -> int:
    """Start the trial of ``task``, or go on with it, and wait for its end; gives its exit code.

    ``in_step``: Slurm signals all processes here. 0 as well: the sweep has no trial left, or has stopped this one.
    """
    trial = read_trial(task.trial_json)
    if trial is None:
        words, environment = agents.agent_words(sweep), agents.agent_environment(task.trial_json)
    else:
        console.say(f"the trial goes on: W&B run {trial.run}")
        words = (sys.executable, "-m", "trainer", *trial.words)
        environment = agents.trial_environment(task.trial_json, trial.variables)
    code, signalled = agents.run_and_pass_on(words, environment, forward=not in_step)
    return judge(task, code, signalled=signalled)


def judge(task: Task, code: int, *, signalled: bool) -> int:
    """The exit code of a trial whose process, or whose agent, ended with ``code``.

    The agent ends with 0 whatever became of its trial. ``signalled``: somebody asked this process to stop.
    """
    trial = read_trial(task.trial_json)
    if trial is None:
        if code == EXIT_DONE and not signalled:
            console.say("the sweep gave no trial: it has no more, or was stopped")
            return EXIT_DONE
        return EXIT_STOPPED if signalled or code in AGAIN else code
    if trial.code is None:
        console.error(f"the trial was killed: W&B run {trial.run}")
        write_trial(task.trial_json, replace(trial, code=EXIT_STOPPED if signalled else KILLED))
        return EXIT_STOPPED if signalled else KILLED
    if trial.code == EXIT_STOPPED and trial.stopped_by == "SIGTERM" and not signalled:
        console.say(f"the sweep has stopped this trial: W&B run {trial.run}")
        write_trial(task.trial_json, replace(trial, over=True))
        return EXIT_DONE
    return trial.code


def main() -> int:
    """The step of a Slurm job: ``python -m trainer.drive.agent TASK SWEEP``."""
    parser = argparse.ArgumentParser(prog=f"python -m {STEP}")
    parser.add_argument("task", type=Path)
    parser.add_argument("sweep")
    found = parser.parse_args()
    return one_trial(Task(found.task), found.sweep, in_step=True)


if __name__ == "__main__":
    sys.exit(console.run_and_report(main))
