"""Strategies against each other on up to four ranks: one course, and a checkpoint of each goes on under every other.

Full fine-tuning and LoRA, in float32, with dropout. Two ranks of the same are in tests/distributed.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from train_fixtures import Run, make_arena, read_metrics, run_ranks

from trainer.distributed.strategy import StrategyName
from trainer.train.checkpoint.format import published, read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

Layout = tuple[StrategyName, Literal[1, 2, 4]]
LAYOUTS: list[Layout] = [("single", 1), ("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)]
CLOCK = {"tokens_per_second", "seconds", "memory_gb"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_arena(folder / "train", documents=120)
    make_arena(folder / "validation", documents=12, seed=9)
    return folder


def placed(run: Run, folder: Path, data: Path, layout: Layout) -> Run:
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        if not (folder / split).exists():
            (folder / split).symlink_to(data / split)
    return replace(run, folder=str(folder), strategy=layout[0], world_size=layout[1])


def end(run: Run, code: int = 0) -> None:
    ended = run_ranks(run)
    assert [each for each, _ in ended] == [code] * run.world_size, "\n".join(output for _, output in ended)


def compare(one: Path, two: Path, names: tuple[str, ...]) -> None:
    lines = list(zip(read_metrics(one), read_metrics(two), strict=True))
    for name in names:
        pairs = [(a[name], b[name]) for a, b in lines if name in a]
        found = np.array([abs(a - b) / max(1.0, abs(a)) for a, b in pairs])
        assert found.max() <= 1e-5, name
        assert found.mean() <= 1e-6, name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_all_layouts_take_one_course(tmp_path: Path, data: Path, lora: bool) -> None:
    run = Run(folder="", lora=lora, dropout=0.1, lr=1e-3, packs=8, max_steps=30)
    for layout in LAYOUTS:
        end(placed(run, tmp_path / f"{layout[0]}{layout[1]}", data, layout))
    for kind, ranks in LAYOUTS[1:]:
        compare(tmp_path / "single1", tmp_path / f"{kind}{ranks}", ("loss", "grad_norm", "val_loss"))
    assert len(read_metrics(tmp_path / "single1")) == 30


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("source", LAYOUTS, ids=lambda layout: f"{layout[0]}{layout[1]}")
def test_a_checkpoint_goes_on_under_every_layout(tmp_path: Path, data: Path, source: Layout, lora: bool) -> None:
    run = Run(folder="", lora=lora, dropout=0.1, lr=1e-3, packs=4, max_steps=10, validate_every=5)
    end(placed(run, tmp_path / "straight", data, ("single", 1)))
    begun = placed(run, tmp_path / "begun", data, source)
    end(replace(begun, stop_at=4), 75)
    for target in LAYOUTS:
        moved = tmp_path / f"{target[0]}{target[1]}"
        shutil.copytree(tmp_path / "begun", moved, symlinks=True)
        end(placed(run, moved, data, target))
        compare(tmp_path / "straight", moved, ("loss", "grad_norm", "val_loss"))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_four_ranks_that_are_killed_go_on_bit_by_bit(tmp_path: Path, data: Path, lora: bool) -> None:
    run = Run(folder="", lora=lora, dropout=0.1, packs=4, max_steps=12)
    straight = placed(run, tmp_path / "straight", data, ("fsdp", 4))
    end(straight)
    other = placed(run, tmp_path / "other", data, ("fsdp", 4))
    assert -9 in [code for code, _ in run_ranks(replace(other, kill_at=7))]
    end(other)

    def bits(folder: Path) -> list[object]:
        lines = [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(folder)]
        return [lines, [read_manifest(path).files for path in published(folder / "checkpoints")]]

    assert bits(tmp_path / "other") == bits(tmp_path / "straight")
