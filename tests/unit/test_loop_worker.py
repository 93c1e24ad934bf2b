"""A rank from top to bottom, in this process, on the smoke experiment: what it writes, skips, resumes and refuses."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from prepare_fixtures import planned
from safetensors.torch import load_file

from trainer.data.timing import MeasuredRatio
from trainer.errors import DataError, NeedsPerson, RunError, StoppedInGoodOrder, TrainingFault
from trainer.evaluate.score import load_evaluation
from trainer.export.comparison import TensorComparison
from trainer.export.tensors import compare_tensors
from trainer.markers import BY_RANKS, read_marker, write_marker
from trainer.model.precision import torch_dtype
from trainer.paths import RunFolder, write_atomic
from trainer.plan import dump_plan, load_plan
from trainer.prepare import prepare
from trainer.samples import Prepared
from trainer.train.checkpoint.format import checkpoint_path, published
from trainer.train.guard import StopFlag
from trainer.worker import work

SMOKE = ("experiment=smoke", "optim.max_steps=4", "eval.every=2", "eval.generate_rows=2", "task.max_new_tokens=4")
ALL_EQUAL = "eval.metric=exact_match"
"""The tiny model never answers right: every validation has the same metric, and the loss tells which is the best."""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run; tests work on copies."""
    folder = planned(tmp_path_factory.mktemp("worker"), *SMOKE, ALL_EQUAL)
    prepare(folder)
    work(folder, BY_RANKS)
    return folder


@pytest.fixture
def run(done: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(done.root, tmp_path / "run")))


def change(run: RunFolder, edit: Callable[[object], None]) -> None:
    """Rewrite plan.json with an edited config."""
    plan = load_plan(run.plan_json.read_bytes())
    edit(plan.config)
    write_atomic(run.plan_json, dump_plan(plan))


def test_a_run_leaves_markers_figures_and_exports(done: RunFolder) -> None:
    markers = {stage: read_marker(done, stage) for stage in BY_RANKS}
    assert all(marker is not None for marker in markers.values())
    trained = markers["train"]
    assert trained is not None
    assert trained.summary["steps"] == 4
    lines = [json.loads(line) for line in done.metrics_jsonl.read_text().splitlines()]
    assert [line["step"] for line in lines if "val_exact_match" in line] == [2, 4]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert losses[4] < losses[2]
    assert (trained.summary["best_step"], trained.summary["best_loss"]) == (4, losses[4])
    before, after = load_evaluation(done.evaluation, "zero_shot"), load_evaluation(done.evaluation, "tuned")
    assert before.loss is not None
    assert after.loss is not None
    assert after.loss < before.loss
    assert before.rows == after.rows == 40
    assert load_file(done.adapter / "adapter_model.safetensors")
    assert done.curve_png.read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_does_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.worker.do_stages", lambda job, todo: pytest.fail(f"did {todo}"))
    work(run, BY_RANKS)


def test_only_the_stages_that_are_not_current_are_done(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (run.stages / "evaluate.json").unlink()
    metrics = run.metrics_jsonl.read_bytes()
    tuned = load_evaluation(run.evaluation, "tuned")
    work(run, BY_RANKS)
    said = capsys.readouterr().out
    assert "tuned: measuring 40 test rows" in said
    assert "zero_shot" not in said
    assert run.metrics_jsonl.read_bytes() == metrics
    again = load_evaluation(run.evaluation, "tuned")
    assert (again.loss, again.metrics) == (tuned.loss, tuned.metrics), "the best checkpoint is what was evaluated"


def test_a_merged_model_alone_has_its_adapter_beside_it(run: RunFolder) -> None:
    """Without it the verifying process could compare answers only."""

    def only_merged(config: Any) -> None:
        config.export.adapter = False

    def both(config: Any) -> None:
        config.export.adapter = True

    shutil.rmtree(run.export)
    change(run, only_merged)
    work(run, ["export"])
    assert sorted(path.name for path in run.export.iterdir()) == ["merged", "merged_from"]
    marker = read_marker(run, "export")
    assert marker is not None
    assert set(marker.summary) == {"merged_mb"}
    assert merge_of(run, run.merged_from) == TensorComparison(compared=20, adapted=14, steps=0.0)
    change(run, both)
    work(run, ["export"])
    assert sorted(path.name for path in run.export.iterdir()) == ["adapter", "merged"]


def merge_of(run: RunFolder, adapter: Path) -> TensorComparison:
    """As the verifying process compares."""
    prepared = msgspec.json.decode(run.prepared_json.read_bytes(), type=Prepared)
    return compare_tensors(
        run.merged,
        Path(prepared.base.directory),
        adapter,
        dtype=torch_dtype(prepared.dtype),
        device=torch.device("cpu"),
    )


def test_a_lost_marker_of_training_costs_no_training(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run.metrics_jsonl.read_bytes()
    (run.stages / "train.json").unlink()
    work(run, ["train"])
    assert "continuing after step 4 of 4 from step-00000004" in capsys.readouterr().out
    assert run.metrics_jsonl.read_bytes() == lines
    assert read_marker(run, "train") is not None


def test_the_gate_fails_after_the_evaluation_is_written(run: RunFolder) -> None:
    def gate(config) -> None:  # type: ignore[no-untyped-def]
        config.eval.max_loss = 0.5

    change(run, gate)
    shutil.rmtree(run.export)
    (run.stages / "export.json").unlink()
    for _ in range(2):  # the second time the evaluation is current, and the gate still closed
        with pytest.raises(TrainingFault, match=r"eval\.max_loss: the run does not pass its gate") as fault:
            work(run, BY_RANKS)
        assert fault.value.problems[0].allowed == "at most 0.5"
        marker = read_marker(run, "evaluate")
        assert marker is not None
        assert not run.export.exists()


def test_a_gate_without_a_validation_loss_is_closed(run: RunFolder) -> None:
    def gate(config) -> None:  # type: ignore[no-untyped-def]
        config.eval.max_loss = 100.0

    change(run, gate)
    marker = read_marker(run, "train")
    assert marker is not None
    write_marker(run, replace(marker, summary={}))
    with pytest.raises(TrainingFault, match="does not pass its gate") as fault:
        work(run, ["evaluate"])
    assert fault.value.problems[0].got == "no validation loss"


def damage(path: Path) -> None:
    with (path / "rank0.safetensors").open("r+b") as handle:
        handle.truncate(100)


def test_a_damaged_best_checkpoint_needs_a_person(run: RunFolder) -> None:
    damage(checkpoint_path(run.checkpoints, 4))
    (run.stages / "evaluate.json").unlink()
    with pytest.raises(NeedsPerson, match="the best checkpoint of this run cannot be trusted") as fault:
        work(run, ["evaluate"])
    assert fault.value.exit_code == 76
    assert fault.value.problems[0].got.startswith("rank0.safetensors has 100 of ")


def test_no_whole_checkpoint_needs_a_person(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for path in published(run.checkpoints):
        damage(path)
    (run.stages / "train.json").unlink()
    with pytest.raises(NeedsPerson, match="no checkpoint of this run can be trusted"):
        work(run, ["train"])
    assert capsys.readouterr().err.count("warning: skipping a ") == 2


def test_nothing_trained_is_said(run: RunFolder) -> None:
    shutil.rmtree(run.checkpoints)
    (run.stages / "evaluate.json").unlink()
    with pytest.raises(RunError, match="there is no trained model in this run") as fault:
        work(run, ["evaluate"])
    assert "python -m trainer train" in fault.value.problems[0].do


def test_a_request_to_stop_ends_a_stage_at_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.stages / "baseline.json").unlink()
    enter = StopFlag.__enter__

    def asked(self: StopFlag) -> StopFlag:
        self.cause = "SIGTERM"
        return enter(self)

    monkeypatch.setattr(StopFlag, "__enter__", asked)
    with pytest.raises(StoppedInGoodOrder, match="stopped on SIGTERM in the stage 'loading'"):
        work(run, ["baseline"])
    assert read_marker(run, "baseline") is None


def test_a_measured_ratio_of_costs_is_said_and_recorded(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.stages / "train.json").unlink()
    monkeypatch.setattr("trainer.rank.training.measured_ratio", lambda *table: MeasuredRatio(3e-4, 1e-5, 41))
    work(run, ["train"])
    said = " ".join(capsys.readouterr().out.split())
    assert "measured over 41 steps: packing.cost_ratio=0.0003 (+-1e-05) describes this model on this machine" in said
    assert "for another run with packing.cost=time" in said
    marker = read_marker(run, "train")
    assert marker is not None
    assert marker.summary["measured_cost_ratio"] == 3e-4


def test_an_arena_that_is_not_the_prepared_one_is_refused(run: RunFolder) -> None:
    prepared = msgspec.json.decode(run.prepared_json.read_bytes(), type=Prepared)
    changed = replace(prepared, train=replace(prepared.train, arena_sha256="0" * 64))
    run.prepared_json.write_bytes(msgspec.json.encode(changed))
    (run.stages / "train.json").unlink()
    with pytest.raises(DataError, match="is another arena than the one that was prepared") as fault:
        work(run, ["train"])
    assert "stages/prepare.json" in fault.value.problems[0].do


def test_a_split_that_is_not_there_is_said(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = msgspec.json.decode(run.prepared_json.read_bytes(), type=Prepared)
    run.prepared_json.write_bytes(msgspec.json.encode(replace(prepared, test=None, test_examples="")))
    (run.stages / "evaluate.json").unlink()
    work(run, ["evaluate"])
    assert "tuned: there is no test split, nothing is measured" in capsys.readouterr().out
    marker = read_marker(run, "evaluate")
    assert marker is not None
    assert marker.summary == {"rows": 0}


def test_an_unknown_stage_is_refused(run: RunFolder) -> None:
    with pytest.raises(RunError, match="--stages: no such stage") as fault:
        work(run, ["train", "trian"])
    assert (fault.value.problems[0].got, fault.value.problems[0].allowed) == ("trian", ", ".join(BY_RANKS))


@pytest.mark.parametrize("missing", ["plan.json", "prepared.json"])
def test_a_folder_that_is_not_prepared_is_refused(run: RunFolder, missing: str) -> None:
    (run.root / missing).unlink()
    with pytest.raises(RunError, match="this is not a prepared run") as fault:
        work(run, BY_RANKS)
    assert fault.value.problems[0].got == f"no {missing}"


def test_a_prepared_json_that_is_damaged_is_refused(run: RunFolder) -> None:
    run.prepared_json.write_text("{")
    with pytest.raises(RunError, match=r"prepared\.json cannot be understood"):
        work(run, BY_RANKS)


def test_documents_are_named_by_file_and_row(done: RunFolder) -> None:
    from trainer.rank.training import origin_of

    prepared = msgspec.json.decode(done.prepared_json.read_bytes(), type=Prepared)
    assert origin_of(prepared.train, 0) != origin_of(prepared.train, 1)
    file, _, row = origin_of(prepared.train, 0).rpartition(":")
    assert file
    assert row.isdecimal()


@pytest.mark.parametrize("method", ["full", "dora"])
def test_other_ways_to_train_go_from_top_to_bottom(tmp_path: Path, method: str) -> None:
    """Full fine-tuning with a frozen layer, and DoRA on one layer, with activation checkpointing and NEFTune."""
    common = (*SMOKE, "optim.max_steps=2", "model.activation_checkpointing=true", "optim.neftune_alpha=5")
    chosen = (
        ("method=full", "method.rank=16", "method.alpha=32", "method.freeze_layers=1", "method.freeze_embeddings=true")
        if method == "full"
        else ("method.dora=true", "method.layers='1:'", "method.dropout=0.1")
    )
    folder = planned(tmp_path, *common, *chosen)
    prepare(folder)
    work(folder, BY_RANKS)
    newest = published(folder.checkpoints)[0]
    names = json.loads((newest / "manifest.json").read_text())["shapes"]
    assert names
    assert not any("layers.0." in name for name in names)
    assert all(".lora_" in name for name in names) == (method == "dora")
    assert (folder.merged / "config.json").is_file()
    assert folder.adapter.exists() == (method == "dora")
    assert not folder.merged_from.exists()
    if method == "dora":
        assert merge_of(folder, folder.adapter) == TensorComparison(compared=20, adapted=7, steps=0.0)
