"""Two real ranks over gloo: the course of one rank, one decision for all, and nothing poisoned on disk."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from train_fixtures import Run, read_metrics, run_ranks, train_run, with_data

from trainer.distributed.ranks import start_ranks
from trainer.train.checkpoint.format import published


@pytest.mark.parametrize("lora", [False, True])
def test_two_ranks_take_the_course_of_one(tmp_path: Path, data: Path, lora: bool) -> None:
    """Also with dropout, whose noise belongs to the documents. 45 packs: the last step of four has three of filler."""
    run = Run(folder=str(with_data(tmp_path / "one", data)), lora=lora, dropout=0.1, lr=1e-3, packs=4)
    _, alone, _ = train_run(run, start_ranks(device="cpu", world_size=1))
    ended = run_ranks(replace(run, folder=str(with_data(tmp_path / "two", data)), world_size=2))
    assert [code for code, _ in ended] == [0, 0], ended
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert len(one) == len(two) == alone.step
    for name, largest, mean in (("loss", 1e-5, 2e-6), ("grad_norm", 1e-4, 1e-5), ("val_loss", 1e-5, 2e-6)):
        pairs = [(a[name], b[name]) for a, b in zip(one, two, strict=True) if name in a]
        relative = np.array([abs(a - b) / max(1.0, abs(a)) for a, b in pairs])
        assert relative.max() <= largest, name
        assert relative.mean() <= mean, name
    for name in ("step", "tokens", "targets", "epoch", "lr"):
        assert [line[name] for line in one] == [line[name] for line in two], name


def test_a_nan_on_one_rank_stops_both_before_the_step(tmp_path: Path, data: Path) -> None:
    run = Run(folder=str(with_data(tmp_path / "run", data)), lora=True, world_size=2, poison_at=6, poison_rank=1)
    ended = run_ranks(run)
    assert [code for code, _ in ended] == [1, 1], ended
    for _, output in ended:
        assert "step 6: the loss is not a finite number" in output
        assert "nan on rank 1, micro-batch 1 of 1; documents: document " in output
        assert "Traceback" not in output
    lines = read_metrics(tmp_path / "run")
    assert (lines[-1]["step"], lines[-1]["loss"]) == (6, "nan")
    assert [path.name for path in published(tmp_path / "run" / "checkpoints")] == ["step-00000004"]
