"""From counts to packs: documents are dealt to the runs of packs that first- and best-fit decreasing have found.

The planners know weights only, and are done with ten million documents in a few milliseconds. What takes time is to
touch every document twice, so this is all about memory: sort by weight in one pass, write every pack where it finally
belongs, and ask early for lines that will be needed.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer_kernels.compiled import compiled, prefetch

_AHEAD = 24
"""So many stretches ahead the weights of one are asked for."""
_WRITTEN_AHEAD = 2
"""So many stretches ahead the places that its documents go to are asked for."""
_TOGETHER = 64
"""Packs written together: few enough that their lines stay in the fastest cache until they are complete."""


class Runs(NamedTuple):
    """Packs that are filled alike: run ``r`` stands for ``packs[r]`` packs, each of ``documents[r]`` documents.

    Each takes ``amount[i]`` documents of ``weight[i]`` for ``i`` in ``[begin[r], begin[r + 1])``, in this order.
    """

    weight: NDArray[np.int32]
    amount: NDArray[np.int32]
    begin: NDArray[np.int64]
    documents: NDArray[np.int64]
    packs: NDArray[np.int64]


def room_for_runs(count: int) -> Runs:
    """Room for all runs of ``count`` documents: every part of a run takes at least one, so there are at most that."""
    begin = np.empty(count + 1, np.int64)
    begin[0] = 0
    weight, amount = np.empty(count, np.int32), np.empty(count, np.int32)
    return Runs(weight, amount, begin, np.empty(count, np.int64), np.empty(count, np.int64))


def first_runs(runs: Runs, size: int) -> Runs:
    """The first ``size`` runs."""
    parts = int(runs.begin[size])
    begin = runs.begin[: size + 1]
    return Runs(runs.weight[:parts], runs.amount[:parts], begin, runs.documents[:size], runs.packs[:size])


@compiled
def survey(source: NDArray[np.integer], target: NDArray[np.integer]) -> tuple[np.int64, np.int64, np.int64]:
    """Fill ``target`` with ``source`` (one at least); returns the least, the largest and the sum of ``source``.

    What does not fit in ``target`` is cut there: look at the numbers first.
    """
    least = most = source[0]
    total = np.int64(0)
    for place in range(source.size):
        value = source[place]
        target[place] = value
        least = min(least, value)
        most = max(most, value)
        total += np.int64(value)
    return np.int64(least), np.int64(most), total


@compiled
def count_weights(weights: NDArray[np.integer], heaviest: int) -> NDArray[np.int64]:
    """``first`` int64[heaviest + 2]: sorted by weight, those of weight w are ``first[w]`` to ``first[w + 1] - 1``."""
    first = np.zeros(heaviest + 2, np.int64)
    for place in range(weights.size):
        first[np.uint32(weights[place]) + 1] += 1
    for weight in range(first.size - 1):
        first[weight + 1] += first[weight]
    return first


@compiled
def sort_by_weight(
    weights: NDArray[np.integer],
    first: NDArray[np.int64],
    stretches: NDArray[np.int32],
    width: int,
    dealt: NDArray[np.int32],
) -> None:
    """Fill ``dealt`` with document ids by weight, equals as they come in ``stretches`` of ``width`` documents.

    ``first`` is of ``count_weights``; stretch ``s`` is the documents from ``s * width`` on.
    """
    free = first.astype(np.uint32)  # half the size: what is often used stays in the fastest cache
    size = np.uint32(weights.size)
    for index in range(stretches.size):
        if index + _AHEAD < stretches.size:
            soon = np.int64(stretches[index + _AHEAD]) * width
            prefetch(weights, soon)
            prefetch(weights, min(soon + width - 1, weights.size - 1))
        if index + _WRITTEN_AHEAD < stretches.size:
            begin = np.uint32(stretches[index + _WRITTEN_AHEAD]) * np.uint32(width)
            for document in range(begin, min(begin + np.uint32(width), size)):
                prefetch(dealt, np.int64(free[np.uint32(weights[np.uint32(document)])]))
        begin = np.uint32(stretches[index]) * np.uint32(width)
        for document in range(begin, min(begin + np.uint32(width), size)):
            weight = np.uint32(weights[np.uint32(document)])
            place = free[weight]
            dealt[place] = document
            free[weight] = place + np.uint32(1)


@compiled
def deal(
    dealt: NDArray[np.int32],
    first: NDArray[np.int64],
    runs: Runs,
    order: NDArray[np.int32],
    items: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> None:
    """Give the documents of ``sort_by_weight`` to the packs of ``runs``, pack ``order[p]`` to place ``p``.

    The documents of one weight go to runs, and within a run to packs, as they were sorted. Place ``p`` is
    ``items[offsets[p]:offsets[p + 1]]``.
    """
    begin_of = np.empty(order.size, np.uint32)
    _lay_out(runs, order, begin_of, offsets)
    begins, documents, packs = runs.begin, runs.documents, runs.packs
    weights, amounts = runs.weight, runs.amount
    next_of = first.astype(np.uint32)
    target = np.empty(_TOGETHER, np.uint32)
    pack = np.int64(0)
    for run in range(packs.size):
        left = packs[run]
        while left > 0:
            together = min(left, _TOGETHER)
            for which in range(together):
                target[which] = begin_of[pack + which]
            # The next packs that follow may be of another run: then their last line is a guess.
            for later in range(pack + _TOGETHER, min(begin_of.size, pack + _TOGETHER + together)):
                soon = np.int64(begin_of[later])
                prefetch(items, soon)
                prefetch(items, min(soon + documents[run], items.size) - 1)
            for part in range(begins[run], begins[run + 1]):
                weight = np.uint32(weights[part])
                amount = np.int64(amounts[part])
                source = next_of[weight]
                for which in range(together):
                    slot = target[which]
                    for _ in range(amount):
                        items[slot] = dealt[source]
                        source += np.uint32(1)
                        slot += np.uint32(1)
                    target[which] = slot
                next_of[weight] = source
            pack += together
            left -= together


@compiled
def _lay_out(runs: Runs, order: NDArray[np.int32], begin_of: NDArray[np.uint32], offsets: NDArray[np.int64]) -> None:
    """Where each pack begins, by its number (``begin_of``) and by its place (``offsets``)."""
    size_of = np.empty(order.size, np.int32)
    pack = np.int64(0)
    for run in range(runs.packs.size):
        size_of[pack : pack + runs.packs[run]] = runs.documents[run]
        pack += runs.packs[run]
    begin = np.int64(0)
    for place in range(order.size):
        offsets[place] = begin
        number = np.uint32(order[place])
        begin_of[number] = begin
        begin += np.int64(size_of[number])
    offsets[order.size] = begin
