"""``sweep.engine=wandb``: W&B chooses the settings. The search space is checked here and registered there.

Trials are then started by agents, wherever and whenever somebody starts one: by hand, or as tasks of a Slurm array.
What an agent types is part of the sweep, so everything of this command line that trials need is written into it.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import ConfigError, Problem, RunError
from trainer.paths import write_atomic
from trainer.redaction import redact
from trainer.sweeps.space import SearchSpace, trial_base

SECONDS = 120
"""Registering takes one or two; the client itself gives up after twenty without a server."""
ARGUMENTS = "${args_no_hyphens}"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_SWEEP = re.compile(r"wandb agent '?([^'\s]+)")
_PAGE = re.compile(r"View sweep at: (\S+)")


@dataclass(frozen=True, slots=True)
class Registered:
    """A sweep that W&B knows: ENTITY/PROJECT/ID, its page, and what W&B finds odd in the file."""

    sweep: str
    page: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The last part of its name."""
        return self.sweep.rpartition("/")[2]


def command_words(space: SearchSpace, overrides: Sequence[str], *, config_dir: Path | None = None) -> list[str]:
    """What an agent types for a trial: the command's and this command line's settings, then the trial's own.

    ``python`` is that of the agent's PATH, so that the sweep may run where this one is not.
    """
    base = trial_base(space, overrides)
    tracked = any(word.lstrip("+").partition("=")[0] == "tracking" for word in overrides)
    return [
        "${env}",
        "python",
        "-m",
        "trainer",
        *base,
        *([] if tracked else ["tracking=wandb"]),
        *([] if config_dir is None else ["--config-dir", str(config_dir.resolve())]),
        ARGUMENTS,
    ]


def registered_text(
    body: Mapping[str, Any],
    space: SearchSpace,
    overrides: Sequence[str],
    trials: int | None,
    *,
    config_dir: Path | None = None,
) -> str:
    """The YAML that is registered: the file ``body`` with this command line in its command, and so many trials."""
    words = command_words(space, overrides, config_dir=config_dir)
    own: dict[str, Any] = {"name": space.name, **body, "command": words}
    own |= {} if trials is None else {"run_cap": trials}
    return yaml.safe_dump(own, sort_keys=False, allow_unicode=True, width=120)


def number_of_trials(space: SearchSpace, asked: int | None) -> int | None:
    """Trials of the whole sweep; None: nobody says, and it goes on until it is stopped."""
    size = prod(len(one.grid()) for one in space.parameters) if space.method == "grid" else None
    said = [number for number in (asked or space.run_cap, size) if number is not None]
    return min(said, default=None)


def require_wandb_can(space: SearchSpace, overrides: Sequence[str]) -> None:
    """Refuse what only Optuna, on this machine, could do.

    Raises:
        ConfigError: settings that all trials would share and must not, or another tracker.
    """
    found: list[Problem] = []
    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        if key in ("run.dir", "run.name"):
            what = "would be the same for all trials"
            do = "leave it out: a trial is in RUN.ROOT/sweeps/wandb/SWEEP/RUN; run.root may be set"
            found.append(Problem(what=what, where=f"command line: {key}", got=word, do=do))
        if key in ("tracking", "tracking.name") and "wandb" not in value:
            what = "would tell W&B nothing of a trial"
            do = "leave it out, or sweep.engine=optuna"
            found.append(Problem(what=what, where=f"command line: {key}", got=word, allowed="tracking=wandb", do=do))
    if found:
        raise ConfigError.of(found)


def register(text: str, folder: Path, *, entity: str | None, project: str | None) -> Registered:
    """Register the sweep ``text`` with the server that W&B's client knows; the file is kept as ``folder``/ID.yaml.

    Raises:
        RunError: there is no client, no key, no server, or the server refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sweep.yaml"
    write_atomic(file, text)
    owner = [*(["--entity", entity] if entity else []), *(["--project", project] if project else [])]
    words = [sys.executable, "-m", "wandb", "sweep", *owner, file.name]
    try:
        done = subprocess.run(
            words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise _refused(f"no answer within {SECONDS} s") from None
    said = _COLOURS.sub("", done.stdout + done.stderr)
    found = _SWEEP.search(said)
    if done.returncode != 0 or found is None:
        raise _refused(reason(said))
    page = _PAGE.search(said)
    odd = tuple(redact(line.strip()) for line in said.splitlines() if "Violation" in line)
    registered = Registered(found[1], page[1] if page is not None else "", odd)
    file.rename(folder / f"{registered.id}.yaml")
    return registered


def reason(said: str) -> str:
    """The line of a client's output that says why it failed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() and "error logs at" not in line]
    return redact((errors or lines or ["no words"])[-1])


def _refused(got: str) -> RunError:
    if "No module named wandb" in got:
        do = "pip install 'trimtab[wandb]'; or sweep.engine=optuna, which needs no server"
    elif "api key" in got.lower() or "credentials" in got:
        do = (
            "wandb login, or WANDB_API_KEY in the environment, and WANDB_BASE_URL for a server of your own; "
            "or sweep.engine=optuna, which needs no server"
        )
    else:
        do = "look at the server and at WANDB_BASE_URL; or sweep.engine=optuna, which needs no server"
    return RunError("W&B did not register the sweep", where="wandb sweep", got=got, do=do)


def next_lines(registered: Registered, trials: int | None) -> list[tuple[str, str]]:
    """How to go on: what a line is for, and the line."""
    array = f"1-{trials}" if trials is not None else "1-N"
    sweep = shlex.quote(registered.sweep)
    page = [("page", registered.page)] if registered.page else []
    return [
        *page,
        ("here", f"wandb agent {sweep}"),
        ("Slurm", f"sbatch --array={array}%4 slurm/sweep.sbatch {sweep}"),
        ("end it", f"wandb sweep --stop {sweep}"),
    ]
