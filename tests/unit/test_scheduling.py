"""What prepare records of the packs: with it the schedule is the same, and ranks pack only what they need."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_fixtures import chat_lengths

from trainer.data import scheduling
from trainer.data.scheduling import ScheduleOptions, read_row, row_key, save_row, training_schedule
from trainer.errors import DataError
from trainer_kernels import Packer, PackPlan, PackRow, Schedule

LENGTHS = chat_lengths(400, 1000)
TARGETS = np.random.default_rng(1).integers(1, LENGTHS + 1).astype(np.int32)
OPTIONS = ScheduleOptions(capacity=1000, seed=4, epochs=3.0, world_size=2, accumulation=3)
SHA = "0" * 64


def saved(path: Path, row: PackRow, key: str = "the key") -> PackRow:
    save_row(path, row, key=key)
    found = read_row(path, key=key)
    assert found is not None
    return found


def everything(made: Schedule) -> list[tuple[int, float, list[list[int]]]]:
    return [
        (made.num_targets(step), made.epoch_of(step), [documents.tolist() for documents in made.documents(step)])
        for step in range(made.num_steps)
    ]


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs that were packed, in order; each is one block here."""
    epochs: list[int] = []

    class Noted(Packer):
        def block(self, epoch: int, number: int) -> PackPlan:
            epochs.append(epoch)
            return super().block(epoch, number)

    monkeypatch.setattr(scheduling, "Packer", Noted)
    return epochs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epochs": 1.5},
        {"max_steps": 40},
        {"algorithm": "ffd", "max_documents": 3},
        {"cost_ratio": 1e-2, "sync": "micro"},
    ],
)
def test_the_schedule_is_the_same_with_the_record(tmp_path: Path, changes: dict[str, Any]) -> None:
    options = replace(OPTIONS, **changes)
    made = training_schedule(LENGTHS, TARGETS, options)
    row = saved(tmp_path / "schedule.npz", made.row)
    again = training_schedule(LENGTHS, TARGETS, options, row)
    assert (row.costs is None) == (made.row.costs is None) == ("cost_ratio" not in changes)
    assert row.most_documents == made.row.most_documents
    assert (again.num_steps, again.num_packs) == (made.num_steps, made.num_packs)
    assert everything(again) == everything(made)


def test_the_record_is_good_at_any_world_size(tmp_path: Path) -> None:
    row = saved(tmp_path / "schedule.npz", training_schedule(LENGTHS, TARGETS, OPTIONS).row)
    alone = replace(OPTIONS, world_size=1, accumulation=6)
    assert row_key(SHA, alone) == row_key(SHA, OPTIONS)
    assert everything(training_schedule(LENGTHS, TARGETS, alone, row)) == everything(
        training_schedule(LENGTHS, TARGETS, alone)
    )


@pytest.mark.parametrize("max_steps", [None, 60])
def test_with_the_record_only_the_epochs_that_are_asked_for_are_packed(
    packed: list[int], max_steps: int | None
) -> None:
    options = replace(OPTIONS, max_steps=max_steps)
    row = training_schedule(LENGTHS, TARGETS, options).row
    assert packed != []
    packed.clear()
    made = training_schedule(LENGTHS, TARGETS, options, row)
    assert made.num_targets(made.num_steps - 1) > 0
    assert packed == []
    last = made.num_steps - 1
    next(made.batches(0, last))
    needed = sorted({place[0] for place in made.positions(last) if place is not None})
    assert packed == needed
    assert 0 not in needed
    next(made.batches(0))
    next(made.batches(1))
    assert packed == [*needed, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity": 1001},
        {"algorithm": "bfd"},
        {"max_documents": 9},
        {"seed": 5},
        {"epochs": 2.0},
        {"max_steps": 7},
        {"accumulation": 4},
        {"cost_ratio": 1e-4},
    ],
)
def test_a_record_of_other_packs_is_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "schedule.npz"
    save_row(path, training_schedule(LENGTHS, TARGETS, OPTIONS).row, key=row_key(SHA, OPTIONS))
    assert read_row(path, key=row_key(SHA, OPTIONS)) is not None
    assert read_row(path, key=row_key(SHA, replace(OPTIONS, **changes))) is None
    assert read_row(path, key=row_key("1" * 64, OPTIONS)) is None


def test_no_record_or_half_of_one_is_none(tmp_path: Path) -> None:
    path = tmp_path / "schedule.npz"
    assert read_row(path, key="") is None
    save_row(path, training_schedule(LENGTHS, TARGETS, OPTIONS).row, key="")
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert read_row(path, key="") is None, size
    path.write_bytes(whole[:400] + bytes([whole[400] ^ 1]) + whole[401:])
    assert read_row(path, key="") is None
    path.write_bytes(whole)
    assert read_row(path, key="") is not None


def test_a_record_of_other_documents_is_found_out_when_they_are_packed() -> None:
    row = training_schedule(LENGTHS, TARGETS, OPTIONS).row
    other = training_schedule(LENGTHS[:200], TARGETS[:200], OPTIONS, row)
    with pytest.raises(ValueError, match="epoch 0 was packed in another way than before"):
        other.documents(0)


def test_too_few_packs_are_refused_with_the_record_too() -> None:
    row = training_schedule(LENGTHS, TARGETS, OPTIONS).row
    with pytest.raises(DataError, match="the whole run has fewer packs than one optimizer step takes"):
        training_schedule(LENGTHS, TARGETS, replace(OPTIONS, accumulation=10_000), row)
