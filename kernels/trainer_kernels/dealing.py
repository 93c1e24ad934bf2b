"""From counts to packs: documents are dealt to the runs of packs that first- and best-fit decreasing have found.

The planners know weights only, and are done with ten million documents in a few milliseconds. What takes time is to
touch every document twice, so this is all about memory: sort by weight in one pass, write every pack where it finally
belongs, and ask early for lines that will be needed.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer_kernels.compiled import compiled, prefetch

_AHEAD = 16
"""So many stretches ahead the memory of one is asked for."""
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
def count_weights(weights: NDArray[np.int32]) -> NDArray[np.int64]:
    """``first`` int64[heaviest + 2]: sorted by weight, those of weight w are ``first[w]`` to ``first[w + 1] - 1``."""
    first = np.zeros(np.int64(weights.max()) + 2, np.int64)
    for place in range(weights.size):
        first[np.uint32(weights[place]) + 1] += 1
    for weight in range(first.size - 1):
        first[weight + 1] += first[weight]
    return first


@compiled
def sort_by_weight(
    weights: NDArray[np.int32],
    first: NDArray[np.int64],
    stretches: NDArray[np.int32],
    width: int,
    dealt: NDArray[np.int32],
) -> None:
    """Fill ``dealt`` with document ids by weight, equals as they come in ``stretches`` of ``width`` documents.

    ``first`` is of ``count_weights``; stretch ``s`` is the documents from ``s * width`` on.
    """
    free = first.copy()
    last = weights.size - 1
    for index in range(stretches.size):
        if index + _AHEAD < stretches.size:
            soon = np.int64(stretches[index + _AHEAD]) * width
            prefetch(weights, soon)
            prefetch(weights, min(soon + width - 1, last))
        begin = np.int64(stretches[index]) * width
        for document in range(begin, min(begin + width, weights.size)):
            weight = np.uint32(weights[document])
            place = free[weight]
            dealt[place] = document
            free[weight] = place + 1


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
    place_of = np.empty(order.size, np.int32)
    for place in range(order.size):
        place_of[order[place]] = place
    _lay_out(runs, place_of, offsets)
    next_of = first.copy()
    target = np.empty(_TOGETHER, np.int64)
    pack = 0
    for run in range(runs.packs.size):
        left = runs.packs[run]
        while left > 0:
            together = min(left, _TOGETHER)
            for which in range(together):
                target[which] = offsets[place_of[pack + which]]
                prefetch(items, target[which])
                prefetch(items, target[which] + runs.documents[run] - 1)
            filled = 0
            for part in range(runs.begin[run], runs.begin[run + 1]):
                weight = np.uint32(runs.weight[part])
                amount = np.int64(runs.amount[part])
                source = next_of[weight]
                for copy in range(amount):
                    for which in range(together):
                        items[target[which] + filled + copy] = dealt[source + which * amount + copy]
                filled += amount
                next_of[weight] = source + together * amount
            pack += together
            left -= together


@compiled
def _lay_out(runs: Runs, place_of: NDArray[np.int32], offsets: NDArray[np.int64]) -> None:
    """Where the pack at each place begins."""
    offsets[0] = 0
    pack = 0
    for run in range(runs.packs.size):
        for _ in range(runs.packs[run]):
            offsets[place_of[pack] + 1] = runs.documents[run]
            pack += 1
    for place in range(place_of.size):
        offsets[place + 1] += offsets[place]
