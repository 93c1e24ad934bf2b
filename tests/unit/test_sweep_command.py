"""What a sweep's command line means: its words, its grid, its share of the machine, and its results without a trial."""

import os
import signal
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from trainer.compose import compose, config_text
from trainer.config import Config
from trainer.config.sweep import SweepConfig
from trainer.errors import ConfigError, UserError
from trainer.layout import Devices
from trainer.sweeps import command
from trainer.sweeps.command import grid_of, require_extra, share_out
from trainer.sweeps.pictures import draw_importances, draw_parallel
from trainer.sweeps.results import best_experiment
from trainer.sweeps.study import Trial
from trainer.sweeps.usable import read_sweep
from trainer.sweeps.words import read_words, words_help
from trainer.sweeps.worker import stopped_by_signals
from trainer_launch.devices import share


def config(*overrides: str) -> Config:
    return compose(["+experiment=smoke", *overrides], config_dir=None, cwd=Path.cwd())


def trial(number: int, value: float | None, **params: Any) -> Trial:
    state = "complete" if value is not None else "failed"
    return Trial(number=number, state=state, value=value, params=params, reported={}, notes={}, seconds=1.0)


# -- words ---------------------------------------------------------------------------------------------------------


def test_words_of_a_sweep_are_told_apart_from_those_of_its_runs() -> None:
    found = read_words(["+experiment=smoke", "sweep=mine", "sweep.trials=8", "+sweep.dir=null", "~eval.every"])
    assert (found.name, found.overrides) == ("mine", ("+experiment=smoke", "~eval.every"))
    assert found.config == SweepConfig(trials=8)
    assert read_words(["sweep.dir=007"]).config.dir == "007"


def test_every_wrong_word_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_words(["sweep.trails=8", "sweep.workers=0", "sweep.pruner=medain"])
    assert [(problem.where, problem.do) for problem in caught.value.problems] == [
        ("command line: sweep.trails", "did you mean 'trials'?"),
        ("command line: sweep.workers", ""),
        ("command line: sweep.pruner", "did you mean 'median'?"),
    ]


def test_the_help_has_every_word() -> None:
    text = words_help()
    assert all(f"  sweep.{name}=" in text for name in ("trials", "workers", "dir", "retries", "seed", "pruner"))


def test_missing_packages_are_named_with_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "optuna" else find_spec(name))
    with pytest.raises(UserError, match=r"got: no optuna\n(?s:.*)pip install 'trimtab\[sweep\]'"):
        require_extra()


# -- -m ------------------------------------------------------------------------------------------------------------


def test_a_grid_of_typed_values(tmp_path: Path) -> None:
    words = ["+experiment=smoke", "optim.lr=1e-3,2e-3", "method.targets=[q_proj],[q_proj,v_proj]", "run.seed=3"]
    space, fixed = grid_of(words, config_dir=None, cwd=tmp_path)

    assert fixed == ["+experiment=smoke", "run.seed=3"]
    lr, targets = space.parameters
    assert [lr.override(value) for value in lr.grid()] == ["optim.lr=0.001", "optim.lr=0.002"]
    assert targets.override(targets.values[1]) == "method.targets=[q_proj,v_proj]"
    assert (space.method, space.metric.name, space.metric.goal) == ("grid", "val_loss", "minimize")


def test_a_grid_seeks_what_the_run_seeks(tmp_path: Path) -> None:
    words = ["+experiment=smoke", "optim.lr=1,2", "eval.metric=accuracy", "eval.generate_rows=4"]
    space, _ = grid_of(words, config_dir=None, cwd=tmp_path)
    assert (space.metric.name, space.metric.goal) == ("val_accuracy", "maximize")


def test_a_grid_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing has several values"):
        grid_of(["+experiment=smoke"], config_dir=None, cwd=tmp_path)


# -- the machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "processes", "shown", "threads"),
    [
        (None, None, [None], 0),
        (None, 2, ["0,1", "2,3", "4,5", "6,7"], 1),
        (4, None, ["0,1", "2,3", "4,5", "6,7"], 1),
        (3, 1, ["0", "1", "2"], 2),
        (1, 8, [None], 0),
    ],
)
def test_every_worker_has_gpus_of_its_own(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, processes: int | None, shown: list[str | None], threads: int
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run = config() if processes is None else config(f"launch.processes={processes}")
    shares, found = share_out(SweepConfig(workers=asked), run, Devices(gpus=8, cores=8))
    assert [entry.get("CUDA_VISIBLE_DEVICES") for entry in shares] == shown
    assert found == threads


def test_workers_on_a_cpu_divide_its_cores() -> None:
    shares, threads = share_out(SweepConfig(workers=3), config(), Devices(gpus=0, cores=8))
    assert (shares, threads) == ([{}, {}, {}], 2)
    assert share_out(SweepConfig(), config(), Devices(gpus=0, cores=8)) == ([{}], 0)


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 workers with 2 GPU\(s\) each, 4 here(?s:.*)at most 2"):
        share_out(SweepConfig(workers=3), config("launch.processes=2"), Devices(gpus=4, cores=8))


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "2,3"), ("4,5,6,7", "6,7"), ("GPU-a, GPU-b,GPU-c,3", "GPU-c,3")]
)
def test_a_share_is_of_what_this_process_sees(visible: str | None, expected: str) -> None:
    assert share(visible, (2, 3)) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_sets_the_order_to_stop_and_raises_nothing(number: signal.Signals) -> None:
    stop, before = threading.Event(), signal.getsignal(number)
    with stopped_by_signals(stop):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.wait(10.0)
    assert signal.getsignal(number) == before


# -- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", [[], ["data.split_seed=3", "method=qlora"]])
def test_the_best_trial_is_an_experiment_with_the_same_config(tmp_path: Path, typed: list[str]) -> None:
    space = read_sweep("legal_lora", typed, cwd=tmp_path)
    params = {"optim.lr": 0.00123, "method.rank": 16, "method.dropout": 0.15, "optim.warmup": 0.1}
    best = trial(7, 0.25, **params, **{"optim.schedule": "linear"})

    text = best_experiment(best, space, typed, config_dir=None, cwd=tmp_path)

    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "best.yaml").write_text(text)
    meant = ["+experiment=legal_lora", *typed, *(f"{name}={value}" for name, value in params.items())]
    expected = compose([*meant, "optim.schedule=linear", "run.name=best"], config_dir=None, cwd=tmp_path)
    assert config_text(compose(["+experiment=best"], config_dir=None, cwd=tmp_path)) == config_text(expected)
    assert expected.export.merged
    assert expected.eval.max_loss == 0.35
    assert text.splitlines()[1] == "# Trial 7 of the sweep legal_lora: val_loss 0.25."


@pytest.mark.parametrize("trials", [[], [trial(0, 1.0, **{"optim.lr": 0.001, "method.rank": 4})]])
def test_pictures_of_few_trials(tmp_path: Path, trials: list[Trial]) -> None:
    draw_importances(tmp_path / "i.png", {}, "val_loss")
    draw_parallel(tmp_path / "p.png", trials, read_sweep("smoke", cwd=tmp_path))
    for name in ("i.png", "p.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
