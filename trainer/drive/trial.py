"""A trial of a W&B sweep: what a run leaves on record when W&B's agent has started it.

The agent tells a run who it is (``trainer_launch.agents``) and ends with 0 whatever became of it. What others have to
know afterwards, above all the task of a Slurm array that was requeued, the run writes down here: its words, how it
ended, and which signal asked it to stop.
"""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from trainer.config import Config
from trainer.errors import EXIT_AGAIN, EXIT_DONE, EXIT_STOPPED
from trainer.paths import RunFolder, write_atomic
from trainer_launch import agents
from trainer_launch.agents import Assignment

SWEEPS = Path("outputs") / "sweeps" / "wandb"
"""Where trials and tasks of W&B sweeps leave word of themselves: below the folder in which the agent was started."""
UNFINISHED = (None, EXIT_AGAIN, EXIT_STOPPED)
"""Exit codes (None: it was killed) after which a trial goes on where it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """``sweep`` and ``run``: W&B's ids; ``variables``: what the agent told it; ``words``: after ``python -m trainer``.

    ``folder``: its run folder, "" before there is one. ``code``: how it ended, None while it runs or was killed.
    ``stopped_by``: the signal that asked it to stop. ``over``: the sweep itself stopped it, so it does not go on.
    """

    sweep: str
    run: str
    variables: dict[str, str]
    words: list[str]
    folder: str = ""
    code: int | None = None
    stopped_by: str = ""
    over: bool = False

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to do."""
        return self.over or self.code == EXIT_DONE


def read_trial(path: Path) -> Trial | None:
    """The trial on record at ``path``; None: none is, or nothing that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Trial)
    except (OSError, msgspec.DecodeError):
        return None


def write_trial(path: Path, trial: Trial) -> None:
    """Replace the record."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(trial), indent=1) + b"\n")


# -- the run that an agent has started -----------------------------------------------------------------------------


def begin_trial(words: Sequence[str]) -> None:
    """Of a trial, put its beginning on record; ``words`` are those after ``python -m trainer``."""
    trial = agents.assignment()
    if trial is None:
        return
    path = agents.record_path(trial, SWEEPS)
    before = read_trial(path)
    folder = before.folder if before is not None and before.run == trial.run else ""
    variables, typed = trial.variables, list(words)
    write_trial(path, Trial(sweep=trial.sweep, run=trial.run, variables=variables, words=typed, folder=folder))


def end_trial(code: int) -> int:
    """Of a trial, put its end on record; gives the exit code.

    One that was asked to stop ends this process with SIGTERM instead: the agent takes every positive code for a failure
    and gives up after five of them, or three within a minute. Hyperband stops more trials than that.
    """
    trial = agents.assignment()
    if trial is None:
        return code
    path = agents.record_path(trial, SWEEPS)
    _note(path, code=code)
    left = read_trial(path)
    if code == EXIT_STOPPED and left is not None and left.stopped_by:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    return code


def note_folder(folder: RunFolder) -> None:
    """Of a trial, put its run folder on record."""
    _note_own(folder=str(folder.root))


def note_stop(name: str) -> None:
    """Of a trial, put the signal on record that asked it to stop."""
    if name:
        _note_own(stopped_by=name)


def placed(config: Config) -> Config:
    """Of a trial, the config with a run folder of its own, unless one is given: ``run.root/sweeps/wandb/SWEEP/RUN``.

    Two trials may have the same values, or those of an earlier run: both are runs of W&B all the same.
    """
    trial = agents.assignment()
    if trial is None or config.run.dir is not None:
        return config
    return replace(config, run=replace(config.run, dir=str(own_folder(Path(config.run.root), trial))))


def own_folder(root: Path, trial: Assignment) -> Path:
    """The run folder of a trial below ``run.root``."""
    return root / "sweeps" / "wandb" / trial.sweep / trial.run


def _note_own(*, folder: str | None = None, stopped_by: str | None = None) -> None:
    trial = agents.assignment()
    if trial is not None:
        _note(agents.record_path(trial, SWEEPS), folder=folder, stopped_by=stopped_by)


def _note(path: Path, *, folder: str | None = None, code: int | None = None, stopped_by: str | None = None) -> None:
    before = read_trial(path)
    if before is None:
        return  # it does not come from this module's beginning of a run
    after = replace(
        before,
        folder=before.folder if folder is None else folder,
        code=before.code if code is None else code,
        stopped_by=before.stopped_by if stopped_by is None else stopped_by,
    )
    write_trial(path, after)
