"""Every YAML file that is shipped can be chosen, composes, and can be planned: configs rot where nobody looks."""

from pathlib import Path

import pytest

from trainer.compose import compose
from trainer.config import Config
from trainer.layout import Devices
from trainer.paths import shipped_conf
from trainer.plan import RunPlan, estimate_memory, make_plan
from trainer.rules.matrix import method_of
from trainer.schema import field_docs, field_hints, hint_at, shape

CONF = shipped_conf()
SWEEPS = CONF / "sweep"
FILES = sorted(file for file in CONF.rglob("*.yaml") if file.parent != SWEEPS)  # plain files of W&B, not a group
CHOICES = [file.relative_to(CONF) for file in FILES if file.parent != CONF]
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
# What a choice needs beside it to be a run of its own.
COMPANIONS = {
    "data/files": ["data.train=rows.jsonl"],
    "data/legal": ["task=classification"],
    "data/smoke": [],
    "launch/torchrun": ["launch.nodes=2", "launch.address=n0"],
    "parallel/ddp": ["launch.processes=2"],
    "parallel/fsdp": ["launch.processes=2"],
    "parallel/zero1": ["launch.processes=2"],
    "parallel/zero2": ["launch.processes=2"],
    "parallel/zero3": ["launch.processes=2"],
}


def plan(tmp_path: Path, *overrides: str, gpus: int = 0) -> RunPlan:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    config = compose(overrides, config_dir=None, cwd=tmp_path)
    return make_plan(config, devices=Devices(gpus=gpus, cores=4), cwd=tmp_path)


def test_all_files_are_covered() -> None:
    assert len(FILES) == 41
    assert [file.name for file in FILES if file.parent == CONF] == ["config.yaml"]
    assert EXPERIMENTS == ["legal_full", "legal_lora", "legal_sft", "smoke"]
    assert not list(CONF.rglob("*.yml"))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_choice_is_planned(tmp_path: Path, choice: Path) -> None:
    group, name = choice.parts[0], choice.with_suffix("").relative_to(choice.parts[0]).as_posix()
    companions = [] if group in ("experiment", "data") else ["data.train=rows.jsonl"]
    made = plan(tmp_path, f"{group}={name}", *COMPANIONS.get(f"{group}/{name}", []), *companions)
    assert estimate_memory(made) is not None
    if group not in ("experiment", "model", "data", "optim", "packing", "eval", "export"):
        section = {"task": made.config.task.name, "method": method_of(made.config),
                   "parallel": made.config.parallel.name, "launch": made.config.launch.name,
                       "tracking": ",".join(made.config.tracking.to) or "none"}  # fmt: skip
        assert section[group] == name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_every_file_opens_with_what_it_is_for(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_run_on_one_and_on_two_ranks(tmp_path: Path, name: str) -> None:
    one, two = plan(tmp_path, f"experiment={name}"), plan(tmp_path, f"experiment={name}", "launch.processes=2")
    assert one.identity == two.identity
    assert two.accumulation * 2 == one.accumulation
    assert one.run_dir == str(tmp_path / "outputs" / name / one.identity)


def test_the_default_job_is_the_measured_recipe(tmp_path: Path) -> None:
    config = plan(tmp_path, "experiment=legal_lora").config
    assert (config.method.name, config.method.rank, config.method.alpha, config.method.layers) == (
        "lora",
        8,
        16.0,
        "15:",
    )
    assert len(config.method.targets) == 7
    assert config.data.tasks == ["clause_type"]
    assert config.data.system == "You answer questions about licence and contract clauses."
    assert config.data.loss_on == "assistant"
    assert config.eval.max_loss == 0.35
    assert config.eval.baselines == ["zero_shot"]


def test_own_data_needs_no_new_file(tmp_path: Path) -> None:
    made = plan(tmp_path, "data=files", "data.train=rows.jsonl")
    assert made.config.data.train == [str(tmp_path / "rows.jsonl")]
    assert (made.batch_packs, made.accumulation) == (8, 8)


@pytest.mark.parametrize("section", field_hints(Config))
def test_every_key_has_a_docstring(section: str) -> None:
    kind = shape(hint_at(Config, [section])).core
    docs = field_docs(kind)
    assert list(docs) == list(field_hints(kind))
    assert all(text.endswith((".", ")")) for text in docs.values())
    assert kind.__doc__
