"""Steps, epochs, ranks and targets: the schedule against the obvious list of packs, and what it refuses."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_fixtures import chat_lengths, random_arena
from numpy.typing import NDArray

from trainer_kernels import (
    CostModel,
    Packer,
    PackingError,
    PackPlan,
    Schedule,
    collate,
    pack,
    reference,
    schedule,
    schedule_of,
)

LENGTHS = chat_lengths(400, 1000)
TARGETS = np.random.default_rng(1).integers(1, LENGTHS + 1).astype(np.int32)


def plans(seed: int = 0, capacity: int = 1000) -> Callable[[int], PackPlan]:
    return lambda epoch: pack(LENGTHS, capacity, seed=seed, epoch=epoch)


def make(**changes: Any) -> Schedule:
    options: dict[str, Any] = {"epochs": 2.0, "world_size": 2, "accumulation": 3} | changes
    return schedule(options.pop("packs", plans()), options.pop("targets", TARGETS), **options)


def steps_of(made: Schedule, start: int = 0) -> list[list[list[list[int]]]]:
    """``[step][rank][micro]`` document ids."""
    ranks = [
        [[ids.tolist() for ids in micro] for micro in made.batches(rank, start)] for rank in range(made.world_size)
    ]
    return [list(step) for step in zip(*ranks, strict=True)]


options = st.fixed_dictionaries(
    {
        "epochs": st.one_of(st.integers(1, 3).map(float), st.floats(0.1, 3.2), st.sampled_from([0.1, 0.3, 1.1])),
        "world_size": st.integers(1, 4),
        "accumulation": st.integers(1, 3),
        "max_steps": st.one_of(st.none(), st.integers(1, 60)),
    }
)


@given(options=options, seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_steps_equal_the_reference(options: dict[str, Any], seed: int) -> None:
    packs = plans(seed)
    made = make(packs=packs, **options)
    per_step = made.world_size * made.accumulation
    expected = reference.steps(
        lambda epoch: len(packs(epoch)),
        epochs=options["epochs"],
        packs_per_step=per_step,
        max_steps=options["max_steps"],
    )
    assert [made.positions(step) for step in range(made.num_steps)] == expected
    assert made.num_packs == sum(position is not None for step in expected for position in step)
    assert made.num_empty == sum(position is None for step in expected for position in step)
    for step, found in enumerate(steps_of(made)):
        for place, position in enumerate(expected[step]):
            ids = found[place % made.world_size][place // made.world_size]
            assert ids == ([] if position is None else packs(position[0]).pack(position[1]).tolist())
        documents = [document for rank in found for micro in rank for document in micro]
        assert made.num_targets(step) == TARGETS[documents].sum()


def test_every_document_comes_once_per_epoch() -> None:
    made = make(epochs=3.0)
    seen = [document for step in steps_of(made) for rank in step for micro in rank for document in micro]
    assert np.bincount(seen).tolist() == [3] * len(LENGTHS)
    assert sum(made.num_targets(step) for step in range(made.num_steps)) == 3 * int(TARGETS.sum())


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_any_world_size_has_the_same_global_batches(world_size: int, accumulation: int) -> None:
    one = make(world_size=1, accumulation=12)
    many = make(world_size=world_size, accumulation=accumulation)
    assert many.num_steps == one.num_steps
    for step in range(one.num_steps):
        assert many.positions(step) == one.positions(step)
        assert many.num_targets(step) == one.num_targets(step)
    assert [sorted(map(tuple, (micro for rank in step for micro in rank))) for step in steps_of(many)] == [
        sorted(map(tuple, (micro for rank in step for micro in rank))) for step in steps_of(one)
    ]


def test_seeking_equals_going_there() -> None:
    made = make(epochs=2.5)
    whole = steps_of(made)
    for start in range(made.num_steps + 1):
        assert steps_of(make(epochs=2.5), start) == whole[start:]


def test_an_epochs_remainder_opens_the_next_and_only_the_last_step_has_empty_packs() -> None:
    made = make(epochs=2.0)
    row = [position for step in range(made.num_steps) for position in made.positions(step)]
    counts = [len(plans()(epoch)) for epoch in (0, 1)]
    assert counts[0] % made.packs_per_step != 0
    assert sum(counts) % made.packs_per_step != 0
    assert row[: sum(counts)] == [(0, p) for p in range(counts[0])] + [(1, p) for p in range(counts[1])]
    assert row[sum(counts) :] == [None] * made.num_empty
    assert 0 < made.num_empty < made.packs_per_step


def test_epoch_of_counts_what_is_done() -> None:
    made = make(epochs=1.5)
    done = [made.epoch_of(step) for step in range(made.num_steps)]
    assert done == sorted(done)
    first, second = len(plans()(0)), len(plans()(1))
    assert done[0] == made.packs_per_step / first
    assert done[-1] == 1 + -(-second // 2) / second


@pytest.mark.parametrize(("epochs", "expected"), [(0.1, 1), (0.3, 3), (0.7, 7), (1.1, 11), (2.0, 20), (1e-9, 1)])
def test_a_tenth_means_a_tenth(epochs: float, expected: int) -> None:
    """0.1, 0.7 and 1.1 are a little above their decimal as doubles; ten packs must not become one more for that."""
    ten = pack(np.full(10, 5), 5)
    made = schedule(lambda epoch: ten, np.ones(10, np.int32), epochs=epochs, world_size=1, accumulation=1)
    assert made.num_packs == expected


def test_max_steps_cuts_and_later_epochs_are_not_planned() -> None:
    asked: list[int] = []

    def packs(epoch: int) -> PackPlan:
        asked.append(epoch)
        return plans()(epoch)

    made = make(packs=packs, epochs=1000.0, max_steps=5)
    assert made.num_steps == 5
    assert made.num_empty == 0
    assert asked == [0]
    assert make(epochs=1.0, max_steps=10_000).num_steps == make(epochs=1.0).num_steps


COSTS = CostModel(1.0, 2.0e-3).weight(LENGTHS)


def _step_costs(made: Schedule, step: int) -> NDArray[np.int64]:
    """Cost of each pack, ``[micro, rank]``."""
    plan_of = plans()
    costs = [0 if at is None else int(COSTS[plan_of(at[0]).pack(at[1])].sum()) for at in made.positions(step)]
    return np.array(costs).reshape(made.accumulation, made.world_size)


@pytest.mark.parametrize("sync", ["micro", "step"])
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_costs_change_who_does_a_pack_but_not_the_step(
    sync: Literal["micro", "step"], world_size: int, accumulation: int
) -> None:
    plain = make(world_size=world_size, accumulation=accumulation)
    balanced = make(world_size=world_size, accumulation=accumulation, sync=sync, costs=COSTS)
    assert balanced.num_steps == plain.num_steps
    for step in range(plain.num_steps):
        key = repr
        assert sorted(balanced.positions(step), key=key) == sorted(plain.positions(step), key=key)
        assert balanced.num_targets(step) == plain.num_targets(step)


def test_micro_sync_runs_packs_of_like_cost_together() -> None:
    plain, balanced = make(world_size=4, accumulation=8), make(world_size=4, accumulation=8, costs=COSTS)
    waits = [[int(_step_costs(made, 0).max(axis=1).sum()) for made in (plain, balanced)]]
    assert waits[0][1] < waits[0][0]
    flat = _step_costs(balanced, 0).ravel().tolist()
    assert flat == sorted(flat, reverse=True)


def test_step_sync_gives_ranks_even_sums_of_equally_many_packs() -> None:
    balanced = make(world_size=4, accumulation=8, sync="step", costs=COSTS)
    sums = _step_costs(balanced, 0).sum(axis=0)
    plain = _step_costs(make(world_size=4, accumulation=8), 0).sum(axis=0)
    assert sums.max() - sums.min() < (plain.max() - plain.min()) / 3


def test_num_targets_are_the_targets_of_the_collated_batches(tmp_path: Path) -> None:
    arena = random_arena(tmp_path / "arena", documents=200, longest=60)
    made = schedule(
        lambda epoch: pack(arena.lengths, 128, epoch=epoch),
        arena.targets,
        epochs=1.5,
        world_size=2,
        accumulation=2,
    )
    for step, ranks in enumerate(zip(made.batches(0), made.batches(1), strict=True)):
        batches = [collate(arena, ids, pad_to=128) for micro in ranks for ids in micro]
        assert sum(batch.num_targets for batch in batches) == made.num_targets(step)
        assert sum(int((batch.labels != -100).sum()) for batch in batches) == made.num_targets(step)


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"world_size": 0}, ["world_size is out of range", "got: 0"]),
    ({"accumulation": 0}, ["accumulation is out of range", "got: 0"]),
    ({"max_steps": 0}, ["max_steps is out of range", "got: 0"]),
    ({"epochs": 0.0}, ["epochs is out of range", "got: 0.0", "above 0"]),
    ({"epochs": float("inf")}, ["epochs is out of range", "got: inf"]),
    ({"sync": "never"}, ["unknown kind of sync", "got: 'never'", "micro, step"]),
    (
        {"world_size": 64, "accumulation": 16, "epochs": 1.0},
        [
            "fewer packs than one optimizer step takes",
            "packs in 1 epochs",
            "at least 1024 (world_size 64 x",
            "more epochs",
        ],
    ),
    (
        {"targets": TARGETS[:-1]},
        ["the plan and the targets are of different documents", "400 documents", "399 targets"],
    ),
    ({"costs": COSTS[1:]}, ["the plan and the costs are of different documents", "399 costs"]),
    ({"targets": TARGETS.astype(np.float32)}, ["targets must be one whole number per document", "float32"]),
    ({"targets": np.where(TARGETS > 0, -1, 0)}, ["targets below 0", "400 of 400"]),
    ({"targets": np.zeros_like(TARGETS)}, ["optimizer steps without a single target", "the first: step 0", "0 / 0"]),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_bad_input_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PackingError) as caught:
        make(**changes)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_a_last_step_without_targets_is_refused() -> None:
    ten = pack(np.full(10, 5), 5)
    targets = np.ones(10, np.int32)
    targets[ten.pack(9)] = 0
    with pytest.raises(PackingError, match=r"1 of 4 steps, the first: step 3"):
        schedule(lambda epoch: ten, targets, epochs=1, world_size=3, accumulation=1)


def test_steps_and_ranks_that_do_not_exist_are_refused() -> None:
    made = make()
    for step in (-1, made.num_steps):
        for ask in (made.num_targets, made.positions, made.epoch_of):
            with pytest.raises(PackingError, match="step is out of range"):
                ask(step)
    with pytest.raises(PackingError, match="rank is out of range"):
        made.batches(2)
    with pytest.raises(PackingError, match="start is out of range"):
        made.batches(0, made.num_steps + 1)
    assert list(made.batches(0, made.num_steps)) == []


def test_packs_that_change_between_calls_are_refused() -> None:
    calls: list[int] = []

    def packs(epoch: int) -> PackPlan:
        calls.append(epoch)
        return plans(capacity=1000 if len(calls) <= 3 else 2000)(epoch)

    made = make(packs=packs, epochs=3.0)
    with pytest.raises(PackingError, match="epoch 0 was packed in another way than before") as caught:
        next(made.batches(0))
    assert caught.value.allowed.endswith("packs, as when the schedule was made")


def test_threads_that_want_the_same_plan_make_it_once_and_nobody_waits_for_one_that_is_there() -> None:
    lengths = np.full(40, 10, np.int32)
    made: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def packs(epoch: int) -> PackPlan:
        made.append(epoch)
        if made.count(2) > 1:  # the first time is when the schedule is made
            begun.set()
            assert go_on.wait(60)
        return pack(lengths, 20, epoch=epoch)

    steps = schedule(packs, lengths, epochs=5, world_size=1, accumulation=1)
    steps.plan(1)
    found: list[PackPlan] = []
    threads = [threading.Thread(target=lambda: found.append(steps.plan(2))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    assert len(steps.plan(1)) == 20, "there already, while another thread makes the next one"
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert found[0] is found[1]
    assert made == [0, 1, 2, 3, 4, 1, 2]


@pytest.mark.parametrize("epochs", [2.4, 1.0])
def test_blocks_of_an_epoch_are_the_epoch_and_are_packed_one_by_one(epochs: float) -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 1000).astype(np.int32)
    packer = Packer(lengths, 100, seed=3, block_documents=128)
    assert packer.blocks == 8
    made: list[int] = []

    def parts(part: int) -> PackPlan:
        made.append(part)
        return packer.block(*divmod(part, packer.blocks))

    options = {"epochs": epochs, "world_size": 2, "accumulation": 3}
    whole = schedule(packer.epoch, lengths, **options)
    blocks = schedule(parts, lengths, blocks=packer.blocks, **options)
    assert (blocks.num_steps, blocks.num_packs) == (whole.num_steps, whole.num_packs)
    for step in range(whole.num_steps):
        assert blocks.num_targets(step) == whole.num_targets(step)
        assert blocks.epoch_of(step) == whole.epoch_of(step)
        assert [d.tolist() for d in blocks.documents(step)] == [d.tolist() for d in whole.documents(step)]
    assert blocks.plan(0).items.tolist() == packer.epoch(0).items.tolist()
    made.clear()
    again = schedule_of(parts, blocks.row, world_size=2, accumulation=3)
    step = again.num_steps // 2
    next(again.batches(0, step))
    assert made == sorted({at[0] for at in again.positions(step) if at is not None})
    assert len(made) <= 2


def test_a_block_of_other_documents_is_refused() -> None:
    lengths = np.full(300, 10, np.int32)
    packer = Packer(lengths, 20, block_documents=100)
    for count in (299, 301, 90):
        with pytest.raises(PackingError, match="the plan and the targets are of different documents"):
            schedule(
                lambda part: packer.block(0, part), lengths[:1].repeat(count), epochs=1, world_size=1, accumulation=1,
                blocks=3,
            )  # fmt: skip
    with pytest.raises(PackingError, match="the number of a block"):
        packer.block(0, 3)
