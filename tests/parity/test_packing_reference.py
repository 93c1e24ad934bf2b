"""The compiled packers give what ``reference.py`` says, document for document."""

import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_fixtures import Case, as_lists, cases, chat_lengths

from trainer_kernels import CostModel, pack, packing, reference
from trainer_kernels.order import DOCUMENTS, PACKS, permuted

Algorithm = Literal["rfc", "ffd", "bfd"]
ALGORITHMS: tuple[Algorithm, ...] = ("rfc", "ffd", "bfd")

max_docs_or_none = st.one_of(st.none(), st.integers(1, 6))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(case=cases(), max_docs=max_docs_or_none)
@settings(max_examples=100, deadline=None)
def test_packs_equal_the_reference(algorithm: Algorithm, case: Case, max_docs: int | None) -> None:
    plan = pack(case.lengths, case.capacity, algorithm=algorithm, seed=case.seed, epoch=case.epoch, max_docs=max_docs)
    expected = reference.pack(
        case.lengths.tolist(),
        case.capacity,
        algorithm=algorithm,
        seed=case.seed,
        epoch=case.epoch,
        max_docs=max_docs,
    )
    assert as_lists(plan) == expected


@given(case=cases(), pool=st.integers(1, 40), block=st.integers(1, 60), max_docs=max_docs_or_none)
@settings(max_examples=100, deadline=None)
def test_a_small_pool_and_small_blocks_equal_the_reference(
    case: Case, pool: int, block: int, max_docs: int | None
) -> None:
    packer = packing.Packer(
        case.lengths, case.capacity, seed=case.seed, pool=pool, max_docs=max_docs, block_documents=block
    )
    expected = reference.pack(
        case.lengths.tolist(),
        case.capacity,
        seed=case.seed,
        epoch=case.epoch,
        pool=pool,
        max_docs=max_docs,
        block=block,
    )
    whole = packer.epoch(case.epoch)
    blocks = packing.joined([packer.block(case.epoch, number) for number in range(packer.blocks)])
    assert packer.blocks == -(-len(case.lengths) // block)
    assert as_lists(whole) == as_lists(blocks) == expected
    assert math.isclose(whole.fill, blocks.fill)
    assert math.isclose(whole.fill, case.lengths.sum() / (len(whole) * case.capacity))


@pytest.mark.parametrize("algorithm", ["ffd", "bfd"])
@given(case=cases(), stretches=st.integers(1, 60), max_docs=max_docs_or_none)
@settings(max_examples=100, deadline=None)
def test_stretches_of_several_documents_equal_the_reference(
    algorithm: Literal["ffd", "bfd"], case: Case, stretches: int, max_docs: int | None
) -> None:
    items, offsets = packing.plan_decreasing(
        case.lengths,
        int(case.lengths.max()),
        case.capacity,
        algorithm,
        seed=case.seed,
        epoch=case.epoch,
        max_docs=max_docs or packing.MAX_DOCUMENTS,
        stretches=stretches,
    )
    expected = reference.pack(
        case.lengths.tolist(),
        case.capacity,
        algorithm=algorithm,
        seed=case.seed,
        epoch=case.epoch,
        max_docs=max_docs,
        stretches=stretches,
    )
    assert as_lists(packing.PackPlan(items, offsets, 0.0)) == expected


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_many_packs_filled_alike_equal_the_reference(algorithm: Algorithm) -> None:
    """Few lengths: runs of hundreds of packs, more than are written together."""
    lengths = np.random.default_rng(0).choice([3, 5, 7], 1500).astype(np.int32)
    assert as_lists(pack(lengths, 15, algorithm=algorithm, seed=2)) == reference.pack(
        lengths.tolist(), 15, algorithm=algorithm, seed=2
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_many_documents_equal_the_reference(algorithm: Algorithm) -> None:
    """Longer problems than hypothesis likes to draw, so that pools fill up and patterns repeat."""
    random = np.random.default_rng(0)
    for seed in range(120):
        capacity = int(random.integers(10, 100))
        lengths = random.integers(1, random.integers(2, capacity + 2), int(random.integers(10, 100)))
        pool = int(random.integers(1, 20)) if algorithm == "rfc" else None
        max_docs = None if seed % 2 else int(random.integers(1, 9))
        plan = pack(lengths, capacity, algorithm=algorithm, seed=seed, pool=pool, max_docs=max_docs)
        expected = reference.pack(
            lengths.tolist(), capacity, algorithm=algorithm, seed=seed, pool=pool, max_docs=max_docs
        )
        assert as_lists(plan) == expected


def test_the_default_pool_holds_four_packs() -> None:
    """500 documents in a pack and 3000 in all: 2000 are looked at, not 1024."""
    lengths = np.random.default_rng(0).integers(1, 20, 3000)
    capacity = 500 * int(lengths.sum()) // 3000
    plan = as_lists(pack(lengths, capacity))
    assert plan == reference.pack(lengths.tolist(), capacity)
    assert plan != as_lists(pack(lengths, capacity, pool=1024))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("capacity", [4096, 8192, 70_000])
def test_wide_tables_equal_the_reference(algorithm: Algorithm, capacity: int) -> None:
    """Real capacities: the two-level bit sets span several words and blocks."""
    lengths = np.concatenate([chat_lengths(500, capacity, seed=capacity), [capacity, capacity - 1, capacity // 2 + 1]])
    plan = pack(lengths, capacity, algorithm=algorithm, seed=3)
    assert as_lists(plan) == reference.pack(lengths.tolist(), capacity, algorithm=algorithm, seed=3)


@pytest.mark.parametrize("seed", range(8))
def test_big_documents_come_first_from_exactly_the_given_share_on(seed: int) -> None:
    """One pack of 97 for the big document holds 97 % of 100 tokens: that is enough. Of 101 it is not."""
    for lengths in ([60, 10, 10, 10, 10], [60, 10, 10, 10, 11]):
        plan = pack(np.array(lengths), 97, seed=seed)
        assert as_lists(plan) == reference.pack(lengths, 97, seed=seed)
        assert sum(lengths) > 100 or plan.items[0] == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_packing_by_cost_is_packing_of_weights(algorithm: Algorithm) -> None:
    lengths = chat_lengths(400, 2000)
    cost = CostModel(a=1.0, b=1.0e-3)
    weights = cost.weight(lengths)
    assert weights.tolist() == [reference.weight(length, 1.0, 1.0e-3) for length in lengths.tolist()]
    by_cost = pack(lengths, 6000, algorithm=algorithm, cost=cost)
    by_weight = pack(weights, 6000, algorithm=algorithm)
    assert as_lists(by_cost) == as_lists(by_weight)
    assert by_cost.fill == by_weight.fill
    assert max(sum(lengths[i] for i in packed) for packed in as_lists(by_cost)) <= 6000


@given(
    count=st.integers(1, 9000),
    seed=st.integers(0, (1 << 64) - 1),
    epoch=st.integers(0, (1 << 32) - 1),
    purpose=st.sampled_from([DOCUMENTS, PACKS]),
)
@settings(max_examples=20, deadline=None)
def test_the_order_equals_the_reference(count: int, seed: int, epoch: int, purpose: int) -> None:
    assert permuted(count, seed, epoch, purpose).tolist() == reference.permutation(count, seed, epoch, purpose)


@given(count=st.integers(1, 9000), first=st.integers(0, 9000), stop=st.integers(0, 9000), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_any_part_of_the_order_is_that_part_of_it(count: int, first: int, stop: int, seed: int) -> None:
    first, stop = sorted((min(first, count), min(stop, count)))
    assert np.array_equal(
        permuted(count, seed, 0, DOCUMENTS, first, stop), permuted(count, seed, 0, DOCUMENTS)[first:stop]
    )


def _item_by_item(lengths: list[int], capacity: int, best: bool) -> list[int]:
    """Room taken per pack by the textbook's decreasing packers, without any seeded order."""
    taken: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, used in enumerate(taken) if used + length <= capacity]
        if fitting:
            taken[max(fitting, key=lambda place: taken[place]) if best else fitting[0]] += length
        else:
            taken.append(length)
    return sorted(taken)


@given(case=cases())
@settings(max_examples=80, deadline=None)
def test_ffd_and_bfd_fill_packs_as_the_textbook_does(case: Case) -> None:
    cases: tuple[tuple[Algorithm, bool], ...] = (("ffd", False), ("bfd", True))
    for algorithm, best in cases:
        plan = pack(case.lengths, case.capacity, algorithm=algorithm, seed=case.seed)
        filled = sorted(int(case.lengths[plan.pack(i)].sum()) for i in range(len(plan)))
        assert filled == _item_by_item(case.lengths.tolist(), case.capacity, best)
