"""Sweep files: what is read of them, and that everything wrong with one is said before the first trial."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.compose import compose
from trainer.errors import ConfigError
from trainer.paths import shipped_conf
from trainer.sweeps.figures import reported_figures
from trainer.sweeps.space import Hyperband, SearchSpace, sweep_files, trial_base
from trainer.sweeps.usable import read_sweep

GOOD: dict[str, Any] = {
    "method": "random",
    "metric": {"name": "val_loss", "goal": "minimize"},
    "parameters": {"optim.lr": {"values": [1e-4, 2e-4]}},
    "command": ["${env}", "python", "-m", "trainer", "+experiment=smoke", "tracking=wandb", "${args_no_hyphens}"],
}


def written(folder: Path, **changed: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in (GOOD | changed).items() if value is not None}, sort_keys=False)
    )
    return path


def read(folder: Path, *overrides: str, **changed: object) -> SearchSpace:
    return read_sweep(str(written(folder, **changed)), overrides, cwd=folder)


def refused(folder: Path, *overrides: str, **changed: object) -> list[tuple[str, str, str]]:
    with pytest.raises(ConfigError) as caught:
        read(folder, *overrides, **changed)
    return [(p.where.removeprefix("mine.yaml: "), p.what, p.do) for p in caught.value.problems]


@pytest.mark.parametrize("name", ["legal_lora", "legal_lora_grid", "legal_lora_bayes", "smoke"])
def test_every_shipped_sweep_fits_its_experiment_and_says_what_it_is_for(tmp_path: Path, name: str) -> None:
    space = read_sweep(name, cwd=tmp_path)

    assert sorted(sweep_files(None, tmp_path)) == ["legal_lora", "legal_lora_bayes", "legal_lora_grid", "smoke"]
    assert space.name == name
    assert space.experiment in ("legal_lora", "smoke")
    gate = () if name == "smoke" else ("eval.max_loss=null",)  # it says what may be shipped, not what is better
    assert space.overrides == ("export=none", *gate)
    assert space.method == {"legal_lora": "random", "legal_lora_grid": "grid"}.get(name, "bayes")
    body = yaml.safe_load((shipped_conf() / "sweep" / f"{name}.yaml").read_text())
    assert body["program"] == "trainer/__main__.py"  # wandb's agent wants one, also beside a command
    assert "tracking=wandb" in body["command"]


def test_distributions_are_read_as_wandb_means_them(tmp_path: Path) -> None:
    space = read(
        tmp_path,
        parameters={
            "optim.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
            "method.rank": {"min": 2, "max": 8},
            "optim.warmup": {"min": 0.0, "max": 0.5},
            "method.dropout": {"distribution": "q_uniform", "min": 0.0, "max": 0.2, "q": 0.1},
            "optim.schedule": {"values": ["cosine", "linear"]},
            "method.targets": {"values": [["q_proj"], ["q_proj", "v_proj"]]},
            "run.seed": {"value": 3},
        },
    )

    lr, rank, warmup, dropout, schedule, targets, seed = space.parameters
    assert (lr.log, lr.min, lr.max, lr.is_finite) == (True, 1e-5, 1e-2, False)
    assert (rank.distribution, rank.whole, rank.grid()) == ("int_uniform", True, (2, 3, 4, 5, 6, 7, 8))
    assert (warmup.distribution, warmup.step) == ("uniform", None)
    assert dropout.grid() == (0.0, 0.1, 0.2)
    assert schedule.values == ("cosine", "linear")
    assert targets.override(targets.values[1]) == "method.targets=['q_proj', 'v_proj']"
    assert (seed.constant, seed.grid()) == (True, (3,))


def test_the_command_gives_every_trial_its_words_but_no_tracking(tmp_path: Path) -> None:
    command = ["python", "-m", "trainer", "+experiment=smoke", "export=none", "tracking=wandb", "${args_no_hyphens}"]
    space = read(tmp_path, command=command)

    assert trial_base(space, []) == ["+experiment=smoke", "export=none"]
    assert trial_base(space, ["experiment=legal_lora", "run.seed=1"]) == [
        "experiment=legal_lora",
        "export=none",
        "run.seed=1",
    ]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"type": "hyperband", "min_iter": 2}, Hyperband(min_iter=2, eta=3)),
        ({"type": "hyperband", "max_iter": 27, "s": 2, "eta": 3}, Hyperband(min_iter=3, eta=3)),
    ],
)
def test_both_ways_to_write_hyperband(tmp_path: Path, said: dict[str, object], meant: Hyperband) -> None:
    assert read(tmp_path, early_terminate=said).hyperband == meant


@pytest.mark.parametrize(
    ("changed", "where", "what", "do"),
    [
        ({"methd": "x"}, "methd", "unknown key", "did you mean 'method'?"),
        ({"method": "baes"}, "method", "unknown method", "did you mean 'bayes'?"),
        ({"metric": None}, "metric", "must be given", ""),
        ({"metric": {"name": "val_loss", "goal": "low"}}, "metric.goal", "unknown goal", "goal: minimize"),
        ({"parameters": None}, "parameters", "must be given", ""),
        ({"command": "python -m trainer"}, "command", "must be a list of words", ""),
        ({"command": ["python", "-m", "trainer", "${args}"]}, "command", "gives the parameters in no form", "a word"),
        ({"command": ["python", "x.py", "${args_no_hyphens}"]}, "command", "does not start this program", "python, -m"),
        ({"run_cap": 0}, "run_cap", "does not fit", ""),
        ({"early_terminate": {"type": "median"}}, "early_terminate.type", "unknown kind", ""),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate", "says not when trials are compared", ""),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file(tmp_path: Path, changed: dict[str, object], where: str, what: str, do: str) -> None:
    found = refused(tmp_path, **changed)
    assert any(f[0] == where and f[1].startswith(what) and do in f[2] for f in found), found


@pytest.mark.parametrize(
    ("name", "body", "where", "what", "do"),
    [
        ("optim.lrr", {"value": 1.0}, "", "unknown key", "did you mean 'lr'?"),
        ("optim.lr", {"values": [1e-4, "fast"]}, "", "does not fit", ""),
        ("optim.lr", {"values": ["1e-4"]}, "", "is a text, and looks like a number", "write 0.0001 without quotes"),
        ("optim.lr", {"min": "1e-5", "max": 1.0}, ".min", "is a text, and looks like a number", "write 1.0e-05"),
        ("optim.lr", {"min": 0.5}, ".max", "is no range", ""),
        ("optim.lr", {"min": 1.0, "max": 0.5}, "", "is an empty range", ""),
        ("optim.lr", {"min": -1.0, "max": 0.5}, "", "does not fit", ""),
        ("optim.lr", {"distribution": "log_uniform_values", "min": 0.0, "max": 1.0}, ".min", "has no logarithm", ""),
        ("optim.lr", {"distribution": "log_uniform", "min": -5, "max": -1}, ".distribution", "is not offered", "no"),
        ("optim.lr", {"distribution": "unifrom", "min": 0.1, "max": 1.0}, ".distribution", "is not offered", "uniform"),
        ("optim.lr", {"vals": [1]}, ".vals", "unknown key", "did you mean 'values'?"),
        ("optim", {"lr": {"values": [1]}}, "", "nested parameters cannot be written", "dotted keys instead: optim.KEY"),
        ("optim", {"parameters": {"lr": {"value": 1}}}, "", "nested parameters cannot be written", "dotted keys"),
        ("run.time_limit", {"values": [None, 3]}, "", "null cannot be swept", "leave run.time_limit out"),
        ("method.targets", {"values": [["q_proj", None]]}, "", "null cannot be swept", ""),
        ("data.system", {"values": ["a, b"]}, "", "would be read as several values", "quote it for Hydra"),
        ("data.system", {"values": ["a=b"]}, "", "would be read as a second assignment", "\"'a=b'\""),
        ("data.system", {"values": [{"a": 1}]}, "", "has no form on a command line", ""),
        ("data.system", {"value": "a(b"}, "", "cannot read this override", "quote the value"),
        ("method", {"values": ["lora", "qlor"]}, "", "unknown choice of the group 'method'", "did you mean 'qlora'?"),
        ("method", {"values": ["lora", "full"]}, "", "has no effect with method.name=full", ""),
        ("run.dir", {"value": "x"}, "", "belongs to the sweep itself", "sweep.dir"),
        ("+optim.lr", {"value": 1}, "", "is no key of the config", "without signs"),
        ("eval.metric", {"value": "accuracy"}, "", "needs answers", "eval.generate_rows=100"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_parameter(
    tmp_path: Path, name: str, body: dict[str, object], where: str, what: str, do: str
) -> None:
    found = refused(tmp_path, parameters={name: body})
    assert any(f[0] == f"parameters.{name}{where}" and f[1].startswith(what) and do in f[2] for f in found), found


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    """Mistakes of form, unknown keys, values of several parameters, and the metric, in one file and one answer."""
    found = refused(
        tmp_path,
        methd="bayes",
        run_cap=0,
        metric={"name": "val_los", "goal": "low"},
        parameters={
            "optim.lrr": {"value": 1.0},
            "optim.lr": {"values": ["fast", 1e-4, -1.0]},
            "run.time_limit": {"values": [None, 3]},
            "method.rank": {"min": 8, "max": 2},
            "optim.warmup": {"value": 2.0},
            "data.system": {"values": ["a(b", "fine"]},
            "method": {"values": ["qlor", "full"]},
            "method.dropout": {"values": [0.1]},
        },
    )
    assert {(where, what) for where, what, _ in found} == {
        ("methd", "unknown key"),
        ("metric.goal", "unknown goal"),
        ("metric.name", "the run never reports this figure"),
        ("parameters.data.system", "cannot read this override"),
        ("parameters.method", "has no effect with method.name=full"),  # keys of the experiment, which name no parameter
        ("parameters.method", "unknown choice of the group 'method'"),
        ("parameters.method.dropout", "has no effect with method.name=full"),
        ("parameters.method.rank", "is an empty range"),
        ("parameters.optim.lr", "does not fit"),
        ("parameters.optim.lrr", "unknown key"),
        ("parameters.optim.warmup", "does not fit"),
        ("parameters.run.time_limit", "null cannot be swept: W&B would write it as the text None"),
        ("run_cap", "does not fit"),
    }
    assert sorted(what for where, what, _ in found if where == "parameters.optim.lr") == ["does not fit"] * 2


def test_a_mistake_of_the_run_is_not_laid_on_a_parameter(tmp_path: Path) -> None:
    assert [where for where, _, _ in refused(tmp_path, "eval.metric=accuracy")] == ["eval.generate_rows"]
    found = refused(tmp_path, "optim.clip_nrm=1", methd="x", parameters={"optim.lrr": {"value": 1.0}})
    assert [where for where, _, _ in found] == ["methd", "command line: optim.clip_nrm", "parameters.optim.lrr"]


def test_without_a_readable_command_the_run_is_not_judged(tmp_path: Path) -> None:
    """The experiment, and with it the data, may stand in the command; the values are tried all the same."""
    found = refused(tmp_path, command="python -m trainer", parameters={"optim.lr": {"values": [-1.0]}})
    assert [(where, what) for where, what, _ in found] == [
        ("command", "must be a list of words"),
        ("parameters.optim.lr", "does not fit"),
    ]


@pytest.mark.parametrize("value", ["'a, b = c'", "plain words", "org/name@rev", "15:"])
def test_texts_reach_the_config_as_they_are_meant(tmp_path: Path, value: str) -> None:
    (parameter,) = read(tmp_path, parameters={"data.system": {"value": value}}).parameters
    config = compose(["+experiment=smoke", parameter.override(value)], config_dir=None, cwd=tmp_path)
    assert config.data.system == value.strip("'")


def test_a_grid_needs_values(tmp_path: Path) -> None:
    found = refused(tmp_path, method="grid", parameters={"optim.lr": {"min": 0.1, "max": 0.5}})
    assert found[0][:2] == ("parameters.optim.lr", "has no fixed values for a grid")


def test_a_key_cannot_be_swept_and_fixed(tmp_path: Path) -> None:
    assert refused(tmp_path, "optim.lr=1")[0][:2] == ("optim.lr", "is swept, and cannot be fixed as well")


@pytest.mark.parametrize(
    ("metric", "overrides", "do"),
    [
        ("val_los", [], "did you mean 'val_loss'?"),
        ("val_accuracy", [], "eval.generate_rows=100"),
        ("val_acuracy", [], "did you mean 'val_accuracy'? It needs eval.generate_rows=100"),
        ("val_rouge1", ["eval.generate_rows=8"], "did you mean"),
        ("nothing/like/it", [], "choose one of these"),
    ],
)
def test_a_metric_that_is_never_reported(tmp_path: Path, metric: str, overrides: list[str], do: str) -> None:
    (problem,) = refused(tmp_path, *overrides, metric={"name": metric})
    assert problem[:2] == ("metric.name", "the run never reports this figure")
    assert do in problem[2]


def test_a_metric_may_come_with_a_parameter(tmp_path: Path) -> None:
    parameters = GOOD["parameters"] | {"eval.generate_rows": {"value": 4}}
    assert read(tmp_path, metric={"name": "val_accuracy"}, parameters=parameters).metric.name == "val_accuracy"


def test_figures_of_plain_text_without_validation(tmp_path: Path) -> None:
    words = ["data.train=a.jsonl", "task=text", "data.validation_share=0"]
    assert reported_figures(compose(words, config_dir=None, cwd=tmp_path)) == ["test_loss", "test_perplexity"]


def test_an_unknown_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'legal_lora'"):
        read_sweep("legal_lore", cwd=tmp_path)
