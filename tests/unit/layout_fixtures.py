"""Whole runs of the smoke experiment from the command line, in one layout and again in another."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from cli_fixtures import trainer
from safetensors.torch import load_file

from trainer.paths import RunFolder

STEPS = 40
ALONE = ["launch.processes=1"]
SMOKE = [
    "+experiment=smoke",
    "launch.device=cpu",
    "launch.threads=1",
    "model.dtype=float32",
    f"optim.max_steps={STEPS}",
    "eval.every=4",
    "eval.generate_rows=3",
    "eval.baselines=[]",
    "run.dir=run",
    "run.cache=cache",
]
METHODS = {"lora": [], "full": ["method=full", "~method.rank", "~method.alpha"]}


def tensors(folder: RunFolder) -> dict[str, torch.Tensor]:
    """All that was exported."""
    files = sorted(folder.export.rglob("*.safetensors"))
    return {f"{file.relative_to(folder.export)}:{name}": t for file in files for name, t in load_file(file).items()}


def evaluation(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.evaluation / "tuned.json").read_text())


def answers(folder: RunFolder) -> list[str]:
    return (folder.evaluation / "tuned.predictions.jsonl").read_text().splitlines()


def steps(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.metrics_jsonl.read_text().splitlines()]


def again(cwd: Path, folder: RunFolder, words: list[str]) -> None:
    """Evaluate and export anew, in another layout."""
    trained = (folder.stages / "train.json").read_text()
    for stage in ("evaluate", "export"):
        (folder.stages / f"{stage}.json").unlink()
    shutil.rmtree(folder.export)
    for file in folder.evaluation.glob("tuned.*"):
        file.unlink()
    ended = trainer(cwd, *SMOKE, *words)
    assert ended.code == 0, ended.out + ended.err
    assert (folder.stages / "train.json").read_text() == trained, "it was trained before"


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
