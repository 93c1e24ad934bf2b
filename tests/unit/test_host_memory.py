"""Copies for saves behind the training are counted in the main memory, and given up in words where they do not fit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plan_fixtures import planned

from trainer.drive.overview import saves_text
from trainer.drive.space import bytes_needed
from trainer.host_memory import STATE_BYTES, saving_room
from trainer.layout import Devices
from trainer.memory import MemoryEstimate, StrategyName
from trainer.plan import RunPlan, estimate_memory, room_for_saves
from trainer.rank import training

RANK = MemoryEstimate(
    parameters=400, gradients=400, optimizer=800, activations=0, logits=0, communication=0, trainable=100, total=100
)


@pytest.mark.parametrize(
    ("strategy", "owners", "copies"),
    [("single", 1, 1200), ("ddp", 8, 1200), ("fsdp", 8, 600), ("fsdp", 2, 1200), ("zero2", 8, 600)],
)
def test_a_machine_copies_what_its_ranks_own(strategy: StrategyName, owners: int, copies: int) -> None:
    room = saving_room(RANK, strategy, device="cuda", processes=4, owners=owners, main_memory=None)
    assert (room.copies, room.needed, room.why_not) == (copies, copies, "")


def test_beside_them_is_what_the_ranks_have_in_main_memory_anyway() -> None:
    on_cpu = saving_room(RANK, "ddp", device="cpu", processes=2, owners=2, main_memory=4400)
    assert on_cpu.needed == 2 * RANK.peak + 1200
    assert on_cpu.needed == 4400
    assert on_cpu.why_not == ""
    tight = saving_room(RANK, "ddp", device="cpu", processes=2, owners=2, main_memory=4399)
    assert "copies of the state" in tight.why_not


def on_a_machine(home: Path, *words: str, main_memory: int | None = None) -> RunPlan:
    devices = Devices(gpus=0, cores=2, main_memory=main_memory)
    return planned(home, "launch.device=cpu", "launch.processes=1", "method=full", *words, devices=devices)


def test_a_run_without_room_for_copies_waits_for_its_saves(tmp_path: Path) -> None:
    plan = on_a_machine(tmp_path)
    memory = estimate_memory(plan)
    assert memory is not None
    room = room_for_saves(plan, memory)
    assert room.copies == STATE_BYTES * memory.trainable
    assert saves_text(plan, memory).startswith("behind the training, from copies in the main memory: ")
    enough = on_a_machine(tmp_path, main_memory=2 * room.needed)
    assert (enough.waits_for_saves, enough.identity) == ("", plan.identity)
    short = on_a_machine(tmp_path, "parallel.memory_reserve=0.0", main_memory=room.needed - 1)
    assert "do not fit into the main memory" in short.waits_for_saves
    assert short.identity == plan.identity
    assert saves_text(short, memory) == f"the training waits for them: {short.waits_for_saves}"
    waits = on_a_machine(tmp_path, "checkpoint.asynchronous=false", main_memory=2 * room.needed)
    assert waits.waits_for_saves == ""
    assert saves_text(waits, memory) == "the training waits for them (checkpoint.asynchronous=false)"


@pytest.mark.parametrize("why", ["", "copies do not fit"])
def test_a_rank_takes_copies_only_where_the_plan_has_room(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    made: dict[str, Any] = {}
    warned: list[str] = []

    def saver(_strategy: object, _fence: object, channel: object, **_: object) -> None:
        made["channel"] = channel

    monkeypatch.setattr(training, "Saver", saver)
    config = SimpleNamespace(checkpoint=SimpleNamespace(asynchronous=True, keep=1))
    job: Any = SimpleNamespace(
        plan=SimpleNamespace(config=config, waits_for_saves=why, identity=""),
        prepared=SimpleNamespace(base=SimpleNamespace(sha256="")),
        ranks=SimpleNamespace(aside=lambda: "a channel"),
        warn=warned.append,
    )
    other: Any = SimpleNamespace(sync=None)
    training.make_saver(job, other, other, other)
    assert made["channel"] == (None if why else "a channel")
    assert warned == ([f"the training waits for its saves: {why}"] if why else [])


def test_a_checkpoint_on_disk_is_as_large_as_its_copy() -> None:
    need = bytes_needed(weight_bytes=0, trainable=100, keep=1, trains=True, exports_adapter=False, exports_merged=False)
    assert need.checkpoints == 3 * STATE_BYTES * 100
