"""Runs that are stopped or killed (SIGKILL) go on bit by bit: one process and two, dropout on, mid-epoch."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from train_fixtures import Run, read_metrics, run_ranks, train_run, with_data

from trainer.distributed.ranks import start_ranks
from trainer.train.checkpoint.format import published, verify


def bits(folder: Path) -> list[dict[str, float]]:
    clock = {"tokens_per_second", "seconds", "memory_gb"}
    return [{name: value for name, value in line.items() if name not in clock} for line in read_metrics(folder)]


def hashes(folder: Path) -> dict[str, dict[str, str]]:
    manifests = [json.loads((path / "manifest.json").read_text()) for path in published(folder / "checkpoints")]
    return {str(m["step"]): {name: info["sha256"] for name, info in m["files"].items()} for m in manifests}


def codes(run: Run) -> list[int]:
    """Exit codes of the ranks; a single rank that nothing happens to runs right here."""
    if run.world_size == 1 and not run.kill_at and not run.stop_at:
        train_run(run, start_ranks(device="cpu", world_size=1))
        return [0]
    return [code for code, _ in run_ranks(run)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stopped_and_killed_run_equals_a_straight_one(tmp_path: Path, data: Path, world_size: int) -> None:
    """The last rank hears SIGTERM in step 8, where a validation is due; the resumed run is killed in step 11.

    ``min_improvement`` is so large that no validation counts: patience of 4 ends the run at step 20 of 23, which a
    resume that forgot the count would not.
    """
    run = Run(
        folder=str(with_data(tmp_path / "straight", data)),
        lora=world_size == 1,
        dropout=0.1,
        world_size=world_size,
        patience=4,
        min_improvement=100.0,
    )
    assert codes(run) == [0] * world_size
    assert len(bits(tmp_path / "straight")) == 20

    other = replace(run, folder=str(with_data(tmp_path / "other", data)))
    stopped = run_ranks(replace(other, stop_at=8, stop_rank=world_size - 1))
    assert [code for code, _ in stopped] == [75] * world_size, stopped
    assert all("stopped after step 8; the state is saved" in output for _, output in stopped)
    newest = published(tmp_path / "other" / "checkpoints")[0]
    assert newest.name == "step-00000008"
    assert verify(newest).state.pending is not None, "the validation that was due waits for the resumed run"
    assert len(bits(tmp_path / "other")) == 7

    assert -9 in codes(replace(other, kill_at=11))
    assert len(bits(tmp_path / "other")) == 10
    assert codes(other) == [0] * world_size
    assert bits(tmp_path / "other") == bits(tmp_path / "straight")
    assert hashes(tmp_path / "other") == hashes(tmp_path / "straight")


def test_a_run_goes_on_at_another_world_size(tmp_path: Path, data: Path) -> None:
    """One rank, then two, then one again: the course of one rank alone, up to the order of sums."""
    run = Run(folder=str(with_data(tmp_path / "alone", data)), dropout=0.1, lr=1e-3, epochs=2.0)
    assert codes(run) == [0]
    moved = replace(run, folder=str(with_data(tmp_path / "moved", data)))
    assert codes(replace(moved, stop_at=5)) == [75]
    assert codes(replace(moved, world_size=2, stop_at=10)) == [75, 75]
    assert codes(moved) == [0]
    alone, there = bits(tmp_path / "alone"), bits(tmp_path / "moved")
    for name, largest, mean in (("loss", 1e-5, 2e-6), ("grad_norm", 1e-4, 1e-5)):
        relative = np.array(
            [abs(a[name] - b[name]) / max(1.0, abs(a[name])) for a, b in zip(alone, there, strict=True)]
        )
        assert relative.max() <= largest, name
        assert relative.mean() <= mean, name
    assert [line["tokens"] for line in alone] == [line["tokens"] for line in there]
