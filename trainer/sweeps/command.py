"""``python -m trainer sweep``: from the words that were typed to a finished search and its results.

Everything that can be wrong is found before the first trial: the sweep file, every value in it, the metric, the folder,
the journal, data and devices of the run. Typed again, by the same or another machine, it joins the same sweep.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from trainer import console
from trainer.compose import compose, expand_multirun
from trainer.config import Config
from trainer.config.sweep import SweepConfig
from trainer.drive.deadline import stopping_in_time
from trainer.drive.run import devices_here
from trainer.errors import EXIT_DONE, EXIT_FAILURE, ConfigError, Problem, StoppedInGoodOrder, UserError
from trainer.layout import Devices
from trainer.plan import make_plan
from trainer.sweeps.distributions import Parameter
from trainer.sweeps.figures import TEST, reported_figures
from trainer.sweeps.folder import Settings, SweepFolder, open_folder
from trainer.sweeps.space import Metric, SearchSpace, find_sweep, read_form, sweep_files, trial_base
from trainer.sweeps.usable import require_usable
from trainer.sweeps.with_wandb import start_with_wandb
from trainer.sweeps.words import read_words
from trainer_launch.devices import share_of_gpus

MARGIN_SECONDS = 15.0
"""So long before its trials, the sweep of a Slurm job stops: it would only start others."""


def do_sweep(words: Sequence[str], *, config_dir: Path | None, cwd: Path, typed: str, multirun: bool = False) -> int:
    """Search as ``words`` say; gives the exit code.

    ``typed``: the whole command, to be repeated in advice; ``multirun``: ``a=1,2`` are the parameters of a grid.

    Raises:
        TrimtabError: everything that is wrong before the first trial, and the order to stop (75).
    """
    asked = read_words(words)
    if asked.config.engine == "wandb":
        return start_with_wandb(asked, config_dir=config_dir, cwd=cwd, multirun=multirun)
    require_extra()
    space, overrides, wrong = _space(asked.name, asked.overrides, config_dir, cwd, multirun=multirun)
    config = require_usable(space, overrides, config_dir=config_dir, cwd=cwd, wrong=wrong)
    base = trial_base(space, overrides)
    first = [parameter.override(parameter.examples[0]) for parameter in space.parameters]
    devices = devices_here(config)
    _require_local(config)
    identity = make_plan(compose([*base, *first], config_dir=config_dir, cwd=cwd), devices=devices, cwd=cwd).identity
    shares, threads = share_out(asked.config, config, devices)
    folder = SweepFolder(_place(asked.config, space, config, cwd))
    pruner = _pruner(asked.config, space)
    fixed = [*base, *(["eval.max_loss=null"] if config.eval.max_loss is not None else [])]
    settings = open_folder(
        folder,
        Settings(
            name=space.name,
            metric=space.metric.name,
            goal=space.metric.goal,
            method=space.method,
            pruner=pruner,
            seed=asked.config.seed,
            words=fixed,
            space={parameter.name: _said(parameter) for parameter in space.parameters},
            identity=identity,
            trials=_budget(asked.config, space),
        ),
    )
    from trainer.sweeps.results import show_results, write_results
    from trainer.sweeps.study import Study
    from trainer.sweeps.worker import Sweep, stopped_by_signals, work_together

    study = Study(folder.journal, space, seed=settings.seed, pruner=pruner, trials=settings.trials)
    _say_start(space, folder, settings, pruner, len(shares), gate=config.eval.max_loss)
    own = [*(["launch.threads=" + str(threads)] if threads else [])]
    own += ["--config-dir", str(config_dir.resolve())] if config_dir is not None else []
    stop = threading.Event()
    sweep = Sweep(
        space=space, study=study, folder=folder, words=(*fixed, *own), retries=asked.config.retries, stop=stop
    )
    with stopped_by_signals(stop), stopping_in_time(None, grace=config.launch.grace + MARGIN_SECONDS):
        work_together(sweep, shares)
    if stop.is_set():
        raise StoppedInGoodOrder(f"stopped; every trial is where it was, and the same command goes on: {typed}")
    best = write_results(folder, study, space, overrides, config_dir=config_dir, cwd=cwd)
    show_results(folder, study, space, best)
    running = any(trial.state == "running" for trial in study.trials())
    return EXIT_DONE if best is not None or running else EXIT_FAILURE


def require_extra() -> None:
    """Check that the packages of the extra ``sweep`` are there.

    Raises:
        UserError: they are not.
    """
    missing = [name for name in ("optuna", "plotly") if find_spec(name) is None]
    if missing:
        raise UserError(
            "sweeps need packages that are not installed",
            where="command line",
            got=f"no {' and no '.join(missing)}",
            allowed="the extra `sweep`",
            do="pip install 'trimtab[sweep]', or in a checkout: pip install -e '.[sweep]'",
        )


def _space(
    name: str, overrides: Sequence[str], config_dir: Path | None, cwd: Path, *, multirun: bool
) -> tuple[SearchSpace, list[str], list[Problem]]:
    """The space, the words that all trials have, and what is wrong with the form of the space's file."""
    if multirun:
        if name:
            raise ConfigError(
                "two answers to what is searched",
                where="command line",
                got=f"sweep={name} with -m",
                allowed="a file, or a=1,2 with -m",
                do="leave out one of them",
            )
        grid, fixed = grid_of(overrides, config_dir=config_dir, cwd=cwd)
        return grid, fixed, []
    if not name:
        raise ConfigError(
            "which sweep?",
            where="command line",
            got="no sweep=NAME",
            allowed=", ".join(sweep_files(config_dir, cwd)) + "; or the path of a file",
            do="python -m trainer sweep +experiment=smoke sweep=smoke",
        )
    space, wrong = read_form(find_sweep(name, config_dir=config_dir, cwd=cwd), cwd)
    return space, list(overrides), wrong


def grid_of(overrides: Sequence[str], *, config_dir: Path | None, cwd: Path) -> tuple[SearchSpace, list[str]]:
    """Make a grid of ``a=1,2 b=3,4``; returns it with the words that have one value.

    The metric is ``eval.metric`` of the run, or its loss on the test split where nothing is validated.

    Raises:
        ConfigError: an override cannot be read, or none has several values.
    """
    rows = expand_multirun(overrides, config_dir=config_dir, cwd=cwd)
    columns = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
    fixed = [column[0] for column in columns if len(column) == 1]
    parameters = tuple(
        Parameter(
            name=column[0].partition("=")[0].lstrip("+"),
            distribution="categorical",
            values=tuple(word.partition("=")[2] for word in column),
        )
        for column in columns
        if len(column) > 1
    )
    if not parameters:
        raise ConfigError(
            "nothing has several values", where="command line", got=" ".join(overrides), do="-m optim.lr=1e-4,2e-4"
        )
    config = compose([*fixed, *(p.override(p.values[0]) for p in parameters)], config_dir=config_dir, cwd=cwd)
    known, wanted = reported_figures(config), f"val_{config.eval.metric}"
    metric = wanted if wanted in known else known[0] if known else wanted
    goal = "minimize" if metric.endswith(("_loss", "_perplexity")) else "maximize"
    named = hashlib.sha256("\n".join(map(str, parameters)).encode()).hexdigest()[:8]
    space = SearchSpace(
        name=f"grid-{named}",
        file="command line",
        method="grid",
        metric=Metric(name=metric, goal=goal),
        parameters=parameters,
    )
    return space, fixed


def _require_local(config: Config) -> None:
    if config.launch.name != "local":
        raise ConfigError(
            "a trial is a run on this machine",
            where="launch.name",
            got=config.launch.name,
            allowed="local",
            do="leave out launch=...; on a cluster, the sweep itself is the job (docs/tuning.md)",
        )


def share_out(asked: SweepConfig, config: Config, devices: Devices) -> tuple[list[dict[str, str]], int]:
    """The environment of each worker, and the CPU threads of a rank (0: as any run has them).

    Raises:
        ConfigError: there are not so many GPUs.
    """
    each = config.launch.processes
    if devices.gpus == 0:
        workers = asked.workers or 1
        cores = devices.cores // (workers * (each or 1))
        return [{} for _ in range(workers)], 0 if workers == 1 or config.launch.threads else max(1, cores)
    workers = asked.workers or (1 if each is None else max(1, devices.gpus // each))
    size = each or devices.gpus // workers
    if size < 1 or workers * size > devices.gpus:
        raise ConfigError.of(
            [
                Problem(
                    what="so many trials do not fit on the GPUs of this machine",
                    where="sweep.workers",
                    got=f"{workers} workers with {size or 1} GPU(s) each, {devices.gpus} here",
                    allowed=f"at most {devices.gpus // (each or 1)}",
                    do="fewer sweep.workers, or fewer launch.processes",
                )
            ]
        )
    if workers == 1 and size == devices.gpus:
        return [{}], 0
    threads = 0 if config.launch.threads else max(1, devices.cores // (workers * size))
    return [share_of_gpus(range(k * size, (k + 1) * size)) for k in range(workers)], threads


def _place(asked: SweepConfig, space: SearchSpace, config: Config, cwd: Path) -> Path:
    if asked.dir is not None:
        return (cwd / Path(asked.dir).expanduser()).resolve()
    return (cwd / Path(config.run.root).expanduser() / "sweeps" / config.run.name / space.name).resolve()


def _pruner(asked: SweepConfig, space: SearchSpace) -> str:
    if asked.pruner == "auto":
        return "none" if space.hyperband is None else "hyperband"
    if asked.pruner != "none" and space.metric.name.startswith(TEST):
        raise ConfigError(
            "nothing can be ended early by a figure that is known at the end",
            where="sweep.pruner",
            got=f"{asked.pruner} with {space.metric.name}",
            allowed="none, or a validation figure as metric",
            do="sweep.pruner=none",
        )
    return asked.pruner


def _budget(asked: SweepConfig, space: SearchSpace) -> int:
    whole = None
    if space.method == "grid":
        whole = 1
        for parameter in space.parameters:
            whole *= len(parameter.grid())
    wanted = asked.trials or space.run_cap or whole
    if wanted is None:
        raise ConfigError(
            "how many trials?",
            where="sweep.trials",
            got=f"neither sweep.trials nor run_cap in {space.file}",
            allowed="1 or more",
            do="sweep.trials=20",
        )
    return wanted if whole is None else min(wanted, whole)


def _said(parameter: Parameter) -> dict[str, object]:
    """A parameter as the settings keep it: JSON, with nothing that is not said."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(parameter).items()
        if name != "name" and value not in ((), None)
    }


def _say_start(
    space: SearchSpace, folder: SweepFolder, settings: Settings, pruner: str, workers: int, *, gate: float | None
) -> None:
    sampler = {"bayes": "TPE", "random": "random search", "grid": "grid"}[space.method]
    ends = {"none": "no trial is ended early", "median": "median pruning"}.get(pruner)
    if ends is None:
        rule = space.hyperband
        ends = "successive halving" + ("" if rule is None else f" from validation {rule.min_iter} on, by {rule.eta}")
    console.say(f"sweep {space.name} in {folder.root}")
    console.say(
        f"{space.metric.goal} {space.metric.name}: {settings.trials} trials, {workers} at a time; {sampler}, {ends}"
    )
    if gate is not None:
        console.note(
            f"trials have no gate: eval.max_loss={gate:g} of the run says what may be shipped, not what is better"
        )
    if space.metric.name.startswith(TEST):
        console.warn(f"{space.metric.name}: what was chosen by the test rows says nothing about new rows any more")
