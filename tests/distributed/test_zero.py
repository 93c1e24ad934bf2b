"""ZeRO with two real ranks: the course of one process, really divided, stopped, moved to and from one process.

One process group for each stage; kills, four ranks, other kinds of models and all pairs of strategies are in
tests/proofs.
"""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import zero_fixtures
from train_fixtures import Run, make_data, read_metrics, run_calls, train_run, with_data

from trainer.distributed.ranks import start_ranks
from trainer.distributed.strategy import StrategyName
from trainer.errors import StoppedInGoodOrder
from trainer.train.checkpoint.format import published, read_manifest

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed (.[deepspeed])")

CLOCK = {"tokens_per_second", "seconds", "memory_gb"}
COURSE = Run(folder="", dropout=0.1, lr=1e-3, packs=4, max_steps=30, validate_every=10)
COURSES = {
    "full": COURSE,
    "lora": replace(COURSE, lora=True),
    "kept": replace(COURSE, keep_whole_below=500, max_steps=4),
}
BFLOAT16 = {"full16": replace(COURSE, dtype="bfloat16", max_steps=4)}
MOVED = replace(COURSE, max_steps=8, validate_every=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """All courses, and the one that is moved, as one process takes them."""
    folder = tmp_path_factory.mktemp("alone")
    for name, run in {**COURSES, **BFLOAT16, "moved": MOVED}.items():
        train_alone(replace(run, folder=str(with_data(folder / name, data))))
    return folder


def train_alone(run: Run) -> None:
    train_run(run, start_ranks(device="cpu", world_size=1))


def differences(one: Path, two: Path, name: str) -> np.ndarray:
    """Of each step that has ``name``: relative above 1, absolute below."""
    pairs = [(a[name], b[name]) for a, b in zip(read_metrics(one), read_metrics(two), strict=True) if name in a]
    return np.array([abs(a - b) / max(1.0, abs(a)) for a, b in pairs])


def bits(folder: Path) -> list[object]:
    """Every recorded figure but times, and the digest of every file of every checkpoint."""
    lines = [{name: value for name, value in line.items() if name not in CLOCK} for line in read_metrics(folder)]
    return [lines, [read_manifest(path).files for path in published(folder / "checkpoints")]]


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_two_ranks(tmp_path: Path, data: Path, alone: Path, kind: StrategyName) -> None:
    """The norm is compared as well as the loss: a wrong scale of the gradients hides behind Adam."""
    courses = {**COURSES, **BFLOAT16}
    folders = {name: str(with_data(tmp_path / name, data)) for name in (*courses, "moved", "straight", "stopped")}
    begun = replace(MOVED, folder=folders["moved"])
    with pytest.raises(StoppedInGoodOrder):
        train_alone(replace(begun, stop_at=2))
    straight, stopped = (replace(MOVED, validate_every=4, folder=folders[name]) for name in ("straight", "stopped"))
    runs = [
        *(replace(run, folder=folders[name]) for name, run in courses.items()),
        replace(begun, stop_at=5),
        straight,
        replace(stopped, stop_at=3),
        stopped,
    ]
    ended = run_calls(partial(zero_fixtures.show_all, kind, runs), tmp_path)
    assert [code for code, _ in ended] == [0, 0], "\n".join(output for _, output in ended)

    train_alone(begun)
    for name in (*COURSES, "moved"):
        assert len(read_metrics(tmp_path / name)) == courses.get(name, MOVED).max_steps
        for figure in ("loss", "grad_norm", "val_loss"):
            found = differences(alone / name, tmp_path / name, figure)
            assert found.max() <= 1e-5, (name, figure)
            assert found.mean() <= 1e-6, (name, figure)
    for name in BFLOAT16:
        assert differences(alone / name, tmp_path / name, "loss").max() <= 1.5e-4, name
        assert differences(alone / name, tmp_path / name, "grad_norm").max() <= 1.5e-3, name
    assert bits(tmp_path / "stopped") == bits(tmp_path / "straight")
