"""What every plan must be, whatever the algorithm, and what ``pack`` refuses."""

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_fixtures import Case, as_lists, cases, chat_lengths
from numpy.typing import NDArray

from trainer_kernels import CostModel, PackingError, PackPlan, pack, packing, schedule
from trainer_kernels.order import DOCUMENTS, PACKS, permuted

Algorithm = Literal["rfc", "ffd", "bfd"]
ALGORITHMS: tuple[Algorithm, ...] = ("rfc", "ffd", "bfd")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(case=cases(), max_docs=st.one_of(st.none(), st.integers(1, 6)))
@settings(max_examples=80, deadline=None)
def test_no_document_is_lost_or_doubled_and_no_pack_overflows(
    algorithm: Algorithm, case: Case, max_docs: int | None
) -> None:
    plan = pack(case.lengths, case.capacity, algorithm=algorithm, seed=case.seed, epoch=case.epoch, max_docs=max_docs)
    packs = as_lists(plan)
    assert sorted(document for packed in packs for document in packed) == list(range(len(case.lengths)))
    assert all(1 <= len(packed) <= (max_docs or len(case.lengths)) for packed in packs)
    filled = [int(case.lengths[packed].sum()) for packed in packs]
    assert max(filled) <= case.capacity
    assert plan.fill == sum(filled) / (len(packs) * case.capacity)
    assert plan.items.dtype == np.int32
    assert plan.offsets.dtype == np.int64


@given(count=st.integers(1, 6000), seed=st.integers(0, 1 << 60), cut=st.integers(0, 6000))
@settings(max_examples=100, deadline=None)
def test_the_order_is_a_permutation_that_can_be_entered_anywhere(count: int, seed: int, cut: int) -> None:
    order = permuted(count, seed, 0, DOCUMENTS)
    assert np.array_equal(np.sort(order), np.arange(count))
    cut = min(cut, count)
    parts = [permuted(count, seed, 0, DOCUMENTS, 0, cut), permuted(count, seed, 0, DOCUMENTS, cut, count)]
    assert np.array_equal(np.concatenate(parts), order)


def test_every_order_of_four_comes_up_about_equally_often() -> None:
    """Chi-square over the 24 orders and 24,000 seeds: 23 degrees of freedom, 49.7 is passed once in 1000 times."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(24_000):
        order = tuple(permuted(4, seed, 0, DOCUMENTS).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((seen - 1000) ** 2 / 1000 for seen in counts.values()) < 49.7


def test_orders_of_other_seeds_epochs_and_purposes_are_unrelated() -> None:
    base = permuted(20_000, 5, 3, DOCUMENTS).astype(np.float64)
    for other in (
        permuted(20_000, 6, 3, DOCUMENTS),
        permuted(20_000, 5, 4, DOCUMENTS),
        permuted(20_000, 4, 4, DOCUMENTS),
        permuted(20_000, 5, 3, PACKS),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / np.sqrt(20_000)


def test_a_plan_never_changes_without_a_new_plan_format() -> None:
    """Recorded plans of format 2: a resumed run and every other machine must get these very numbers."""
    assert packing.PLAN_FORMAT == 2
    lengths = (np.arange(40) * 37 % 23 + 1).astype(np.int32)
    for algorithm in ALGORITHMS:
        assert as_lists(pack(lengths, 50, algorithm=algorithm, seed=7, epoch=2))[:3] == RECORDED[algorithm]


RECORDED = {
    "rfc": [[5, 37, 29, 33, 4, 20], [6, 24, 21], [31, 3, 23, 35]],
    "ffd": [[39, 16, 19], [11, 34, 29], [26, 21, 4]],
    "bfd": [[8, 3, 17], [26, 21, 27], [36, 31, 30]],
}


def _design_effect(lengths: NDArray[np.int32], plan: PackPlan, packs_per_step: int) -> dict[str, float]:
    """Variance over steps of what a step is made of, over that of steps cut from a random order at equal tokens."""

    def composition(items: NDArray[np.int32], bounds: NDArray[np.int64]) -> NDArray[np.float64]:
        length = lengths[items].astype(np.float64)
        begin = bounds[:-1]
        tokens = np.add.reduceat(length, begin)
        documents = np.diff(bounds)
        short = np.add.reduceat(np.where(length < np.median(lengths), length, 0.0), begin) / tokens
        log_length = np.add.reduceat(np.log(length), begin) / documents
        return np.stack([documents / tokens, short, log_length])

    steps = len(plan) // packs_per_step
    bounds = plan.offsets[: steps * packs_per_step + 1 : packs_per_step]
    packed = composition(plan.items[: bounds[-1]], bounds)
    shuffled = np.random.default_rng(0).permutation(len(lengths)).astype(np.int32)
    total = np.cumsum(lengths[shuffled])
    cuts = np.searchsorted(total, np.arange(1, steps) * (total[-1] / steps))
    drawn = composition(shuffled, np.concatenate([[0], cuts, [len(lengths)]]))
    ratio = packed.var(axis=1) / drawn.var(axis=1)
    return dict(zip(("documents", "short", "log_length"), ratio.tolist(), strict=True))


def test_rfc_keeps_steps_random_samples_and_packs_nearly_full_where_ffd_does_not() -> None:
    lengths = chat_lengths(300_000, 8192)
    random_fill = pack(lengths, 8192, seed=1)
    decreasing = pack(lengths, 8192, algorithm="ffd", seed=1)
    assert random_fill.fill > 0.999
    effect = _design_effect(lengths, random_fill, 32)
    assert max(effect.values()) < 1.5, effect
    assert max(_design_effect(lengths, decreasing, 32).values()) > 10


def test_rfc_packs_big_documents_first_when_partners_are_scarce() -> None:
    """Uniform lengths: half of the documents need a pack of their own, and the rest must go to them."""
    lengths = np.random.default_rng(0).integers(1, 4097, 100_000).astype(np.int32)
    assert pack(lengths, 4096).fill > 0.985


def test_plans_are_the_same_for_every_integer_type_and_memory_layout() -> None:
    lengths = chat_lengths(2000, 1000)
    expected = as_lists(pack(lengths, 1000, seed=1))
    strided = np.repeat(lengths, 2)[::2]
    frozen = lengths.copy()
    frozen.flags.writeable = False
    for same in (lengths.astype(np.int64), lengths.astype(np.uint16), strided, frozen):
        assert as_lists(pack(same, 1000, seed=1)) == expected
    assert as_lists(pack(lengths, np.int32(1000), seed=np.uint8(1))) == expected  # type: ignore[arg-type]


def test_seeds_and_epochs_give_other_plans() -> None:
    lengths = chat_lengths(500, 1000)
    plans = [as_lists(pack(lengths, 1000, seed=seed, epoch=epoch)) for seed, epoch in ((0, 0), (1, 0), (0, 1))]
    assert plans[0] != plans[1]
    assert plans[0] != plans[2]
    assert plans[1] != plans[2]


def test_the_arrays_of_a_plan_cannot_be_changed() -> None:
    plan = pack(np.array([1, 2, 3]), 4)
    with pytest.raises(ValueError, match="read-only"):
        plan.items[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        plan.pack(0)[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        plan.offsets[0] = 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_smallest_problems(algorithm: Algorithm) -> None:
    assert as_lists(pack(np.array([1]), 1, algorithm=algorithm)) == [[0]]
    assert as_lists(pack(np.array([7]), 1 << 26, algorithm=algorithm)) == [[0]]
    ones = pack(np.ones(50, np.int64), 1, algorithm=algorithm, seed=4)
    assert sorted(as_lists(ones)) == [[document] for document in range(50)]
    assert ones.fill == 1.0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_more_than_2_to_the_31_tokens(algorithm: Algorithm) -> None:
    """2**32 tokens in documents of half a pack: sums and offsets are 64 bits wide."""
    lengths = np.full(1 << 19, 1 << 13, np.int32)
    plan = pack(lengths, 1 << 14, algorithm=algorithm)
    assert (len(plan), plan.fill) == (1 << 18, 1.0)
    made = schedule(lambda epoch: plan, lengths, epochs=1, world_size=1, accumulation=1 << 18)
    assert (made.num_steps, made.num_targets(0)) == (1, 1 << 32)


BAD: list[tuple[Any, Any, dict[str, Any], list[str]]] = [
    ([], 8, {}, ["there are no documents to pack", "got: 0 documents"]),
    ([3, 0, 5, 0], 8, {}, ["lengths below 1", "got: 2 of 4: document 1 with 0, document 3 with 0", "leave these"]),
    ([3, -4], 8, {}, ["lengths below 1", "document 1 with -4"]),
    ([9] * 7, 8, {}, ["fit no pack", "got: 7 of 7: document 0 with 9", "document 4 with 9, ...", "1 to 8 tokens"]),
    ([3.0, 4.0], 8, {}, ["lengths must be one whole number per document", "float64 of shape (2,)"]),
    ([[3, 4]], 8, {}, ["lengths must be one whole number per document", "shape (1, 2)"]),
    ([3], 0, {}, ["capacity is out of range", "got: 0", "a whole number from 1 to 67108864"]),
    ([3], 1 << 27, {}, ["capacity is out of range", "got: 134217728"]),
    ([3], 8.5, {}, ["capacity is out of range", "got: 8.5"]),
    ([3], 8, {"max_docs": 0}, ["max_docs is out of range", "got: 0", "a whole number from 1 to"]),
    ([3], 8, {"pool": 0}, ["pool is out of range", "got: 0"]),
    ([3], 8, {"pool": 5, "algorithm": "ffd"}, ["a pool has no meaning for ffd", "got: pool=5", "leave the pool out"]),
    ([3], 8, {"seed": -1}, ["seed is out of range", "got: -1"]),
    ([3], 8, {"epoch": 0.5}, ["epoch is out of range", "got: 0.5"]),
    ([3], 8, {"algorithm": "next_fit"}, ["unknown packing algorithm", "got: 'next_fit'", "allowed: rfc, ffd, bfd"]),
    (
        [3, 7],
        8,
        {"cost": CostModel(1.0, 0.1)},
        [
            "cost more than a pack may",
            "document 1 with 12",
            "a weight of at most 8",
            "raise the capacity to at least 12",
        ],
    ),
]


@pytest.mark.parametrize(("lengths", "capacity", "options", "words"), BAD)
def test_bad_input_is_refused_with_what_got_allowed_and_do(
    lengths: Any, capacity: Any, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(PackingError) as caught:
        pack(np.array(lengths), capacity, **options)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert message.splitlines()[1:] == [
        f"  got: {caught.value.got}",
        f"  allowed: {caught.value.allowed}",
        f"  do this: {caught.value.do}",
    ]


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_a_cost_model_must_be_a_cost(a: float, b: float) -> None:
    with pytest.raises(PackingError, match="the cost model is not a cost") as caught:
        CostModel(a, b)
    assert caught.value.allowed == "finite, a > 0, b >= 0"


def test_a_weight_is_never_below_the_length_and_never_wraps() -> None:
    cost = CostModel(1.0, 1e30)
    lengths = np.array([1, 2**31 - 1])
    assert (cost.weight(lengths) > 1 << 61).all()
    assert CostModel(2.0, 0.0).weight(lengths).tolist() == lengths.tolist()
    with pytest.raises(PackingError, match="lengths must be one whole number per document"):
        cost.weight(np.array([1.5]))  # type: ignore[arg-type]


def test_a_plan_has_no_packs_but_its_own() -> None:
    plan = pack(np.array([3, 3, 3]), 3)
    assert len(plan) == 3
    for wrong in (-1, 3):
        with pytest.raises(PackingError, match="the number of a pack is out of range") as caught:
            plan.pack(wrong)
        assert caught.value.allowed == "a whole number from 0 to 2"
