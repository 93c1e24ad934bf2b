"""The words of a sweep: they stand beside those of a run (``sweep.trials=20``) and are no part of any run's config."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.bounds import Count, Natural, Seed

EngineName = Literal["optuna", "wandb"]
PrunerName = Literal["auto", "hyperband", "median", "none"]


@dataclass(slots=True, kw_only=True)
class SweepConfig:
    """How many trials, how many at a time, where, what is done about failures. For the verb ``sweep``, and with -m."""

    engine: EngineName = "optuna"
    """Who chooses the settings. ``optuna``: this command, which runs the trials too. ``wandb``: a server of W&B; the
    sweep is registered there, and agents run its trials (docs/tuning_wandb.md). Of the other words, ``trials`` counts
    there, and ``workers`` with ``launch=slurm``: tasks of the array at a time."""
    trials: Count | None = None
    """Finished trials in all, over all workers and machines; null: ``run_cap`` of the file, or the whole grid. The same
    command with a higher number goes on from there."""
    workers: Count | None = None
    """Trials at the same time on this machine; null: one for each ``launch.processes`` GPUs, else 1."""
    dir: str | None = None
    """Folder of the sweep; null: ``<run.root>/sweeps/<experiment>/<name>``. Shared by all machines that take part."""
    retries: Natural = 1
    """How often a trial that failed or was killed is started again, in its own folder. One that was preempted in good
    order, or stopped with Ctrl-C, is no failure."""
    seed: Seed = 0
    """Seed of the search."""
    pruner: PrunerName = "auto"
    """What ends bad trials early: ``hyperband`` as in the file's ``early_terminate``, ``median`` (worse than the median
    of the trials before), or ``none``. ``auto``: ``hyperband`` if the file says so, else ``none``."""
