"""A whole run under ZeRO-3 from the command line, and what it leaves beside what one process makes of it."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from cli_fixtures import trainer
from layout_fixtures import ALONE, METHODS, SMOKE, again, answers, assert_equal, evaluation, steps, tensors

from trainer.paths import RunFolder
from trainer.plan import load_plan, zero_spec
from trainer_launch.zero import deepspeed_config

STEPS = "optim.max_steps=4"
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed (.[deepspeed])")


def divided(name: str) -> list[str]:
    return [f"parallel={name}", "launch.processes=2"]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("zero3", "lora"),
        ("zero3", "full"),
        ("zero2", "lora"),
        ("zero1", "full"),
    ],
)
@pytest.mark.slow  # the quick tests have two ranks of each stage, and one whole run of several ranks: test_fsdp_run.py
def test_a_divided_run_exports_what_one_process_exports(tmp_path: Path, name: str, method: str) -> None:
    folder = RunFolder(tmp_path / "run")
    words = [*METHODS[method], STEPS]
    ended = trainer(tmp_path, *SMOKE, *divided(name), *words)
    assert ended.code == 0, ended.out + ended.err
    assert folder.done.exists()
    assert steps(folder) == [1, 2, 3, 4]
    told = [line.split(" in ")[0] for line in ended.words() if line.endswith(" GB on a rank so far")]
    assert told == (["loaded"] if name == "zero3" else ["loaded", "made ready to train"])
    spec = zero_spec(load_plan(folder.plan_json.read_bytes()))
    assert spec is not None
    assert json.loads(folder.deepspeed_json.read_text()) == deepspeed_config(spec)

    exported, measured, answered = tensors(folder), evaluation(folder), answers(folder)
    assert any(file.startswith("merged/") for file in exported)
    again(tmp_path, folder, [*ALONE, *words])
    assert not folder.deepspeed_json.exists()
    assert_equal(tensors(folder), exported)
    assert answers(folder) == answered
    assert evaluation(folder)["loss"] == pytest.approx(measured["loss"], rel=1e-6)
