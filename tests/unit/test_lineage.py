"""The lineage holds what the stages left, with the secrets gone, and says which file is missing."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from export_fixtures import write_run

from trainer.cost.ledger import Spell, append
from trainer.errors import RunError
from trainer.export.lineage import (
    Lineage,
    collect_lineage,
    describe_files,
    read,
    read_lineage,
    read_training,
    write_lineage,
)
from trainer.markers import Marker, write_marker
from trainer.paths import RunFolder
from trainer.plan import load_plan
from trainer.samples import Prepared

NOW = datetime(2026, 5, 1, 13, 30, tzinfo=UTC)


def collected(root: Path) -> Lineage:
    folder = RunFolder(root)
    plan = write_run(folder, root / "base")
    folder.adapter.mkdir(parents=True)
    (folder.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (folder.adapter / "README.md").write_text("old card")
    (folder.adapter / "lineage.json").write_text("{}")
    return collect_lineage(folder, plan, read(folder.prepared_json, Prepared), now=NOW)


def test_what_the_stages_left(tmp_path: Path):
    lineage = collected(tmp_path)
    assert (lineage.created, lineage.name, lineage.identity) == ("2026-05-01T13:30:00+00:00", "clauses", "0123456789")
    assert set(lineage.data.splits) == {"train", "test"}
    assert lineage.data.sources[0].license == "CC0-1.0"
    assert set(lineage.evaluations) == {"zero_shot", "tuned"}
    assert lineage.evaluations["tuned"].metrics["exact_match"] == 0.5
    assert list(lineage.stages) == ["train"]
    weights = lineage.exports["adapter"]
    assert set(weights) == {"adapter_model.safetensors"}
    assert weights["adapter_model.safetensors"].sha256 == hashlib.sha256(b"weights").hexdigest()
    assert lineage.environment.packages == {"torch": "2.13.0"}
    assert lineage.environment.code.dirty
    assert lineage.training.best_validation_loss == 1.5
    assert (lineage.training.best_step, lineage.training.steps, lineage.training.tokens) == (2, 2, 200)
    assert lineage.training.tokens_per_second == 75.0


def test_what_it_cost(tmp_path: Path):
    assert collected(tmp_path / "before").cost is None
    append(
        RunFolder(tmp_path).rank_ledger(0), Spell(stage="train", began="x", rank=0, seconds=9.0, core_seconds=3600.0)
    )
    lineage = collected(tmp_path)
    assert lineage.cost is not None
    assert lineage.cost_totals["core_hours"] == 1.0
    assert lineage.cost_totals["co2_g"] == lineage.cost.co2_g
    write_lineage(tmp_path / "lineage.json", lineage)
    assert read_lineage(tmp_path / "lineage.json") == lineage


def test_what_the_verification_found(tmp_path: Path):
    assert collected(tmp_path).verification == []
    folder = RunFolder(tmp_path)
    figures = {"prompts": 8, "equal": 8, "near_ties": 0, "stopped": 8, "difference": 0.1, "mean": 0.0, "tolerance": 0.5}
    found = [{"name": "merged", **figures, "base_difference": None, "base_mean": None}]
    (folder.export / "verification.json").write_text(json.dumps(found))
    write_marker(folder, Marker(stage="verify", inputs="v", seconds=1.0, finished=NOW.isoformat(), summary={}))
    plan = load_plan(folder.plan_json.read_bytes())
    lineage = collect_lineage(folder, plan, read(folder.prepared_json, Prepared), now=NOW)
    assert [(one.name, one.equal) for one in lineage.verification] == [("merged", 8)]
    assert list(lineage.stages) == ["train", "verify"]


def test_round_trip(tmp_path: Path):
    lineage = collected(tmp_path)
    write_lineage(tmp_path / "lineage.json", lineage)
    assert read_lineage(tmp_path / "lineage.json") == lineage


def test_secrets_do_not_get_in(tmp_path: Path):
    secret = "hf_" + "a" * 30
    lineage = collected(tmp_path)
    lineage.config.data.train = [f"https://user:{secret}@host/rows.jsonl"]
    write_lineage(tmp_path / "lineage.json", lineage)
    text = (tmp_path / "lineage.json").read_text()
    assert secret not in text
    assert "[redacted]" in text
    json.loads(text)


def test_losses_that_are_no_numbers_do_not_become_the_best(tmp_path: Path):
    lines = [
        {"step": 1, "loss": 2.0, "tokens": 10, "epoch": 0.5, "tokens_per_second": 5.0, "val_loss": "nan"},
        {"step": 2, "loss": 1.0, "tokens": 20, "epoch": 1.0, "tokens_per_second": 7.0},
    ]
    (tmp_path / "m").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = read_training(tmp_path / "m")
    assert record.best_validation_loss is None
    assert record.best_step is None
    assert record.last_loss == 1.0


@pytest.mark.parametrize(("text", "message"), [("", "no steps"), ("{}\n", "missing required field `step`")])
def test_a_record_without_steps_is_refused(tmp_path: Path, text, message):
    (tmp_path / "m").write_text(text)
    with pytest.raises(RunError, match=f"the lineage of this run cannot be collected\n  got: .*{message}"):
        read_training(tmp_path / "m")


@pytest.mark.parametrize("name", ["env.json", "metrics.jsonl", "prepared.json"])
def test_a_missing_file_is_named(tmp_path: Path, name):
    folder = RunFolder(tmp_path)
    plan = write_run(folder, tmp_path / "base")
    prepared = read(folder.prepared_json, Prepared)
    (tmp_path / name).unlink()
    with pytest.raises(RunError, match=f"{name}: the lineage of this run cannot be collected"):
        collect_lineage(folder, plan, prepared, now=NOW) if name != "prepared.json" else read(
            folder.prepared_json, Prepared
        )


def test_a_damaged_lineage_is_refused(tmp_path: Path):
    (tmp_path / "lineage.json").write_bytes(msgspec.json.encode({"format": 1}))
    with pytest.raises(RunError, match="missing required field"):
        read_lineage(tmp_path / "lineage.json")


def test_files_of_an_export(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    assert {name: record.size for name, record in describe_files(tmp_path).items()} == {"a": 5}
