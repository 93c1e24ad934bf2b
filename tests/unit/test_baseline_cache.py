"""The base is measured once for all runs that ask it the same, and again when anything of the question differs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare_fixtures import planned

from trainer.evaluate.score import load_evaluation
from trainer.markers import read_marker
from trainer.paths import RunFolder, write_atomic
from trainer.plan import dump_plan, load_plan
from trainer.prepare import prepare
from trainer.worker import work

FILES = ("zero_shot.json", "zero_shot.predictions.jsonl")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = planned(tmp_path_factory.mktemp("baseline"), "experiment=smoke", "task.max_new_tokens=2")
    prepare(folder)
    work(folder, ["baseline"])
    return folder


@pytest.fixture
def other(measured: RunFolder, tmp_path: Path) -> RunFolder:
    """A second run, prepared like the first; no two tests share a cache."""
    run = RunFolder(Path(shutil.copytree(measured.root, tmp_path / "other")))
    shutil.rmtree(run.evaluation)
    (run.stages / "baseline.json").unlink()
    kept = Path(load_plan(measured.plan_json.read_bytes()).cache_dir) / "baselines"
    shutil.copytree(kept, tmp_path / "cache" / "baselines")
    change(run, lambda config: None, cache_dir=str(tmp_path / "cache"))
    return run


def change(run: RunFolder, edit: Callable[[Any], None], **fields: Any) -> None:
    plan = load_plan(run.plan_json.read_bytes())
    edit(plan.config)
    for name, value in fields.items():
        object.__setattr__(plan, name, value)
    write_atomic(run.plan_json, dump_plan(plan))


def kept_in(run: RunFolder) -> list[Path]:
    return sorted((Path(load_plan(run.plan_json.read_bytes()).cache_dir) / "baselines").iterdir())


def test_the_same_question_is_answered_from_the_cache(
    measured: RunFolder, other: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(other, lambda config: setattr(config.optim, "lr", 0.5))
    monkeypatch.setattr("trainer.rank.baseline.evaluate_on_test", lambda *_: pytest.fail("measured again"))

    work(other, ["baseline"])

    (place,) = kept_in(other)
    assert f"baseline: from the cache ({place})" in capsys.readouterr().out
    for name in FILES:
        assert (other.evaluation / name).read_bytes() == (measured.evaluation / name).read_bytes()
    first, second = read_marker(measured, "baseline"), read_marker(other, "baseline")
    assert first is not None
    assert second is not None
    assert first.summary == second.summary
    assert sorted(path.name for path in place.iterdir()) == sorted(FILES)


def test_another_question_is_measured(other: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    change(other, lambda config: setattr(config.task, "max_new_tokens", 3))

    work(other, ["baseline"])

    assert "zero_shot: measuring 40 test rows" in capsys.readouterr().out
    assert len(kept_in(other)) == 2


@pytest.mark.parametrize("name", FILES)
def test_what_is_damaged_is_measured_again_and_mended(
    measured: RunFolder, other: RunFolder, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (place,) = kept_in(other)
    (place / name).write_bytes((place / name).read_bytes()[:-5])

    work(other, ["baseline"])

    assert "cannot be read, and is measured again" in capsys.readouterr().err
    again, first = load_evaluation(place, "zero_shot"), load_evaluation(measured.evaluation, "zero_shot")
    assert (again.loss, again.metrics) == (first.loss, first.metrics)
    assert kept_in(other) == [place]


def test_a_run_without_baselines_measures_and_keeps_none(other: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    change(other, lambda config: setattr(config.eval, "baselines", []))
    work(other, ["baseline"])
    assert "zero_shot" not in capsys.readouterr().out
    assert not other.evaluation.exists()
