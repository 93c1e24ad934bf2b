"""The three packing algorithms, compiled. ``reference.py`` says in plain Python what each must return, to the number.

All are integers only and take weights (tokens, or time in units of tokens) that the caller has checked: each in
``[1, capacity]``. They fill ``items`` and ``offsets`` and return the number of packs; pack ``p`` is
``items[offsets[p]:offsets[p + 1]]``. Arrays are sized by the heaviest document, not by the capacity, where possible.

First- and best-fit decreasing only look at how many documents there are of each weight. So they work on counts: one
pattern of weights stands for all packs that are filled alike, and documents are dealt to the finished patterns.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from trainer_kernels.compiled import compiled

BIG_SHARE = 97
"""Random-fill-close starts a pack with a big document (more than half a pack) when packs for all big ones would hold
at least this percentage of the pool: then partners are scarce, and a pack without a big document wastes them."""

_1 = np.uint64(1)
_63 = np.uint64(63)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


@intrinsic
def _leading_zeros(typing_context: Any, value: Any = None) -> Any:
    """Number of zero bits above the highest set bit of a non-zero uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@intrinsic
def _trailing_zeros(typing_context: Any, value: Any = None) -> Any:
    """Number of zero bits below the lowest set bit of a non-zero uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


# A set of small whole numbers with two levels of bits: bit i of `words` is the number i, bit j of `summary` says that
# words[j] is not zero. Finding the nearest member looks at a handful of words.


@compiled
def _insert(words: NDArray[np.uint64], summary: NDArray[np.uint64], number: int) -> None:
    words[number >> 6] |= _1 << np.uint64(number & 63)
    summary[number >> 12] |= _1 << np.uint64((number >> 6) & 63)


@compiled
def _remove(words: NDArray[np.uint64], summary: NDArray[np.uint64], number: int) -> None:
    words[number >> 6] &= ~(_1 << np.uint64(number & 63))
    if words[number >> 6] == 0:
        summary[number >> 12] &= ~(_1 << np.uint64((number >> 6) & 63))


@compiled
def _largest_up_to(words: NDArray[np.uint64], summary: NDArray[np.uint64], number: int) -> int:
    """The largest member <= ``number`` (which is within the set's range), or -1."""
    word = number >> 6
    bits = words[word] & (_ALL >> np.uint64(63 - (number & 63)))
    if bits == 0:
        block = word >> 6
        above = word & 63
        upper = summary[block] & ((_1 << np.uint64(above)) - _1)
        while upper == 0:
            block -= 1
            if block < 0:
                return -1
            upper = summary[block]
        word = (block << 6) + np.int64(_63 - _leading_zeros(upper))
        bits = words[word]
    return (word << 6) + np.int64(_63 - _leading_zeros(bits))


@compiled
def _smallest_from(words: NDArray[np.uint64], summary: NDArray[np.uint64], number: int) -> int:
    """The smallest member >= ``number`` (which is within the set's range), or -1."""
    word = number >> 6
    bits = words[word] & (_ALL << np.uint64(number & 63))
    if bits == 0:
        block = word >> 6
        below = word & 63
        upper = np.uint64(0) if below == 63 else summary[block] & (_ALL << np.uint64(below + 1))
        while upper == 0:
            block += 1
            if block >= summary.size:
                return -1
            upper = summary[block]
        word = (block << 6) + np.int64(_trailing_zeros(upper))
        bits = words[word]
    return (word << 6) + np.int64(_trailing_zeros(bits))


@compiled
def random_fill_close(
    weights: NDArray[np.int32],
    order: NDArray[np.int32],
    capacity: int,
    pool: int,
    max_docs: int,
    items: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> int:
    """Pack the stream ``order`` (document ids; ``weights`` are by place in it), looking ``pool`` documents ahead.

    A pack takes the next documents of the stream until one does not fit, and is closed with the heaviest that fit out
    of the pool, the newest of equals. The one that did not fit opens the next pack.
    """
    count = weights.size
    heaviest = int(weights.max())
    words = np.zeros((heaviest >> 6) + 1, np.uint64)
    summary = np.zeros((heaviest >> 12) + 1, np.uint64)
    # Documents of one weight in the pool are a stretch of a stack: the newest on top, taken from there to close packs;
    # the stream and the big ones take the oldest. So the top is in the pool whenever `waiting` is not zero.
    top = np.empty(heaviest + 1, np.int32)
    below = np.empty(count, np.int32)
    waiting = np.zeros(heaviest + 1, np.int32)
    taken = np.zeros(count, np.bool_)
    half = capacity // 2
    entered = 0  # places below this have entered the pool
    head = 0  # no place below this is in the pool
    big_head = 0  # no place below this is in the pool and big
    bigs = 0
    volume = 0
    filled = 0
    packs = 0
    offsets[0] = 0
    while filled < count:
        room = int(capacity)
        start = filled
        closing = False
        while filled - start < max_docs:
            while entered < count and entered - filled < pool:  # the pool is the next `pool` untaken documents
                weight = int(weights[entered])
                below[entered] = top[weight]
                top[weight] = entered
                if waiting[weight] == 0:
                    _insert(words, summary, weight)
                waiting[weight] += 1
                volume += weight
                bigs += weight > half
                entered += 1
            if entered == filled:
                break
            place = -1
            if filled == start and bigs > 0 and 100 * bigs * capacity >= BIG_SHARE * volume:
                while taken[big_head] or weights[big_head] <= half:
                    big_head += 1
                place = int(big_head)
            elif not closing:
                while taken[head]:
                    head += 1
                place = int(head)
                if weights[place] > room:
                    closing = True
            if closing:
                weight = int(_largest_up_to(words, summary, min(room, heaviest)))
                if weight < 0:
                    break
                place = int(top[weight])
                top[weight] = below[place]
            weight = int(weights[place])
            taken[place] = True
            waiting[weight] -= 1
            if waiting[weight] == 0:
                _remove(words, summary, weight)
            volume -= weight
            bigs -= weight > half
            room -= weight
            items[filled] = order[place]
            filled += 1
        packs += 1
        offsets[packs] = filled
    return packs


@compiled
def _deal_by_weight(
    weights: NDArray[np.int32], order: NDArray[np.int32], heaviest: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Documents sorted by weight, equals in ``order``: those of weight w are ``dealt[first[w]:first[w + 1]]``."""
    first = np.zeros(heaviest + 2, np.int64)
    for place in range(weights.size):
        first[weights[place] + 1] += 1
    for weight in range(heaviest + 1):
        first[weight + 1] += first[weight]
    free = first.copy()
    dealt = np.empty(weights.size, np.int32)
    for place in range(weights.size):
        weight = weights[place]
        dealt[free[weight]] = order[place]
        free[weight] += 1
    return first, dealt


@compiled
def _nearest_left(nearest: NDArray[np.int32], number: int) -> int:
    """Follow ``nearest`` to the largest weight <= ``number`` that has documents left (0: none), halving the path."""
    while nearest[number] != number:
        nearest[number] = nearest[nearest[number]]
        number = nearest[number]
    return number


@compiled
def first_fit_decreasing(
    weights: NDArray[np.int32],
    order: NDArray[np.int32],
    capacity: int,
    max_docs: int,
    items: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> int:
    """Exact first-fit decreasing. Its first pack is "the heaviest that fits, again and again", and so is the next.

    Documents of one weight go to packs in ``order``. A pattern is repeated while its documents last.
    """
    heaviest = int(weights.max())
    first, dealt = _deal_by_weight(weights, order, heaviest)
    next_of = first[:-1].copy()
    left = first[1:] - first[:-1]
    nearest = np.arange(heaviest + 1).astype(np.int32)
    for weight in range(1, heaviest + 1):
        if left[weight] == 0:
            nearest[weight] = weight - 1
    widest = min(int(weights.size), capacity) + 1
    pattern_weight = np.empty(widest, np.int32)
    pattern_count = np.empty(widest, np.int64)
    packs = 0
    filled = 0
    offsets[0] = 0
    while filled < weights.size:
        room = int(capacity)
        places = int(max_docs)
        size = 0
        repeats = int(weights.size)
        weight = int(_nearest_left(nearest, heaviest))
        while weight > 0 and places > 0:
            count = min(left[weight], room // weight, places)
            pattern_weight[size] = weight
            pattern_count[size] = count
            size += 1
            repeats = min(repeats, left[weight] // count)
            room -= count * weight
            places -= count
            weight = int(_nearest_left(nearest, min(room, weight - 1)))
        for _ in range(repeats):
            for part in range(size):
                weight = pattern_weight[part]
                for _copy in range(pattern_count[part]):
                    items[filled] = dealt[next_of[weight]]
                    next_of[weight] += 1
                    filled += 1
            packs += 1
            offsets[packs] = filled
        for part in range(size):
            weight = pattern_weight[part]
            left[weight] -= repeats * pattern_count[part]
            if left[weight] == 0:
                nearest[weight] = weight - 1
    return packs


@compiled
def _best_fit_patterns(
    first: NDArray[np.int64], count: int, capacity: int, max_docs: int
) -> tuple[NDArray[np.int32], ...]:
    """What best-fit decreasing makes of ``first[w + 1] - first[w]`` documents of each weight w, as a forest.

    A node is a step in the filling of one or many packs alike: ``amount`` documents of ``weight_of`` on top of
    ``parent`` (0: an empty pack); ``alike`` packs have stopped there. Nodes with the same room are a stack (``top`` by
    room, ``below``; 0 ends it), and among equal rooms the latest is filled first. ``top[0]`` are the closed ones.
    """
    parent = np.empty(count + 1, np.int32)  # each node takes at least one document, so there are at most `count`
    weight_of = np.empty(count + 1, np.int32)
    amount = np.empty(count + 1, np.int32)
    alike = np.empty(count + 1, np.int32)
    below = np.empty(count + 1, np.int32)
    documents = np.empty(count + 1, np.int32)  # in one pack at this node
    parent[0] = weight_of[0] = amount[0] = alike[0] = below[0] = documents[0] = 0
    nodes = 1
    top = np.zeros(capacity + 1, np.int32)
    words = np.zeros((capacity >> 6) + 1, np.uint64)  # rooms that have open packs
    summary = np.zeros((capacity >> 12) + 1, np.uint64)
    for weight in range(first.size - 2, 0, -1):
        left = first[weight + 1] - first[weight]
        while left > 0:
            room = _smallest_from(words, summary, weight)
            base = 0
            packs = left
            if room < 0:  # a new pack
                room = capacity
            else:
                base = int(top[room])
                packs = int(alike[base])
            fits = min(room // weight, int(max_docs - documents[base]))
            packs = min(packs, left // fits)
            take = fits
            if packs == 0:  # fewer left than one pack takes
                packs = 1
                take = left
            if base > 0:
                alike[base] -= packs
                if alike[base] == 0:
                    top[room] = below[base]
                    if top[room] == 0:
                        _remove(words, summary, room)
            left -= packs * take
            parent[nodes] = base
            weight_of[nodes] = weight
            amount[nodes] = take
            documents[nodes] = documents[base] + take
            alike[nodes] = packs
            rest = room - take * weight if documents[nodes] < max_docs else 0
            below[nodes] = top[rest]
            top[rest] = nodes
            if rest > 0:
                _insert(words, summary, rest)
            nodes += 1
    return parent, weight_of, amount, alike, below, top


@compiled
def best_fit_decreasing(
    weights: NDArray[np.int32],
    order: NDArray[np.int32],
    capacity: int,
    max_docs: int,
    items: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> int:
    """Exact best-fit decreasing: each document goes to the pack with the least room that still takes it.

    Closed packs (full, or with ``max_docs``) come out first, then by room, the latest of equals first; documents of
    one weight are dealt to them in ``order``.
    """
    next_of, dealt = _deal_by_weight(weights, order, int(weights.max()))
    parent, weight_of, amount, alike, below, top = _best_fit_patterns(next_of, weights.size, capacity, max_docs)
    path = np.empty(min(int(weights.size), capacity) + 1, np.int32)
    packs = 0
    filled = 0
    offsets[0] = 0
    for room in range(capacity + 1):
        node = top[room]
        while node > 0:
            depth = 0
            step = node
            while step > 0:
                path[depth] = step
                depth += 1
                step = parent[step]
            for _ in range(alike[node]):
                for index in range(depth - 1, -1, -1):
                    weight = weight_of[path[index]]
                    for _copy in range(amount[path[index]]):
                        items[filled] = dealt[next_of[weight]]
                        next_of[weight] += 1
                        filled += 1
                packs += 1
                offsets[packs] = filled
            node = below[node]
    return packs


@compiled
def reorder_packs(
    items: NDArray[np.int32],
    offsets: NDArray[np.int64],
    order: NDArray[np.int32],
    new_items: NDArray[np.int32],
    new_offsets: NDArray[np.int64],
) -> None:
    """The same packs in another order: pack ``order[p]`` comes to place ``p``."""
    filled = 0
    new_offsets[0] = 0
    for place in range(order.size):
        pack = order[place]
        for index in range(offsets[pack], offsets[pack + 1]):
            new_items[filled] = items[index]
            filled += 1
        new_offsets[place + 1] = filled
