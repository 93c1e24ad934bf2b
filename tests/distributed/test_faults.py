"""Faults of the training and of its machines, on real processes: values that are not finite, a frozen rank, and an old
process that wakes up after another one has taken over its run."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file
from train_fixtures import (
    Run,
    finish,
    read_metrics,
    run_ranks,
    start,
    start_calls,
    train_run,
    wait_until_paused,
    with_data,
)

from trainer.distributed.ranks import Ranks, start_ranks
from trainer.train.checkpoint.format import published, verify
from trainer.train.guard import NonFiniteAction
from trainer.train.watchdog import Watchdog


def stored(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "rank0.safetensors")


def files_of(folder: Path) -> dict[str, bytes]:
    kept = [folder / "metrics.jsonl", *sorted((folder / "checkpoints").rglob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept if path.is_file()}


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_nan_on_one_rank_keeps_both_from_the_step_and_the_run_goes_on(
    tmp_path: Path, data: Path, action: NonFiniteAction
) -> None:
    folder = with_data(tmp_path / "run", data)
    run = Run(
        folder=str(folder), lora=True, world_size=2, max_steps=8, poison_at=6, poison_rank=1, nonfinite=action, keep=9
    )
    ended = run_ranks(run)
    assert [code for code, _ in ended] == [0, 0], ended
    lines = read_metrics(folder)
    assert [line["loss"] == "nan" for line in lines] == [step == 6 for step in range(1, 9)]
    state = verify(published(folder / "checkpoints")[0]).state
    assert (state.step, state.faults, state.faults_in_row) == (8, 1, 0)
    assert state.rollbacks == (action == "rollback")
    assert all(
        torch.isfinite(tensor).all() for path in published(folder / "checkpoints") for tensor in stored(path).values()
    )


def test_a_rollback_is_the_checkpoint_before_and_passes_over_the_data_since(tmp_path: Path, data: Path) -> None:
    folder = with_data(tmp_path, data)
    run = Run(folder=str(folder), max_steps=6, poison_at=6, nonfinite="rollback", keep=9)
    _, state, warnings = train_run(run, start_ranks(device="cpu", world_size=1))
    newest, before = published(folder / "checkpoints")
    assert (newest.name, before.name) == ("step-00000006", "step-00000004")
    assert all(torch.equal(tensor, stored(before)[name]) for name, tensor in stored(newest).items())
    assert (state.step, state.faults, state.rollbacks) == (6, 1, 1)
    assert "back to the weights of step 4; the data of steps 5 to 6 is passed over (1 so far)" in warnings[-1]


def test_an_old_process_that_wakes_up_harms_nothing(tmp_path: Path, data: Path) -> None:
    """Paused in the middle of the run; another process of the same run takes over and finishes; then it goes on."""
    folder = with_data(tmp_path, data)
    run = Run(folder=str(folder), max_steps=10, validate_every=2, keep=1)
    (old,) = start(replace(run, pause_at=5))
    wait_until_paused(old)
    train_run(run, start_ranks(device="cpu", world_size=1))
    before = files_of(folder)
    assert [json.loads(line)["step"] for line in before["metrics.jsonl"].splitlines()] == list(range(1, 11))
    os.kill(old.process.pid or 0, signal.SIGCONT)
    ((code, output),) = finish([old])
    assert code == 2, output
    assert "another process has taken over this run; nothing more of this one is written" in output
    assert files_of(folder) == before


def test_a_frozen_rank_is_named_and_all_stacks_are_written(tmp_path: Path, data: Path) -> None:
    run = Run(
        folder=str(with_data(tmp_path, data)), lora=True, world_size=2, pause_at=6, pause_rank=1, hang_timeout=5.0
    )
    first, frozen = start(run)
    first.process.join(300)
    frozen.process.join(60)  # it was continued, to write its stacks, and finds itself alone
    frozen.process.kill()
    output = first.log.read_text()
    assert first.process.exitcode == 74, output
    assert "error: rank 1 (process " in output
    assert "has given no sign of life for " in output
    assert ": frozen or dead. The run ends; the same command goes on" in output
    assert "train_step" in output, "its stack"
    assert " in interfere\n" in frozen.log.read_text(), "the stack of where it stood"


def wait_for_what_never_comes(folder: Path, ranks: Ranks) -> None:
    """Rank 0 waits for all, rank 1 for nobody: both live, and neither does anything."""
    watchdog = Watchdog(folder / "signs", ranks.rank, ranks.world_size, timeout=5.0)
    watchdog.enter("stage export", 0)
    with watchdog.watching():
        if ranks.is_first:
            ranks.barrier()
        else:
            Event().wait()


def test_a_collective_that_never_returns_is_a_hang_though_all_ranks_live(tmp_path: Path) -> None:
    ranks = start_calls(partial(wait_for_what_never_comes, tmp_path), tmp_path, 2)
    for rank in ranks:
        rank.process.join(300)
        rank.process.kill()
    ended = [rank.log.read_text() for rank in ranks]
    assert 74 in [rank.process.exitcode for rank in ranks], ended
    assert any(
        "error: nothing has moved for 5 s: all ranks are in 'stage export'. The run ends" in log for log in ended
    )
    assert all("wait_for_what_never_comes" in log for log in ended), "both stacks"
