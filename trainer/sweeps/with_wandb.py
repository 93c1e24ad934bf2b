"""``python -m trainer sweep ... sweep.engine=wandb``: check the space, register it, and start agents or say how.

Everything that can be wrong with the file, the command line, the metric, Slurm and the key is found before W&B knows of
a sweep: a sweep whose trials all fail stands in a project for good.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import yaml

from trainer import console
from trainer.config import Config
from trainer.config.sweep import SweepConfig
from trainer.drive.trial import SWEEPS
from trainer.errors import EXIT_DONE, ConfigError, Problem
from trainer.sweeps.array import array_spec, require_array_can, require_slurm, submit_array, words_in_a_task
from trainer.sweeps.registration import next_lines, number_of_trials, register, registered_text, require_wandb_can
from trainer.sweeps.space import find_sweep, read_form
from trainer.sweeps.usable import base_run, require_usable
from trainer.sweeps.words import SweepWords
from trainer_launch.batch_script import follow_lines


def start_with_wandb(asked: SweepWords, *, config_dir: Path | None, cwd: Path, multirun: bool = False) -> int:
    """Register the sweep that ``asked`` names; with ``launch=slurm``, submit its trials as an array. Gives 0.

    Raises:
        TrimtabError: everything that is wrong before the first trial.
    """
    _require_fitting(asked, multirun=multirun)
    path = find_sweep(asked.name, config_dir=config_dir, cwd=cwd)
    space, wrong = read_form(path, cwd)
    config = base_run(space, asked.overrides, config_dir=config_dir, cwd=cwd, wrong=wrong)
    words, in_array = list(asked.overrides), config.launch.name == "slurm"
    if in_array:
        words = words_in_a_task(words, config.launch)
    require_usable(space, [*words, *_with_tracker(words)], config_dir=config_dir, cwd=cwd, wrong=wrong)
    trials = number_of_trials(space, asked.config.trials)
    if in_array:
        require_slurm()
        require_array_can(config.launch, trials)
    require_wandb_can(space, words)
    _require_online(config)
    fixed = [*words, *(["eval.max_loss=null"] if config.eval.max_loss is not None else [])]
    body = cast("Mapping[str, Any]", yaml.safe_load(path.read_text(encoding="utf-8")))
    text = registered_text(body, space, fixed, trials, config_dir=config_dir)
    owner = config.tracking
    entity, project = body.get("entity") or owner.entity, body.get("project") or owner.project
    made = register(text, cwd / SWEEPS, entity=entity, project=project)
    how_many = "no end" if trials is None else f"{trials} trials"
    console.say(f"registered sweep {made.sweep} ({space.name}: {space.method}, {space.metric.name}, {how_many})")
    for warning in made.warnings:
        console.warn(warning)
    for what, line in next_lines(made, trials):
        if not (in_array and what in ("here", "Slurm")):
            console.say(f"  {what:8}{line}")
    if in_array and trials is not None:
        spec = array_spec(config, made, trials, asked.config.workers, cwd)
        number = submit_array(spec)
        console.say(f"submitted array {number}: {trials} tasks, a trial each")
        for what, line in follow_lines(number, spec.log, array=True):
            console.say(f"  {what:8}{line}")
    return EXIT_DONE


def _require_fitting(asked: SweepWords, *, multirun: bool) -> None:
    """Refuse words that only Optuna's engine heeds."""
    plain, found = SweepConfig(), list[Problem]()
    for name in ("dir", "retries", "seed", "pruner"):
        given = msgspec.to_builtins(asked.config)[name]
        if given != msgspec.to_builtins(plain)[name]:
            do = "leave it out" if name != "pruner" else "leave it out; the file's early_terminate says it"
            what = "has no effect with sweep.engine=wandb"
            found.append(Problem(what=what, where=f"sweep.{name}", got=str(given), do=do))
    if multirun:
        what, do = "W&B takes its parameters from a file", "a file in conf/sweep, or leave out sweep.engine=wandb"
        found.append(Problem(what=what, where="command line", got="-m", allowed="sweep=NAME", do=do))
    if found:
        raise ConfigError.of(found)


def _with_tracker(words: list[str]) -> list[str]:
    return [] if any(word.lstrip("+").startswith("tracking=") for word in words) else ["tracking=wandb"]


def _require_online(config: Config) -> None:
    if config.tracking.wandb_mode == "offline":
        raise ConfigError(
            "a sweep of W&B needs its server: the server chooses the settings",
            where="tracking.wandb_mode",
            got="offline",
            allowed="online",
            do="leave it out; or sweep.engine=optuna, which needs no server",
        )
