"""What trackers are told: names and numbers, without texts and secrets; and what is refused before anything runs."""

import math
from pathlib import Path

import msgspec
import pytest
from tracking_fixtures import make_run, write_steps

from trainer.compose import compose
from trainer.config.tracking import TrackingConfig
from trainer.cost.gpu import GpuSample
from trainer.drive import tracked
from trainer.drive.tracked import require_trackers
from trainer.errors import ConfigError
from trainer.markers import STAGES
from trainer.plan import stage_inputs
from trainer.records import GrowingRecords
from trainer.rules import check
from trainer.surroundings import has_wandb_login, in_use, wandb_mode
from trainer.tracking.figures import config_of, lineage_of, redacted, row_of, summary_of
from trainer.tracking.send import feed
from trainer.tracking.sink import Facts
from trainer.tracking.system import Sample, SystemRows, append_sample
from trainer.tracking.texts import Table, tables_of, weights_of
from trainer.tracking.to_tensorboard import TensorboardSink, events_of


def test_a_step_becomes_names_of_panels() -> None:
    row = row_of({"step": 3, "loss": "nan", "grad_norm": "inf", "val_loss": 2, "seconds": {"data": 0.5}, "why": "text"})
    assert math.isnan(row.pop("train/loss"))
    assert row == {"train/grad_norm": math.inf, "val/loss": 2.0, "seconds/data": 0.5}


def test_a_file_that_was_cut_is_read_from_its_beginning(tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path)
    records = GrowingRecords(folder.metrics_jsonl)
    assert records.new() == []
    write_steps(folder, 3)
    assert [record["step"] for record in records.new()] == [1, 2, 3]
    with folder.metrics_jsonl.open("ab") as handle:
        handle.write(b'{"step": 4')
    assert records.new() == []
    write_steps(folder, 2)
    assert [record["step"] for record in records.new()] == [1, 2]


def test_trackers_are_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    _, plain = make_run(tmp_path)
    words = ["tracking=[wandb,tensorboard]", "tracking.tensorboard_dir=events", "tracking.upload=[weights]"]
    _, tracked_plan = make_run(tmp_path, *words)
    assert tracked_plan.identity == plain.identity
    assert [stage_inputs(tracked_plan, stage) for stage in STAGES] == [stage_inputs(plain, stage) for stage in STAGES]
    assert tracked_plan.config.tracking.tensorboard_dir == str(tmp_path / "events")


def test_config_is_told_without_secrets(tmp_path: Path) -> None:
    _, plan = make_run(tmp_path, "tracking=wandb")
    assert config_of(plan)["plan"]["identity"] == plan.identity
    assert config_of(plan)["optim"]["lr"] == plan.config.optim.lr
    secret = "hf_" + "a" * 30
    assert redacted({"a": [f"x {secret}"]}) == {"a": ["x [redacted]"]}


def test_lineage_and_evaluations_are_told_without_texts_of_the_data(tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path)
    assert (lineage_of(folder), summary_of(folder)) == ({}, {})
    source = {"name": "s", "location": "l", "sha256": "0", "rows": 1}
    data = {"sources": [source], "splits": {}, "splits_sha256": "1", "labels": ["private"], "dropped": []}
    lineage = {"identity": "i", "base": {"name": "b", "directory": "/home/x"}, "data": data, "exports": {}}
    folder.lineage_json.write_bytes(msgspec.json.encode(lineage | {"environment": {}, "evaluations": "private"}))
    assert "private" not in str(lineage_of(folder))
    assert "/home/x" not in str(lineage_of(folder))
    folder.evaluation.mkdir()
    scores = {"who": "tuned", "metrics": {"accuracy": 0.5}, "by_slice": {"client": {"private": {}}}, "loss": None}
    (folder.evaluation / "tuned.json").write_bytes(msgspec.json.encode(scores | {"rows": 4}))
    assert summary_of(folder) == {"test/tuned/accuracy": 0.5, "test/tuned/rows": 4.0}


def gpu(energy: float, load: float) -> GpuSample:
    return GpuSample(
        index=0,
        uuid="GPU-0",
        name="H100",
        utilisation=load,
        memory_used=8 * 10**9,
        memory_total=80 * 10**9,
        power=None,
        energy=energy,
    )


def test_samples_of_the_machine_are_means_of_their_step_and_energy_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "tracking" / "system.jsonl"
    rows = SystemRows(path)
    assert rows.up_to(1) == {}
    for step, energy, load in ((1, 100.0, 10.0), (1, 150.0, 30.0), (2, 400.0, 90.0)):
        sample = Sample(time=0.0, step=step, cpu_percent=50.0, memory_used=10**9, gpus=[gpu(energy, load)])
        append_sample(path, sample)
    assert rows.up_to(1) == {
        "system/cpu_percent": 50.0,
        "system/memory_gb": 1.0,
        "system/gpu0/utilisation_percent": 20.0,
        "system/gpu0/memory_gb": 8.0,
        "system/gpu0/energy_joules": 50.0,
    }
    assert rows.up_to(1) == {}
    assert rows.up_to(2)["system/gpu0/energy_joules"] == 300.0
    assert rows.totals() == {"system/energy_joules": 300.0}


def test_texts_are_read_with_secrets_removed_and_weights_after_the_export(tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path)
    folder.evaluation.mkdir()
    line = {"id": "1", "text": "hf_" + "a" * 30, "answer": "a", "correct": True, "token_ids": [1]}
    (folder.evaluation / "tuned.predictions.jsonl").write_bytes(msgspec.json.encode(line) + b"\n")
    (table,) = tables_of(folder)
    assert (table.name, table.rows) == ("tuned", [["1", "a", "[redacted]", "True"]])
    facts = Facts(code=0, summary={}, lineage={}, tables=[table], sent={"text/tuned": table.digest})
    assert facts.fresh_tables() == []
    assert weights_of(folder) is None


def test_tensorboard_has_each_step_once_after_a_restart(tmp_path: Path) -> None:
    folder, plan = make_run(tmp_path, "tracking=tensorboard")
    place = folder.tracking / "tensorboard"
    for last, text in ((3, "a"), (5, "<b>|")):
        write_steps(folder, last)
        sink = TensorboardSink(folder=place, config=config_of(plan))
        assert feed(folder, sink, lambda: True, lambda _: None) == last
        sink.finish(Facts(code=0, summary={"best/loss": 0.5}, lineage={}, tables=[Table("t", [[text] * 4], "0")]))
        assert sink.arrived() == last
    assert [step for step, names in events_of(place) if "train/loss" in names] == [1, 2, 3, 4, 5]
    assert sum("config" in names for _, names in events_of(place)) == 1


def test_trackio_has_each_step_once_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trainer.tracking.to_trackio import TrackioSink

    folder, plan = make_run(tmp_path, "tracking.upload=[]")
    for last in (3, 5):
        write_steps(folder, last)
        sink = TrackioSink(name="r", project="p", group=None, config=config_of(plan))
        assert feed(folder, sink, lambda: True, lambda _: None) == last
        sink.finish(Facts(code=0, summary={"best/loss": 0.5}, lineage={}))
        assert sink.arrived() == last


# -- choosing, and what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (["tracking=[wandb,tensorboard]"], ["wandb", "tensorboard"]),
        (["tracking=wandb"], ["wandb"]),
        (["tracking=trackio"], ["trackio"]),
        (["tracking=none"], []),
        ([], []),
        (["tracking.tensorboard=true"], ["tensorboard"]),
        (["+experiment=mine"], ["wandb", "tensorboard"]),
    ],
)
def test_trackers_are_chosen_as_hydra_chooses_several(tmp_path: Path, words: list[str], chosen: list[str]) -> None:
    experiment = tmp_path / "conf" / "experiment" / "mine.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text("# @package _global_\ndefaults:\n  - override /tracking: [wandb, tensorboard]\n")
    config = compose(["model=tiny", "data.train=my.jsonl", *words], config_dir=None, cwd=tmp_path)
    assert config.tracking.to == chosen


@pytest.mark.parametrize(
    ("word", "where"),
    [("tracking=wandbb", "tracking"), ("tracking=[wandbb,none]", "tracking"), ("tracking.upload=[texts]", "upload[0]")],
)
def test_a_wrong_name_is_answered_with_the_right_one(tmp_path: Path, word: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["model=tiny", word], config_dir=None, cwd=tmp_path)
    (problem,) = caught.value.problems
    assert problem.where.endswith(where)
    assert problem.do in ("did you mean 'wandb'?", "did you mean 'text'?")


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["tracking.tags=[a]", "tracking.upload=[text]"], ["tracking.tags", "tracking.upload"]),
        (["tracking=tensorboard", "tracking.entity=e", "tracking.name=n"], ["tracking.entity", "tracking.name"]),
        (["tracking=wandb", "tracking.tensorboard_dir=x"], ["tracking.tensorboard_dir"]),
        (["tracking=tensorboard", "tracking.upload=[weights]"], ["tracking.upload"]),
        (
            ["tracking=wandb", "tracking.upload=[weights]", "export.adapter=false", "export.merged=false"],
            ["tracking.upload"],
        ),
        (["tracking=wandb", "tracking.project=' '"], ["tracking.project"]),
        (["tracking=[wandb,tensorboard]", "tracking.tensorboard_dir=x", "tracking.upload=[text,weights]"], []),
    ],
)
def test_keys_without_effect_are_refused(tmp_path: Path, words: list[str], keys: list[str]) -> None:
    config = compose(["model=tiny", "data.train=my.jsonl", *words], config_dir=None, cwd=tmp_path)
    assert [problem.where for problem in check(config)] == keys


def test_a_missing_package_or_login_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        require_trackers(TrackingConfig(wandb=True))
    (problem,) = caught.value.problems
    assert problem.where == "tracking.wandb"
    assert problem.do.startswith("`wandb login`, or WANDB_MODE=offline / tracking.wandb_mode=offline")
    require_trackers(TrackingConfig(wandb=True, wandb_mode="offline"))
    monkeypatch.setattr(tracked, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'trimtab\[tensorboard\]'"):
        require_trackers(TrackingConfig(tensorboard=True))
    require_trackers(TrackingConfig())


def test_a_login_is_a_variable_or_an_entry_of_netrc(tmp_path: Path) -> None:
    assert not has_wandb_login({}, tmp_path)
    assert has_wandb_login({"WANDB_API_KEY": "k"}, tmp_path)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k\n")
    assert has_wandb_login({}, tmp_path)
    assert not has_wandb_login({"WANDB_BASE_URL": "https://wandb.example.org"}, tmp_path)
    settings = tmp_path / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert not has_wandb_login({}, tmp_path)


def test_the_surroundings_can_only_keep_data_here() -> None:
    assert wandb_mode("online", {}) == "online"
    assert wandb_mode("online", {"WANDB_MODE": "offline"}) == "offline"
    assert wandb_mode("offline", {"WANDB_MODE": "online"}) == "offline"
    assert wandb_mode("online", {"WANDB_MODE": "disabled"}) == "disabled"
    both = TrackingConfig(wandb=True, tensorboard=True)
    assert in_use(both, {"WANDB_MODE": "disabled"}) == ["tensorboard"]
    assert in_use(both, {}) == ["wandb", "tensorboard"]
