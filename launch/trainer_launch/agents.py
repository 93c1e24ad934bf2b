"""The agent of a W&B sweep, Slurm's arrays, and what their variables say about the trial that this process is.

``wandb agent`` starts a trial as a command with variables that name it. It knows nothing of requeued jobs: asked a
second time, it starts another trial. So what it said once is kept by our side (``Assignment``) and said again.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import FrameType

from trainer_launch.signals import heeding

NAMING = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_SWEEP_PARAM_PATH")
"""What the agent tells a trial. The others of its variables are the user's own, and are there at the next start too."""
RECORD = "TRIMTAB_TRIAL"
"""Where a trial leaves word of itself for the process that started the agent, which says nothing of how it ended."""
ALONE = "TRIMTAB_TRIAL_ALONE"
"""Set for a trial that goes on without its agent: what the sweep decides of it, nobody else will tell it."""
_ID = re.compile(r"[A-Za-z0-9_\-]+")
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A trial of a sweep: their W&B ids, and the variables that say so to this process and to W&B's client."""

    sweep: str
    run: str
    variables: dict[str, str]


def assignment(environment: Mapping[str, str] | None = None) -> Assignment | None:
    """The trial that this process was started for; None: no agent has started it.

    Ids that are no names of files are taken for none: they come from nobody who means well.
    """
    told = os.environ if environment is None else environment  # noqa: TID251
    sweep, run = told.get("WANDB_SWEEP_ID", ""), told.get("WANDB_RUN_ID", "")
    if not (_ID.fullmatch(sweep) and _ID.fullmatch(run)):
        return None
    return Assignment(sweep=sweep, run=run, variables={name: told[name] for name in NAMING if name in told})


def record_path(trial: Assignment, sweeps: Path) -> Path:
    """Where this process leaves word of its trial: where it was told to, or else below the folder ``sweeps``."""
    told = os.environ.get(RECORD, "")  # noqa: TID251
    return Path(told) if told else sweeps / trial.sweep / "trials" / f"{trial.run}.json"


def has_no_agent(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process is a trial that nobody but itself asks the sweep about."""
    told = os.environ if environment is None else environment  # noqa: TID251
    return assignment(told) is not None and bool(told.get(ALONE))


def agent_words(sweep: str) -> tuple[str, ...]:
    """What asks the sweep ENTITY/PROJECT/ID for one trial, starts it, and waits for its end."""
    return (sys.executable, "-m", "wandb", "agent", "--count", "1", "--forward-signals", sweep)


def agent_environment(record: Path) -> dict[str, str]:
    """The environment of the agent: no trial yet, and this Python is the first ``python`` on the PATH."""
    not_its = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", ALONE)
    own = {name: value for name, value in os.environ.items() if name not in not_its}  # noqa: TID251
    path = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", os.defpath)])
    return {**own, "PATH": path, RECORD: str(record)}


def trial_environment(record: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a trial that goes on: what the agent told it at its first start, and that there is none."""
    return {**agent_environment(record), **variables, ALONE: "1"}


def run_and_pass_on(words: Sequence[str], environment: Mapping[str, str], *, forward: bool) -> tuple[int, bool]:
    """Start ``words``, wait for their end; gives the exit code (128 + a signal) and whether a signal came meanwhile.

    ``forward``: pass signals on; otherwise all processes here get them anyway, as in the step of a Slurm job. Must be
    called from the main thread.
    """
    events: SimpleQueue[signal.Signals | None] = SimpleQueue()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        events.put(signal.Signals(number))

    signalled = False
    with heeding(_PASSED_ON, on_signal):
        # a group of its own: Ctrl-C in a terminal reaches this process alone, which passes it on once
        process = subprocess.Popen(words, env=dict(environment), stdin=subprocess.DEVNULL, process_group=0)
        Thread(target=lambda: (process.wait(), events.put(None)), daemon=True).start()
        while (number := events.get()) is not None:
            signalled = True
            if forward:
                process.send_signal(number)
        code = process.wait()
    return (code if code >= 0 else 128 - code), signalled
