"""A search space, read from a plain sweep file of Weights & Biases, so that one file drives W&B and Optuna.

Such a file is YAML of its own kind and no group of Hydra. A trial is an ordinary command line, so every value has to
be one that the config takes: ``usable.py`` tries them all. W&B writes ``key=value`` with Python's ``str``; what Hydra
would not read back from that is refused here, although Optuna alone could do it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from trainer.errors import ConfigError, Problem, nearest
from trainer.paths import conf_directories
from trainer.sweeps.distributions import Parameter, read_parameter

Method = Literal["random", "grid", "bayes"]
METHODS: tuple[Method, ...] = ("random", "grid", "bayes")
FOLDER = "sweep"
KNOWN = ("program", "method", "metric", "parameters", "early_terminate", "run_cap", "command")
LABELS = ("name", "description", "project", "entity")
"""What W&B alone uses, and which changes no trial."""
HYPERBAND = ("type", "min_iter", "max_iter", "s", "eta", "strict")
OWN_PLACES = ("run.dir", "run.root", "run.name", "run.cache", "launch", "launch.name", "experiment")
"""Where a trial is and how it is started is the sweep's business."""
_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_ARGUMENTS = re.compile(r"\$\{args\w*\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """The figure of a run that is sought after, by its name in ``metrics.jsonl`` (``val_loss``) or ``test_NAME``."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperband:
    """Trials are compared after ``min_iter``, ``min_iter * eta``, ... validations; the best ``1 / eta`` go on."""

    min_iter: int
    eta: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """One sweep file.

    ``overrides``: what the file's command gives every trial besides parameters and experiment, without ``tracking``;
    ``experiment``: that of the command, "" for none. ``file`` is how messages call it.
    """

    name: str
    file: str
    method: Method
    metric: Metric
    parameters: tuple[Parameter, ...]
    hyperband: Hyperband | None = None
    run_cap: int | None = None
    command: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    experiment: str = ""


def sweep_files(config_dir: Path | None, cwd: Path) -> dict[str, Path]:
    """Every sweep by its name; earlier config folders win."""
    found: dict[str, Path] = {}
    for folder in (directory / FOLDER for directory in conf_directories(config_dir, cwd)):
        for file in sorted(folder.rglob("*.yaml")):
            found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
    return found


def find_sweep(name: str, *, config_dir: Path | None, cwd: Path) -> Path:
    """Return the file of the sweep ``name``: a name in ``conf/sweep``, or a path.

    Raises:
        ConfigError: there is none.
    """
    known = sweep_files(config_dir, cwd)
    if name in known:
        return known[name]
    path = (cwd / Path(name).expanduser()).resolve()
    if path.is_file():
        return path
    raise ConfigError(
        "unknown sweep",
        where="sweep",
        got=name,
        allowed=f"{', '.join(known)}; or the path of a file",
        do=nearest(name, list(known)) or "choose one of these, or add sweep/NAME.yaml to ./conf",
    )


def parse_sweep(path: Path, cwd: Path) -> SearchSpace:
    """Read the file at ``path``, without trying its values.

    Raises:
        ConfigError: with all that is wrong with its form.
    """
    space, wrong = read_form(path, cwd)
    if wrong:
        raise ConfigError.of(wrong)
    return space


def read_form(path: Path, cwd: Path) -> tuple[SearchSpace, list[Problem]]:
    """What can be read of the file at ``path``, and all that is wrong with its form.

    Of a method, goal or command that cannot be read, the space has ``random``, ``minimize`` or no words; a metric or a
    parameter that cannot be read is not in it.

    Raises:
        ConfigError: it is no YAML file with keys.
    """
    file = path.relative_to(cwd).as_posix() if path.is_relative_to(cwd) else str(path)
    body = _read_yaml(path, file)
    found = [_unknown(f"{file}: {key}", str(key), (*KNOWN, *LABELS)) for key in body if key not in (*KNOWN, *LABELS)]
    method = _method(body.get("method"), file, found)
    metric = _metric(body.get("metric"), file, found)
    parameters = _parameters(body.get("parameters"), file, found)
    hyperband = _hyperband(body.get("early_terminate"), file, found)
    run_cap = body.get("run_cap")
    if run_cap is not None and not _is_count(run_cap):
        found.append(Problem(what="does not fit", where=f"{file}: run_cap", got=str(run_cap), allowed="1 or more"))
    command = _command(body.get("command"), file, found)
    if method == "grid":
        found += _without_values(parameters, file)
    fixed = _fixed_words(command)
    experiments = [word.partition("=")[2] for word in fixed if _is_experiment(word)]
    space = SearchSpace(
        name=path.stem,
        file=file,
        method=method,
        metric=metric,
        parameters=tuple(parameters),
        hyperband=hyperband,
        run_cap=run_cap,
        command=tuple(command),
        overrides=tuple(word for word in fixed if not _is_experiment(word) and not word.startswith("tracking")),
        experiment=experiments[-1] if experiments else "",
    )
    return space, found


def trial_base(space: SearchSpace, overrides: Sequence[str]) -> list[str]:
    """The words that all trials have: experiment (that of ``overrides``, else the command's), then the rest."""
    typed = [word for word in overrides if _is_experiment(word)]
    experiment = typed or ([f"+experiment={space.experiment}"] if space.experiment else [])
    return [*experiment, *space.overrides, *(word for word in overrides if not _is_experiment(word))]


def has_experiment(overrides: Sequence[str]) -> bool:
    """Whether these words of a command line name an experiment."""
    return any(_is_experiment(word) for word in overrides)


# -- parts of the file ---------------------------------------------------------------------------------------------


def _read_yaml(path: Path, file: str) -> dict[str, Any]:
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            "not a readable YAML file", where=file, got=" ".join(str(error).split()), do="mend the file"
        ) from None
    if not isinstance(body, dict):
        raise ConfigError("not a mapping of keys", where=file, allowed=", ".join(KNOWN), do="mend the file")
    return cast("dict[str, Any]", body)


def _unknown(where: str, key: str, allowed: Sequence[str]) -> Problem:
    do = nearest(key, allowed) or "remove it"
    return Problem(what="unknown key", where=where, got=key, allowed=", ".join(allowed), do=do)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _method(value: object, file: str, found: list[Problem]) -> Method:
    for method in METHODS:
        if value == method:
            return method
    do = nearest(str(value), METHODS) or "method: random"
    found.append(
        Problem(what="unknown method", where=f"{file}: method", got=str(value), allowed=", ".join(METHODS), do=do)
    )
    return "random"


def _metric(value: object, file: str, found: list[Problem]) -> Metric:
    where = f"{file}: metric"
    body = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    name, goal = body.get("name"), body.get("goal", "minimize")
    if not isinstance(name, str):
        example = "metric: {name: val_loss, goal: minimize}"
        found.append(Problem(what="must be given", where=where, got=str(value), allowed=example))
        return Metric(name="")
    found += [_unknown(f"{where}.{key}", str(key), ("name", "goal")) for key in body if key not in ("name", "goal")]
    if goal not in ("minimize", "maximize"):
        do = nearest(str(goal), ("minimize", "maximize")) or "goal: minimize"
        allowed = "minimize, maximize"
        found.append(Problem(what="unknown goal", where=f"{where}.goal", got=str(goal), allowed=allowed, do=do))
        goal = "minimize"
    return Metric(name=name, goal=cast('Literal["minimize", "maximize"]', goal))


def _parameters(value: object, file: str, found: list[Problem]) -> list[Parameter]:
    if not isinstance(value, dict) or not value:
        example = "parameters: {optim.lr: {values: [1.0e-4, 2.0e-4]}}"
        found.append(Problem(what="must be given", where=f"{file}: parameters", got=str(value), allowed=example))
        return []
    parameters: list[Parameter] = []
    for key, body in cast("dict[Any, Any]", value).items():
        where = f"{file}: parameters.{key}"
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            do = "a dotted key (optim.lr) or a group (method), without signs"
            found.append(Problem(what="is no key of the config", where=where, got=str(key), do=do))
        elif key in OWN_PLACES:
            do = "remove it; sweep.dir says where trials are"
            found.append(Problem(what="belongs to the sweep itself", where=where, got=key, do=do))
        else:
            parameter = read_parameter(key, body, where, found)
            parameters += [] if parameter is None else [parameter]
    return parameters


def _without_values(parameters: Sequence[Parameter], file: str) -> list[Problem]:
    return [
        Problem(
            what="has no fixed values for a grid",
            where=f"{file}: parameters.{parameter.name}",
            got=parameter.distribution,
            allowed="values, value, int_uniform, q_uniform",
            do="name the values, or method: random",
        )
        for parameter in parameters
        if not parameter.is_finite
    ]


def _hyperband(value: object, file: str, found: list[Problem]) -> Hyperband | None:
    """``min_iter``, or ``max_iter`` with ``s``: then the first comparison is after ``max_iter / eta ** s``."""
    if value is None:
        return None
    where = f"{file}: early_terminate"
    body = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    before = len(found)
    found += [_unknown(f"{where}.{key}", str(key), HYPERBAND) for key in body if key not in HYPERBAND]
    if body.get("type") != "hyperband":
        found.append(
            Problem(what="unknown kind", where=f"{where}.type", got=str(body.get("type")), allowed="hyperband")
        )
    for key in ("min_iter", "max_iter", "s"):
        if key in body and not _is_count(body[key]):
            found.append(Problem(what="does not fit", where=f"{where}.{key}", got=str(body[key]), allowed="1 or more"))
    eta = body.get("eta", 3)
    if not _is_count(eta) or eta < 2:
        found.append(Problem(what="does not fit", where=f"{where}.eta", got=str(eta), allowed="2 or more"))
    if "min_iter" not in body and not ("max_iter" in body and "s" in body):
        allowed = "min_iter, or max_iter and s; counted in validations"
        found.append(Problem(what="says not when trials are compared", where=where, got=str(value), allowed=allowed))
    if len(found) > before:
        return None
    first = body["min_iter"] if "min_iter" in body else max(1, math.floor(body["max_iter"] / eta ** body["s"]))
    return Hyperband(min_iter=first, eta=eta)


def _command(value: object, file: str, found: list[Problem]) -> list[str]:
    """The command, one word each; W&B's own default would start ``program``, which is none here."""
    where = f"{file}: command"
    if not isinstance(value, list) or not all(isinstance(word, str) for word in cast("list[object]", value)):
        example = '["${env}", python, -m, trainer, "+experiment=NAME", "${args_no_hyphens}"]'
        found.append(Problem(what="must be a list of words", where=where, got=str(value), allowed=example))
        return []
    words = cast("list[str]", value)
    arguments = [word for word in words if _ARGUMENTS.search(word)]
    if arguments != ["${args_no_hyphens}"]:
        do = 'a word of its own: "${args_no_hyphens}"; others write --key=value or add unknown keys silently'
        got = ", ".join(arguments) or "no word for the parameters"
        found.append(Problem(what="gives the parameters in no form that is read here", where=where, got=got, do=do))
    if words[words.index("-m") + 1 :][:1] != ["trainer"] if "-m" in words else True:
        do = "python, -m, trainer"
        found.append(Problem(what="does not start this program", where=where, got=" ".join(words), do=do))
    return words


def _fixed_words(command: Sequence[str]) -> list[str]:
    """The overrides among the words of the command."""
    after = list(command)[list(command).index("trainer") + 1 :] if "trainer" in command else []
    return [word for word in after if "=" in word and not word.startswith("-")]


def _is_experiment(word: str) -> bool:
    return word.lstrip("+").startswith("experiment=")
