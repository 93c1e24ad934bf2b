"""Whether a sweep can be run: the form of its file, and every value in it tried on the run that the trials vary.

A sweep that fails in its fortieth trial over a typing error has wasted a night, and a file that is refused once for
each mistake in it wastes an afternoon. So everything that is wrong is said at once, before the first trial.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.compose import compose
from trainer.config import Config
from trainer.errors import ConfigError, Problem, nearest
from trainer.rules import check
from trainer.sweeps.figures import TEST, reported_figures
from trainer.sweeps.space import SearchSpace, find_sweep, has_experiment, read_form, trial_base


def read_sweep(
    name: str, overrides: Sequence[str] = (), *, config_dir: Path | None = None, cwd: Path | None = None
) -> SearchSpace:
    """Read the sweep ``name`` (of ``conf/sweep``, or a path) and try its values on the run that ``overrides`` mean.

    ``overrides``: words of a command line, ``+experiment=smoke`` for one; they come after those of the file's command.

    Raises:
        ConfigError: with everything that is wrong with the file, its keys, its values and its metric.
    """
    here = Path.cwd() if cwd is None else cwd
    space, wrong = read_form(find_sweep(name, config_dir=config_dir, cwd=here), here)
    require_usable(space, overrides, config_dir=config_dir, cwd=here, wrong=wrong)
    return space


def base_run(
    space: SearchSpace,
    overrides: Sequence[str],
    *,
    config_dir: Path | None,
    cwd: Path,
    wrong: Sequence[Problem] = (),
) -> Config:
    """The config of the run that all trials vary, without trying a value. ``wrong``: as of ``require_usable``.

    Raises:
        ConfigError: that run is wrong by itself; with everything else that is.
    """
    try:
        return compose(trial_base(space, overrides), config_dir=config_dir, cwd=cwd)
    except ConfigError:
        return require_usable(space, overrides, config_dir=config_dir, cwd=cwd, wrong=wrong)


def require_usable(
    space: SearchSpace,
    overrides: Sequence[str],
    *,
    config_dir: Path | None,
    cwd: Path,
    wrong: Sequence[Problem] = (),
) -> Config:
    """Try every value, one parameter after the other, on the run of ``overrides``; returns that run's config.

    A range is tried at both ends. The other parameters have their first good value meanwhile. ``wrong``: what is known
    to be wrong with the form of the file, of which ``space`` is what can be read.

    Raises:
        ConfigError: with ``wrong`` and all that is found here: the run itself is wrong; a key is unknown, a value is
            not one of its type or fits no other setting; the run does not report the metric.
    """
    run = _Run(tuple(trial_base(space, overrides)), config_dir, cwd)
    config, unsound = run.composed([])
    of_run = unsound if config is None else _against_rules(config)
    unreadable = bool(wrong) and not space.command and not has_experiment(overrides)
    tried = _try_values(space, run, of_run)
    found = [*wrong, *_fixed_and_swept(space, overrides), *unsound]
    found += [] if unreadable else [problem for problem in of_run if problem in tried.of_run]
    found += [replace(problem, where=f"{space.file}: parameters.{name}") for problem, name in tried.problems.items()]
    if not unreadable:
        sure = not wrong and len(tried.good) == len(space.parameters)
        whole, _ = run.composed(list(tried.good.values()))
        found += _metric_problems(space, whole, sure=sure)
    if found or config is None:
        raise ConfigError.of(list(dict.fromkeys(found)))
    return config


@dataclass(frozen=True, slots=True)
class _Run:
    """The run that the trials vary: the words that all of them have."""

    words: tuple[str, ...]
    config_dir: Path | None
    cwd: Path

    def composed(self, overrides: Sequence[str]) -> tuple[Config | None, list[Problem]]:
        """Its config with ``overrides``, None where it cannot be composed; and why not."""
        try:
            return compose([*self.words, *overrides], config_dir=self.config_dir, cwd=self.cwd), []
        except ConfigError as error:
            return None, list(error.problems)

    def problems(self, overrides: Sequence[str]) -> list[Problem]:
        """What is wrong with it with ``overrides``, also by the rules for several fields."""
        config, found = self.composed(overrides)
        return found if config is None else _against_rules(config)


def _against_rules(config: Config) -> list[Problem]:
    # ``auto`` is decided by the plan, which looks at the machine; most rules ask for the number.
    return [] if config.packing.capacity == "auto" else check(config)


@dataclass(frozen=True, slots=True)
class _Tried:
    """``problems``, each with the name of the parameter that it is laid on; those ``of_run`` are there without any.

    ``good``: of each parameter that has a good value, the first one as a word of a command line, by its name.
    """

    problems: dict[Problem, str]
    of_run: set[Problem]
    good: dict[str, str]


def _try_values(space: SearchSpace, run: _Run, of_run: Sequence[Problem]) -> _Tried:
    """Try all values. A first value that is refused would hide what is wrong with others, so there is a second time."""
    first = {parameter.name: parameter.override(parameter.examples[0]) for parameter in space.parameters}
    tried = _try_beside(space, first, run, of_run)
    if tried.good == first:
        return tried
    again = _try_beside(space, tried.good, run, of_run)
    return _Tried({**again.problems, **tried.problems}, tried.of_run | again.of_run, tried.good)


def _try_beside(space: SearchSpace, others: Mapping[str, str], run: _Run, of_run: Sequence[Problem]) -> _Tried:
    """Try all values of each parameter beside those of the others.

    A problem is laid on the parameter whose key it names, else on one that has it without the others as well. What
    belongs to the run (``of_run``) may go away with a parameter: it counts if it did not.
    """
    tried, named = _Tried({}, set(), {}), {parameter.name for parameter in space.parameters}
    for parameter in space.parameters:
        beside = [word for name, word in others.items() if name != parameter.name]
        for word in map(parameter.override, parameter.examples):
            problems = run.problems([*beside, word])
            tried.of_run.update(problem for problem in problems if problem in of_run)
            keys = {problem: _key(problem) for problem in problems if problem not in of_run}
            alone = [] if named.issuperset(keys.values()) else run.problems([word])
            own = [problem for problem, key in keys.items() if key == parameter.name]
            own += [problem for problem, key in keys.items() if key not in named and problem in alone]
            for problem, key in keys.items():
                tried.problems.setdefault(problem, key if key in named else parameter.name)
            tried.problems.update(dict.fromkeys(own, parameter.name))
            if not own:
                tried.good.setdefault(parameter.name, word)
    return tried


def _key(problem: Problem) -> str:
    """The key that a problem names; of a word that cannot be read, what stands before its equals sign."""
    if problem.where == "command line":
        return problem.got.partition("=")[0]
    return problem.where.removeprefix("command line: ").partition("[")[0]


def _fixed_and_swept(space: SearchSpace, overrides: Sequence[str]) -> list[Problem]:
    swept = {parameter.name for parameter in space.parameters}
    what, do = "is swept, and cannot be fixed as well", "remove it from the command line, or from the file"
    keys = [(word.partition("=")[0].lstrip("+~"), word) for word in overrides]
    return [Problem(what=what, where=key, got=word, do=do) for key, word in keys if key in swept]


def _metric_problems(space: SearchSpace, config: Config | None, *, sure: bool) -> list[Problem]:
    """What is wrong with the metric for a run of ``config`` (None: it is not known).

    Not ``sure``: a parameter that cannot be used might be the one with which the run answers validation rows.
    """
    where, name = f"{space.file}: metric.name", space.metric.name
    if space.hyperband is not None and name.startswith(TEST):
        what = "is known only at the end of a run: nothing can be ended early by it"
        return [Problem(what=what, where=where, got=name, do="a validation figure, val_loss")]
    if config is None or not name:
        return []
    known, with_answers = reported_figures(config), reported_figures(config, with_answers=True)
    if name in (known if sure else with_answers):
        return []
    do = nearest(name, with_answers)
    if do and not any(f"'{figure}'" in do for figure in known):
        do = f"{do} It needs eval.generate_rows=100: so many validation rows are answered and scored"
    if name in with_answers:
        do = "eval.generate_rows=100: then so many validation rows are answered and scored"
    return [
        Problem(
            what="the run never reports this figure",
            where=where,
            got=name,
            allowed=", ".join(known) or "none: there are neither validation nor test rows",
            do=do or "choose one of these",
        )
    ]
