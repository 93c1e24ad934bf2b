"""The three packing algorithms, compiled. ``reference.py`` says in plain Python what each must return, to the number.

All are integers only and take weights (tokens, or time in units of tokens) that the caller has checked: each in
``[1, capacity]``. Arrays are sized by the heaviest document, not by the capacity, where possible.

Random-fill-close goes through the documents one by one; what a processor loses there are mispredicted branches and
chains of writes to one place, so bits are set and cleared without asking. First- and best-fit decreasing only look at
how many documents there are of each weight: they work on counts, and find ``Runs`` of packs that are filled alike.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from trainer_kernels.compiled import compiled
from trainer_kernels.dealing import Runs

BIG_SHARE = 97
"""Random-fill-close starts a pack with a big document (more than half a pack) when packs for all big ones would hold
at least this percentage of the pool: then partners are scarce, and a pack without a big document wastes them."""

_1 = np.uint64(1)
_63 = np.uint64(63)
_6 = np.uint32(6)
_WITHIN = np.uint32(63)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)

Number = int | np.integer[Any]


@intrinsic
def _leading_zeros(typing_context: Any, value: Any = None) -> Any:
    """Number of zero bits above the highest set bit of a non-zero uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


# A set of small whole numbers with two levels of bits: bit i of `words` is the number i; bit j of `summary` is set if
# words[j] is not zero. It may also be set when words[j] has become zero since: a search that comes by clears it.
# Finding the nearest member looks at a handful of words.


@compiled
def _insert(words: NDArray[np.uint64], summary: NDArray[np.uint64], number: Number) -> None:
    word = number >> 6
    before = words[word]
    words[word] = before | (_1 << np.uint64(number & 63))
    if before == 0:
        summary[word >> 6] |= _1 << np.uint64(word & 63)


@compiled
def _remove_if(words: NDArray[np.uint64], number: Number, gone: bool) -> None:
    words[number >> 6] &= ~(np.uint64(gone) << np.uint64(number & 63))


@compiled
def _largest_up_to(words: NDArray[np.uint64], summary: NDArray[np.uint64], number: Number) -> int:
    """The largest member <= ``number`` (which is within the set's range), or -1."""
    word = number >> 6
    bits = words[word] & (_ALL >> np.uint64(63 - (number & 63)))
    block = word >> 6
    lower = (_1 << np.uint64(word & 63)) - _1
    while bits == 0:
        upper = summary[block] & lower
        if upper == 0:
            block -= 1
            lower = _ALL
            if block < 0:
                return -1
            continue
        bit = _63 - _leading_zeros(upper)
        word = (block << 6) + np.int64(bit)
        bits = words[word]
        if bits == 0:
            summary[block] &= ~(_1 << bit)
    return (word << 6) + np.int64(_63 - _leading_zeros(bits))


@compiled
def weights_in_order(
    weights_of: NDArray[np.integer], order: NDArray[np.int32], weights: NDArray[np.uint32]
) -> np.int64:
    """Fill ``weights`` with ``weights_of[document]`` for the documents of ``order``; returns the sum."""
    total = np.int64(0)
    for place in range(order.size):
        weight = weights_of[np.uint32(order[place])]
        weights[place] = weight
        total += np.int64(weight)
    return total


@compiled
def random_fill_close(
    weights: NDArray[np.uint32],
    order: NDArray[np.int32],
    capacity: int,
    ahead: int,
    max_docs: int,
    items: NDArray[np.int32],
) -> NDArray[np.int64]:
    """Pack the documents ``order``, of weights ``weights[place]``, looking ``ahead`` of them ahead.

    A pack takes the next documents until one does not fit, and is closed with the heaviest that fit out of the pool,
    the newest of equals. The one that did not fit opens the next pack. Fills ``items`` with the documents of all packs
    and returns where each pack ends in it. ``weights`` are overwritten.

    The pool are the next ``ahead`` documents that are not in a pack. Those of one weight are a stack (``top`` by
    weight, ``below`` by place), the newest on top, taken from there to close packs; the stream and the big ones take
    the oldest. So a weight has documents in the pool as long as the stream has not passed its top, and nobody counts
    them. One that was taken out of its turn weighs nothing from then on: the stream passes it without a question that
    cannot be predicted.

    It is all in one function, because arrays that are handed to another are counted by reference, at every call.
    """
    count = np.int64(order.size)
    heaviest = np.int64(weights.max())
    half = np.uint32(capacity // 2)
    top = np.full(heaviest + 1, -1, np.int32)
    below = np.empty(count, np.int32)
    words = np.zeros((heaviest >> 6) + 1, np.uint64)  # weights that have documents in the pool
    summary = np.zeros((heaviest >> 12) + 1, np.uint64)
    volume = np.int64(0)  # weight of all documents in the pool
    bigs = np.int64(0)  # how many of them are big, that is above half a pack
    entered = np.int64(0)  # places below this have entered the pool
    head = np.int64(0)  # no place below this is in the pool
    big_head = np.int64(0)  # no place below this is in the pool and big
    filled = np.int64(0)
    ends = np.empty(count, np.int64)
    packs = np.int64(0)
    while filled < count:
        room = np.int64(capacity)
        stop = min(count, filled + max_docs)
        closing = False
        while room > 0 and filled < stop:
            for place in range(entered, min(count, filled + ahead)):
                weight = weights[place]
                below[place] = top[weight]
                top[weight] = place
                word = weight >> _6
                before = words[word]
                words[word] = before | (_1 << np.uint64(weight & _WITHIN))
                if before == 0:
                    summary[word >> _6] |= _1 << np.uint64(word & _WITHIN)
                volume += np.int64(weight)
                bigs += np.int64(weight > half)
            entered = min(count, filled + ahead)
            if closing:
                found = _largest_up_to(words, summary, min(room, heaviest))
                if found < 0:
                    break
                weight = np.uint32(found)
                place = top[weight]
                top[weight] = below[place]
                weights[place] = 0
                # Not a big one that was taken, either: where a big one fits, the head does not, so it is big and left,
                # and those that were taken were older.
                gone = top[weight] < head
            elif room == capacity and bigs > 0 and 100 * bigs * capacity >= BIG_SHARE * volume:
                big_head = max(big_head, head)
                while weights[big_head] <= half:
                    big_head += 1
                place = big_head
                weight = weights[place]
                weights[place] = 0
                gone = top[weight] == place
            else:
                while filled < stop and head < entered:
                    weight = weights[head]
                    if np.int64(weight) > room:
                        break
                    words[weight >> _6] &= ~(np.uint64(top[weight] == head) << np.uint64(weight & _WITHIN))
                    items[filled] = order[head]  # written again by the next one, if this one is gone
                    filled += np.int64(weight > 0)
                    bigs -= np.int64(weight > half)
                    volume -= np.int64(weight)
                    room -= np.int64(weight)
                    head += 1
                closing = head < entered  # else the pool was too small for one pack
                continue
            words[weight >> _6] &= ~(np.uint64(gone) << np.uint64(weight & _WITHIN))
            items[filled] = order[place]
            filled += 1
            bigs -= np.int64(weight > half)
            volume -= np.int64(weight)
            room -= np.int64(weight)
        ends[packs] = filled
        packs += 1
    return ends[:packs].copy()


@compiled
def first_fit_decreasing(first: NDArray[np.int64], capacity: int, max_docs: int, runs: Runs) -> int:
    """Exact first-fit decreasing. Its first pack is "the heaviest that fits, again and again", and so is the next.

    A pattern is repeated while its documents last. ``first`` is of ``count_weights``; fills ``runs``, returns how many.
    """
    heaviest = first.size - 2
    left = first[1:] - first[:-1]
    words = np.zeros((heaviest >> 6) + 1, np.uint64)  # weights that have documents left
    summary = np.zeros((heaviest >> 12) + 1, np.uint64)
    for weight in range(1, heaviest + 1):
        if left[weight] > 0:
            _insert(words, summary, weight)
    parts = 0
    size = 0
    weight = _largest_up_to(words, summary, heaviest)
    while weight > 0:
        room = np.int64(capacity)
        places = np.int64(max_docs)
        repeats = left[weight]
        begin = parts
        while weight > 0 and places > 0:
            amount = min(left[weight], room // weight, places)
            runs.weight[parts] = weight
            runs.amount[parts] = amount
            parts += 1
            repeats = min(repeats, left[weight] // amount)
            room -= amount * weight
            places -= amount
            weight = _largest_up_to(words, summary, min(room, weight - 1))
        for part in range(begin, parts):
            weight = np.int64(runs.weight[part])
            left[weight] -= repeats * runs.amount[part]
            _remove_if(words, weight, left[weight] == 0)
        runs.documents[size] = max_docs - places
        runs.packs[size] = repeats
        size += 1
        runs.begin[size] = parts
        weight = _largest_up_to(words, summary, heaviest)
    return size


class _Forest(NamedTuple):
    """How best-fit decreasing fills packs. Node 0 is an empty pack.

    Another node is a step in the filling of one or many packs alike: ``amount`` documents of ``weight`` on top of
    ``parent``; ``alike`` packs have stopped there, with ``documents`` each. Nodes with the same room are a stack
    (``top`` by room, ``below``; 0 ends it), and among equal rooms the latest is filled first. ``top[0]`` are closed.
    """

    parent: NDArray[np.int32]
    weight: NDArray[np.int32]
    amount: NDArray[np.int32]
    alike: NDArray[np.int32]
    documents: NDArray[np.int32]
    below: NDArray[np.int32]
    top: NDArray[np.int32]


@compiled
def _grown_forest(first: NDArray[np.int64], capacity: int, max_docs: int) -> _Forest:
    size = first[first.size - 1] + 1  # each node takes at least one document
    forest = _Forest(
        np.empty(size, np.int32),
        np.empty(size, np.int32),
        np.empty(size, np.int32),
        np.empty(size, np.int32),
        np.empty(size, np.int32),
        np.empty(size, np.int32),
        np.zeros(capacity + 1, np.int32),
    )
    forest.documents[0] = 0
    nodes = 1
    top = forest.top
    words = np.zeros((capacity >> 6) + 1, np.uint64)  # how full open packs are: the search looks downwards
    summary = np.zeros((capacity >> 12) + 1, np.uint64)
    for weight in range(first.size - 2, 0, -1):
        left = first[weight + 1] - first[weight]
        while left > 0:
            used = max(_largest_up_to(words, summary, capacity - weight), 0)  # 0: none, so a new pack
            room = capacity - used
            base = np.int64(top[room]) if used > 0 else 0
            packs = np.int64(forest.alike[base]) if used > 0 else left
            take = min(room // weight, max_docs - np.int64(forest.documents[base]))
            packs = min(packs, left // take)
            if packs == 0:  # fewer left than one pack takes
                packs = 1
                take = left
            if base > 0:
                forest.alike[base] -= packs
                if forest.alike[base] == 0:
                    top[room] = forest.below[base]
                    _remove_if(words, used, top[room] == 0)
            left -= packs * take
            forest.parent[nodes] = base
            forest.weight[nodes] = weight
            forest.amount[nodes] = take
            forest.documents[nodes] = forest.documents[base] + take
            forest.alike[nodes] = packs
            rest = room - take * weight if forest.documents[nodes] < max_docs else 0
            forest.below[nodes] = top[rest]
            top[rest] = nodes
            if rest > 0:
                _insert(words, summary, capacity - rest)
            nodes += 1
    return forest


@compiled
def best_fit_decreasing(first: NDArray[np.int64], capacity: int, max_docs: int, runs: Runs) -> int:
    """Exact best-fit decreasing: each document goes to the pack with the least room that still takes it.

    Closed packs (full, or with ``max_docs``) come first, then by room, the latest of equals first. Arguments as above.
    """
    forest = _grown_forest(first, capacity, max_docs)
    parts = 0
    size = 0
    for room in range(capacity + 1):
        node = forest.top[room]
        while node > 0:
            begin = parts
            step = node
            while step > 0:
                runs.weight[parts] = forest.weight[step]
                runs.amount[parts] = forest.amount[step]
                parts += 1
                step = forest.parent[step]
            runs.weight[begin:parts] = runs.weight[begin:parts][::-1].copy()
            runs.amount[begin:parts] = runs.amount[begin:parts][::-1].copy()
            runs.documents[size] = forest.documents[node]
            runs.packs[size] = forest.alike[node]
            size += 1
            runs.begin[size] = parts
            node = forest.below[node]
    return size
