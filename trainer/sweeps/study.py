"""The search itself: Optuna, and nothing else in this project knows it.

A study lives in one journal file on a shared folder. Its lock is made with ``open(O_EXCL)``, which NFS keeps from
version 3 on; one that a dead process left behind is taken over after half a minute. Everything that several workers
must not do at the same time (deciding whose turn it is) is behind the sweep's own lock (``folder.py``), not this one.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from trainer.errors import RunError
from trainer.fingerprint import digest
from trainer.sweeps.distributions import Parameter
from trainer.sweeps.space import Hyperband, SearchSpace

State = Literal["running", "waiting", "complete", "pruned", "failed"]
STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
WHY = "why"
"""Note of a trial that failed: what was wrong."""
STARTUP = 10
"""Random trials before TPE learns from them; a quarter of a short sweep, but at least four."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One trial. ``params``: key -> value, constants left out; ``seconds``: None while it runs."""

    number: int
    state: State
    value: float | None
    params: dict[str, Any]
    reported: dict[int, float]
    notes: dict[str, Any]
    seconds: float | None


class Study:
    """The trials of one sweep in the file ``journal``, which is made if it is not there.

    Raises:
        RunError: the journal cannot be written, or is none.
    """

    def __init__(self, journal: Path, space: SearchSpace, *, seed: int, pruner: str, trials: int | None = None) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._seed, self._trials = space, seed, trials
        self._grid = list(itertools.product(*(p.grid() for p in _searched(space)))) if space.method == "grid" else []
        path = str(journal)
        try:
            self._storage = JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=space.name,
                direction=space.metric.goal,
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(seed=seed),
                pruner=_pruner(pruner, space.hyperband),
            )
        except OSError as fault:
            raise _unusable(journal, fault.strerror or str(fault)) from None
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise _unusable(journal, f"{type(fault).__name__}: {fault}") from None

    def trials(self) -> list[Trial]:
        """Every trial so far, by number."""
        return [_trial(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def ask(self) -> Trial:
        """Begin a new trial. One caller at a time: the sweep's lock."""
        known = self._study.get_trials(deepcopy=False)
        waiting = any(frozen.state == TrialState.WAITING for frozen in known)
        if self._grid and not waiting:
            names = [parameter.name for parameter in _searched(self._space)]
            values = [_choice(value) for value in self._grid[len(known)]]
            self._study.enqueue_trial(dict(zip(names, values, strict=True)))
        # The draw depends on the number of the trial, not on which process makes it.
        self._study.sampler = self._sampler(len(known))
        asked = self._study.ask({p.name: _distribution(p) for p in _searched(self._space)})
        return next(trial for trial in self.trials() if trial.number == asked.number)

    def report(self, number: int, iteration: int, value: float) -> None:
        """Note the figure of a validation, counted from 1; one that is known already is left as it is."""
        frozen = self._frozen(number)
        if iteration not in frozen.intermediate_values:
            self._storage.set_trial_intermediate_value(frozen._trial_id, iteration, value)

    def reported(self, number: int) -> dict[int, float]:
        """The figure of every validation that is known, by its number."""
        return dict(self._frozen(number).intermediate_values)

    def should_prune(self, number: int) -> bool:
        """Whether the trial is so bad at its last validation that it need not go on."""
        frozen = self._frozen(number)
        return bool(frozen.intermediate_values) and self._study.pruner.prune(self._study, frozen)

    def note(self, number: int, key: str, value: Any) -> None:
        """Keep ``value`` with a trial that is running."""
        self._storage.set_trial_user_attr(self._frozen(number)._trial_id, key, value)

    def finish(self, number: int, state: Literal["complete", "pruned", "failed"], value: float | None = None) -> None:
        """End a trial. ``value``: for a complete one."""
        of_optuna = next(key for key, name in STATES.items() if name == state)
        self._study.tell(number, value, of_optuna)

    def importances(self) -> dict[str, float]:
        """Share of each parameter in the variance of the value, largest first; empty where it cannot be told."""
        done = [trial for trial in self.trials() if trial.state == "complete"]
        differing = {trial.value for trial in done}
        if len(done) < 2 or len(differing) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self._seed)
        return {
            name: share
            for name, share in optuna.importance.get_param_importances(self._study, evaluator=evaluator).items()
            if math.isfinite(share)
        }

    def figures(self) -> list[str]:
        """History, importance, parallel coordinates and validations as parts of a page; plotly comes with the first."""
        view, target = optuna.visualization, self._space.metric.name
        drawn = [
            view.plot_optimization_history(self._study, target_name=target),
            view.plot_parallel_coordinate(self._study, target_name=target),
            view.plot_slice(self._study, target_name=target),
            view.plot_intermediate_values(self._study),
        ]
        if self.importances():
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self._seed)
            drawn.insert(1, view.plot_param_importances(self._study, evaluator=evaluator, target_name=target))
        return [
            figure.to_html(full_html=False, include_plotlyjs=number == 0, default_height="480px")
            for number, figure in enumerate(drawn)
        ]

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = int(digest([self._seed, number])[:8], 16)  # of small neighbouring seeds the first draws are alike
        if self._space.method != "bayes":
            return optuna.samplers.RandomSampler(seed=seed)
        startup = STARTUP if self._trials is None else max(4, min(STARTUP, self._trials // 4))
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)


def _searched(space: SearchSpace) -> list[Parameter]:
    return [parameter for parameter in space.parameters if not parameter.constant]


def _choice(value: object) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.values:
        return CategoricalDistribution([_choice(value) for value in parameter.values])
    if parameter.whole:
        return IntDistribution(int(parameter.min), int(parameter.max))
    return FloatDistribution(parameter.min, parameter.max, log=parameter.log, step=parameter.step)


def _pruner(name: str, hyperband: Hyperband | None) -> optuna.pruners.BasePruner:
    """W&B's hyperband compares all trials after the same counts of validations: that is successive halving here."""
    if name == "hyperband":
        said = hyperband or Hyperband(min_iter=1)
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=said.min_iter, reduction_factor=said.eta)
    return optuna.pruners.MedianPruner() if name == "median" else optuna.pruners.NopPruner()


def _trial(frozen: FrozenTrial) -> Trial:
    seconds = None if frozen.duration is None else frozen.duration.total_seconds()
    return Trial(
        number=frozen.number,
        state=STATES[frozen.state],
        value=frozen.value,
        params={name: _rounded(value) for name, value in frozen.params.items()},
        reported=dict(frozen.intermediate_values),
        notes=dict(frozen.user_attrs),
        seconds=seconds,
    )


def _rounded(value: Any) -> Any:
    """Steps of 0.05 add up to 0.15000000000000002; nobody wants to type that."""
    return float(f"{value:.12g}") if isinstance(value, float) else value


def ranked(trials: Sequence[Trial], goal: str) -> list[Trial]:
    """The complete trials, best first; of equal ones the earlier first."""
    done = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    sign = 1.0 if goal == "minimize" else -1.0
    return sorted(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number))


def _unusable(journal: Path, got: str) -> RunError:
    return RunError(
        "the journal of the sweep cannot be used",
        where=str(journal),
        got=got,
        allowed="a journal that this program wrote, in a folder that can be written",
        do="set sweep.dir to another folder",
    )


def overrides_of(params: Mapping[str, Any], space: SearchSpace) -> list[str]:
    """The words of a trial: constants of the file and what was drawn, in the order of the file."""
    return [p.override(p.values[0] if p.constant else params[p.name]) for p in space.parameters]
