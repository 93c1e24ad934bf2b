"""Which documents share a pack: ``pack`` decides it for a whole epoch, a ``Packer`` block by block.

Documents are never cut here and never see each other, so a plan is only about two things: how full the packs are, and
whether an optimizer step remains a random sample of the documents. "Decreasing" packers put documents of like
length together, step after step, even when the finished packs are shuffled; ``rfc`` (random-fill-close) keeps the
seeded random order of the documents and loses less than a thousandth of the room. It is the default; ``ffd`` and
``bfd`` are exact classics, for comparison and for data of few lengths.

The plan depends on lengths, capacity, algorithm, options, seed and epoch alone, in whole numbers: every rank makes the
same plan without talking, on any machine, at any world size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trainer_kernels import dealing, planners
from trainer_kernels.checks import refuse_documents, whole, whole_numbers
from trainer_kernels.errors import PackingError
from trainer_kernels.order import DOCUMENTS, PACKS, permuted

Algorithm = Literal["rfc", "ffd", "bfd"]
Weight = np.uint16 | np.int32

PLAN_FORMAT = 2
"""Raised whenever the same arguments would give another plan: part of what a resumed run must agree on."""

BLOCK_DOCUMENTS = 1 << 20
"""``rfc`` packs stretches of this many documents of the order on their own: bounded memory, and a share of one pack
lost per million documents."""

STRETCHES = 1 << 20
"""``ffd`` and ``bfd`` visit documents in seeded order of at most this many stretches of neighbours. Up to as many
documents that is one by one; with more, looking up every document somewhere else would take most of the time."""

MAX_CAPACITY = 1 << 26
"""Largest capacity; keeps tables by room small and products of a capacity and a pool within 64 bits."""

MAX_DOCUMENTS = (1 << 31) - 1
"""Document ids are int32."""

SMALLEST_POOL = 1024


@dataclass(frozen=True, slots=True)
class CostModel:
    """Time of a document of n tokens: ``a * n + b * n**2``, in any unit of time.

    ``a`` is the cost of a token in matrix products (6 x parameters FLOP in full fine-tuning, 4 x with a frozen base),
    ``b`` that of a pair of tokens in attention (6 x layers x width FLOP, causal).
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        if not (isfinite(self.a) and isfinite(self.b) and self.a > 0 and self.b >= 0):
            raise PackingError(
                "the cost model is not a cost",
                got=f"a={self.a}, b={self.b}",
                allowed="finite, a > 0, b >= 0",
                do="give the time per token and per pair of tokens, or leave the cost model out",
            )

    def weight(self, lengths: NDArray[np.integer]) -> NDArray[np.int64]:
        """Time in units of one token's matrix products, int64[n]: ``ceil(n + b / a * n**2)``, so never below n.

        One division, one product and one rounding up: the same numbers on every machine with IEEE 754 doubles.
        """
        length = whole_numbers("lengths", lengths, 0).astype(np.int64)
        pairs = np.ceil(self.b / self.a * (length * length).astype(np.float64))
        return length + np.minimum(pairs, float(1 << 62)).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class PackPlan:
    """The packs of an epoch or a block of one. ``items`` int32[n]: every document id of it once; ``offsets``
    int64[m + 1]: where packs begin.

    ``fill`` is the share of the capacity in use, over all packs: of tokens, or of cost where a cost model was given.
    The arrays are read-only.
    """

    items: NDArray[np.int32]
    offsets: NDArray[np.int64]
    fill: float

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def most_documents(self) -> int:
        """Documents of the pack that has the most."""
        return int(np.diff(self.offsets).max())

    def pack(self, i: int) -> NDArray[np.int32]:
        """Document ids of pack ``i`` (``0 <= i < len(plan)``), a view of int32[k], k >= 1."""
        whole("the number of a pack", i, 0, len(self) - 1)
        return self.items[self.offsets[i] : self.offsets[i + 1]]


def pack(
    lengths: NDArray[np.integer],
    capacity: int,
    *,
    algorithm: Algorithm = "rfc",
    seed: int = 0,
    epoch: int = 0,
    pool: int | None = None,
    cost: CostModel | None = None,
    max_docs: int | None = None,
) -> PackPlan:
    """Divide documents of ``lengths`` (int[n], tokens, each at least 1) into packs of at most ``capacity``.

    ``capacity`` is in tokens; with ``cost`` it is in the units of ``CostModel.weight``, and since a weight is never
    below the length, it bounds the tokens as well. ``(seed, epoch)`` choose the order of the documents (``rfc``) or,
    for ``ffd`` and ``bfd``, which of the equally heavy ones go where, and the order of the packs. ``pool`` (``rfc``
    only): how many documents ahead a filler is looked for; by default enough for four packs, at least 1024.
    ``max_docs``: most documents in a pack.

    Raises ``PackingError`` for no documents, lengths below 1 or above the capacity, and options out of range.
    """
    packer = Packer(lengths, capacity, algorithm=algorithm, seed=seed, pool=pool, cost=cost, max_docs=max_docs)
    return packer.epoch(epoch)


class Packer:
    """``pack`` with the documents checked and weighed once, and an epoch in ``blocks``.

    ``rfc`` has one per million documents, packed on its own, so getting anywhere in an epoch costs one block; ``ffd``
    and ``bfd`` have one. Arguments and errors are those of ``pack``.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        capacity: int,
        *,
        algorithm: Algorithm = "rfc",
        seed: int = 0,
        pool: int | None = None,
        cost: CostModel | None = None,
        max_docs: int | None = None,
        block_documents: int = BLOCK_DOCUMENTS,
    ) -> None:
        self._capacity = whole("capacity", capacity, 1, MAX_CAPACITY)
        self._seed = whole("seed", seed, 0, (1 << 64) - 1)
        self._most = MAX_DOCUMENTS if max_docs is None else whole("max_docs", max_docs, 1, MAX_DOCUMENTS)
        if algorithm not in get_args(Algorithm):
            raise PackingError(
                "unknown packing algorithm",
                got=repr(algorithm),
                allowed=", ".join(get_args(Algorithm)),
                do="choose rfc, unless you compare",
            )
        if pool is not None and algorithm != "rfc":
            raise PackingError(
                f"a pool has no meaning for {algorithm}",
                got=f"pool={pool}",
                allowed="no pool",
                do="leave the pool out, or choose rfc",
            )
        self._algorithm: Algorithm = algorithm
        weighed = _weighed(lengths, self._capacity, cost)
        self._weights, self._heaviest, self._total = weighed.array, weighed.heaviest, weighed.total
        usual = _default_pool(self._capacity, len(self._weights), self._total)
        self._pool = usual if pool is None else whole("pool", pool, 1, MAX_DOCUMENTS)
        self._block_documents = block_documents
        self.blocks: int = -(-len(self._weights) // block_documents) if algorithm == "rfc" else 1

    def epoch(self, epoch: int) -> PackPlan:
        """All packs of an epoch."""
        if self.blocks == 1:
            return self.block(epoch, 0)
        items = np.empty(len(self._weights), np.int32)
        ends = [np.zeros(1, np.int64)]
        for number in range(self.blocks):
            first, stop = self._stretch(number)
            ends.append(first + self._fill(epoch, first, items[first:stop])[0])
        return self._plan(items, np.concatenate(ends), self._total)

    def block(self, epoch: int, number: int) -> PackPlan:
        """The packs of block ``number`` of ``blocks``: the epoch's next documents after those of the blocks before."""
        whole("epoch", epoch, 0, (1 << 32) - 1)
        whole("the number of a block", number, 0, self.blocks - 1)
        if self._algorithm == "rfc":
            first, stop = self._stretch(number)
            items = np.empty(stop - first, np.int32)
            ends, used = self._fill(epoch, first, items)
            return self._plan(items, np.concatenate([np.zeros(1, np.int64), ends]), used)
        items, offsets = plan_decreasing(
            self._weights,
            self._heaviest,
            self._capacity,
            self._algorithm,
            seed=self._seed,
            epoch=epoch,
            max_docs=self._most,
        )
        return self._plan(items, offsets, self._total)

    def _stretch(self, number: int) -> tuple[int, int]:
        first = number * self._block_documents
        return first, min(first + self._block_documents, len(self._weights))

    def _fill(self, epoch: int, first: int, items: NDArray[np.int32]) -> tuple[NDArray[np.int64], int]:
        """Random-fill-close of the documents from place ``first`` of the order on: where packs end, and their sum."""
        order = permuted(len(self._weights), self._seed, epoch, DOCUMENTS, first, first + len(items))
        weights = np.empty(len(order), np.uint32)
        used = int(planners.weights_in_order(self._weights, order, weights))
        return planners.random_fill_close(weights, order, self._capacity, self._pool, self._most, items), used

    def _plan(self, items: NDArray[np.int32], offsets: NDArray[np.int64], used: int) -> PackPlan:
        return _read_only(items, offsets, used / ((len(offsets) - 1) * self._capacity))


def joined(plans: Sequence[PackPlan]) -> PackPlan:
    """The packs of ``plans``, one after the other, as one plan."""
    if len(plans) == 1:
        return plans[0]
    sizes = np.concatenate([np.diff(plan.offsets) for plan in plans])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    fill = sum(plan.fill * len(plan) for plan in plans) / len(sizes)
    return _read_only(np.concatenate([plan.items for plan in plans]), offsets, fill)


def _read_only(items: NDArray[np.int32], offsets: NDArray[np.int64], fill: float) -> PackPlan:
    items.flags.writeable = False
    offsets.flags.writeable = False
    return PackPlan(items, offsets, fill)


def plan_decreasing(
    weights: NDArray[Weight],
    heaviest: int,
    capacity: int,
    algorithm: Algorithm,
    *,
    seed: int,
    epoch: int,
    max_docs: int,
    stretches: int = STRETCHES,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """``(items, offsets)`` of ``ffd`` or ``bfd`` over all of the checked ``weights``, the packs in seeded order.

    ``heaviest`` is the largest of them.
    """
    count = len(weights)
    width = -(-count // stretches)
    first = dealing.count_weights(weights, heaviest)
    planner = planners.first_fit_decreasing if algorithm == "ffd" else planners.best_fit_decreasing
    room = dealing.room_for_runs(count)
    runs = dealing.first_runs(room, planner(first, capacity, max_docs, room))
    packs = int(runs.packs.sum())
    # Made here, because NumPy's arrays are of large pages: scattered writes to small ones take three times as long.
    by_weight, items = np.empty(count, np.int32), np.empty(count, np.int32)
    offsets = np.empty(packs + 1, np.int64)
    dealing.sort_by_weight(weights, first, permuted(-(-count // width), seed, epoch, DOCUMENTS), width, by_weight)
    dealing.deal(by_weight, first, runs, permuted(packs, seed, epoch, PACKS), items, offsets)
    return items, offsets


def _default_pool(capacity: int, count: int, total: int) -> int:
    """Four packs' worth of average documents: with less than two, packs cannot be closed well."""
    return max(SMALLEST_POOL, 4 * capacity * count // total)


@dataclass(frozen=True, slots=True, eq=False)
class _Weights:
    """What each document takes of the capacity, [n]; the least, the largest and the sum."""

    array: NDArray[Weight]
    least: int
    heaviest: int
    total: int


def _weighed(lengths: NDArray[np.integer], capacity: int, cost: CostModel | None) -> _Weights:
    """The weights after all checks, in memory of their own: files are mapped in small pages, slow to look up."""
    array = whole_numbers("lengths", lengths, None)
    if len(array) == 0:
        raise PackingError(
            "there are no documents to pack",
            got="0 documents",
            allowed=f"1 to {MAX_DOCUMENTS}",
            do="check which rows were dropped before packing",
        )
    whole("the number of documents", len(array), 1, MAX_DOCUMENTS)
    found = _surveyed(array, capacity)
    if found.least < 1:
        whole_numbers("lengths", array, 1)
    if found.heaviest > capacity:
        do = "drop, truncate or split them, or raise the capacity"
        refuse_documents("documents that fit no pack", array, array > capacity, f"1 to {capacity} tokens", do)
    if cost is None:
        return found
    weights = cost.weight(array)
    found = _surveyed(weights, capacity)
    if found.heaviest > capacity:
        do = f"raise the capacity to at least {found.heaviest}, or drop, truncate or split them"
        what = "documents that cost more than a pack may"
        refuse_documents(what, weights, weights > capacity, f"a weight of at most {capacity}", do)
    return found


def _surveyed(array: NDArray[np.integer], capacity: int) -> _Weights:
    """``array`` in as few bytes as weights up to ``capacity`` take: they are looked up at random, and that is all."""
    weights: NDArray[Weight] = np.empty(len(array), np.uint16 if capacity < 1 << 16 else np.int32)
    least, heaviest, total = dealing.survey(array, weights)
    return _Weights(weights, int(least), int(heaviest), int(total))
