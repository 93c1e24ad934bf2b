"""Which documents share a pack: ``pack`` decides it for a whole epoch before the first step.

Documents are never cut here and never see each other, so a plan is only about two things: how full the packs are, and
whether an optimizer step remains a random sample of the documents. "Decreasing" packers put documents of like
length together, step after step, even when the finished packs are shuffled; ``rfc`` (random-fill-close) keeps the
seeded random order of the documents and loses less than a thousandth of the room. It is the default; ``ffd`` and
``bfd`` are exact classics, for comparison and for data of few lengths.

The plan depends on lengths, capacity, algorithm, options, seed and epoch alone, in whole numbers: every rank makes the
same plan without talking, on any machine, at any world size.
"""

from dataclasses import dataclass
from math import isfinite
from operator import index
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trainer_kernels import planners
from trainer_kernels.errors import PackingError
from trainer_kernels.order import DOCUMENTS, PACKS, permuted

Algorithm = Literal["rfc", "ffd", "bfd"]

PLAN_FORMAT = 1
"""Raised whenever the same arguments would give another plan: part of what a resumed run must agree on."""

BLOCK_DOCUMENTS = 1 << 20
"""``rfc`` packs stretches of this many documents of the order on their own: bounded memory, and a share of one pack
lost per million documents."""

MAX_CAPACITY = 1 << 26
"""Largest capacity; keeps tables by room small and products of a capacity and a pool within 64 bits."""

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
        length = np.asarray(lengths).astype(np.int64)
        pairs = np.ceil(self.b / self.a * (length * length).astype(np.float64))
        return length + np.minimum(pairs, float(1 << 62)).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class PackPlan:
    """One epoch's packs. ``items`` int32[n]: every document id once; ``offsets`` int64[m + 1]: where packs begin.

    ``fill`` is the share of the capacity in use, over all packs: of tokens, or of cost where a cost model was given.
    The arrays are read-only.
    """

    items: NDArray[np.int32]
    offsets: NDArray[np.int64]
    fill: float

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pack(self, i: int) -> NDArray[np.int32]:
        """Document ids of pack ``i`` (``0 <= i < len(plan)``), a view of int32[k], k >= 1."""
        if not 0 <= i < len(self):
            raise PackingError(
                "there is no such pack", got=i, allowed=f"0 to {len(self) - 1}", do="ask for a pack of this plan"
            )
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
    capacity = _whole("capacity", capacity, 1, MAX_CAPACITY)
    seed = _whole("seed", seed, 0, (1 << 64) - 1)
    epoch = _whole("epoch", epoch, 0, (1 << 32) - 1)
    most = (1 << 31) - 1 if max_docs is None else _whole("max_docs", max_docs, 1, (1 << 31) - 1)
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
    weights = _weights(lengths, capacity, cost)
    total = int(weights.sum(dtype=np.int64))
    if algorithm == "rfc":
        ahead = _default_pool(capacity, len(weights), total) if pool is None else _whole("pool", pool, 1, (1 << 31) - 1)
        items, offsets = plan_rfc(weights, capacity, seed=seed, epoch=epoch, pool=ahead, max_docs=most)
    else:
        items, offsets = plan_decreasing(weights, capacity, algorithm, seed=seed, epoch=epoch, max_docs=most)
    items.flags.writeable = False
    offsets.flags.writeable = False
    return PackPlan(items, offsets, total / ((len(offsets) - 1) * capacity))


def plan_rfc(
    weights: NDArray[np.int32],
    capacity: int,
    *,
    seed: int,
    epoch: int,
    pool: int,
    max_docs: int,
    block: int = BLOCK_DOCUMENTS,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """``(items, offsets)`` of random-fill-close over checked ``weights``, each ``block`` of the order on its own."""
    count = len(weights)
    items = np.empty(count, np.int32)
    parts: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
    for first in range(0, count, block):
        stop = min(first + block, count)
        order = permuted(count, seed, epoch, DOCUMENTS, first, stop)
        offsets = np.empty(stop - first + 1, np.int64)
        packs = planners.random_fill_close(weights[order], order, capacity, pool, max_docs, items[first:stop], offsets)
        parts.append(offsets[1 : packs + 1] + first)
    return items, np.concatenate(parts)


def plan_decreasing(
    weights: NDArray[np.int32], capacity: int, algorithm: Algorithm, *, seed: int, epoch: int, max_docs: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """``(items, offsets)`` of ``ffd`` or ``bfd`` over all of the checked ``weights``, the packs in seeded order."""
    count = len(weights)
    order = permuted(count, seed, epoch, DOCUMENTS)
    items = np.empty(count, np.int32)
    offsets = np.empty(count + 1, np.int64)
    planner = planners.first_fit_decreasing if algorithm == "ffd" else planners.best_fit_decreasing
    packs = planner(weights[order], order, capacity, max_docs, items, offsets)
    new_items = np.empty(count, np.int32)
    new_offsets = np.empty(packs + 1, np.int64)
    planners.reorder_packs(items, offsets, permuted(packs, seed, epoch, PACKS), new_items, new_offsets)
    return new_items, new_offsets


def _default_pool(capacity: int, count: int, total: int) -> int:
    """Four packs' worth of average documents: with less than two, packs cannot be closed well."""
    return max(SMALLEST_POOL, 4 * capacity * count // total)


def _weights(lengths: NDArray[np.integer], capacity: int, cost: CostModel | None) -> NDArray[np.int32]:
    """What each document takes of the capacity, int32[n], after all checks."""
    array = np.asarray(lengths)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise PackingError(
            "lengths must be one whole number per document",
            got=f"{array.dtype} of shape {array.shape}",
            allowed="a one-dimensional integer array",
            do="give the number of tokens of each document",
        )
    if not 1 <= len(array) < (1 << 31):
        raise PackingError(
            "there are no documents to pack" if len(array) == 0 else "there are too many documents for one plan",
            got=f"{len(array)} documents",
            allowed="1 to 2147483647",
            do="check which rows were dropped before packing" if len(array) == 0 else "split the data into shards",
        )
    if int(array.min()) < 1:
        _refuse_documents("documents without tokens", array, array < 1, "at least 1 token", "leave these documents out")
    if int(array.max()) > capacity:
        do = "drop, truncate or split them, or raise the capacity"
        _refuse_documents("documents that fit no pack", array, array > capacity, f"1 to {capacity} tokens", do)
    weights = array if cost is None else cost.weight(array)
    if int(weights.max()) > capacity:
        do = f"raise the capacity to at least {int(weights.max())}, or drop, truncate or split them"
        what = "documents that cost more than a pack may"
        _refuse_documents(what, weights, weights > capacity, f"a weight of at most {capacity}", do)
    return np.ascontiguousarray(weights, np.int32)


def _refuse_documents(what: str, values: NDArray[np.integer], wrong: NDArray[np.bool_], allowed: str, do: str) -> None:
    ids = np.flatnonzero(wrong)
    first = ", ".join(f"document {i} with {int(values[i])}" for i in ids[:5])
    more = ", ..." if len(ids) > 5 else ""
    raise PackingError(what, got=f"{len(ids)} of {len(values)}: {first}{more}", allowed=allowed, do=do)


def _whole(name: str, value: int, least: int, most: int) -> int:
    """``value`` as a Python int within ``[least, most]``."""
    try:
        number = index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise PackingError(
            f"{name} is out of range",
            got=repr(value),
            allowed=f"a whole number from {least} to {most}",
            do=f"give another {name}",
        )
    return number
