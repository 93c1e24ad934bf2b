"""The three packing algorithms, compiled. ``reference.py`` says in plain Python what each must return, to the number.

All are integers only and take weights (tokens, or time in units of tokens) that the caller has checked: each in
``[1, capacity]``. Pack ``p`` is ``items[offsets[p]:offsets[p + 1]]``. Arrays are sized by the heaviest document, not by
the capacity, where possible.

Random-fill-close goes through the documents one by one; what a processor loses there are mispredicted branches and
chains of writes to one place, so bits are set and cleared without asking. First- and best-fit decreasing only look at
how many documents there are of each weight: they work on counts, find ``Runs`` of packs that are filled alike, and
documents are handed out to the finished runs.
"""

from typing import Any, NamedTuple

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


# A set of small whole numbers with two levels of bits: bit i of `words` is the number i; bit j of `summary` is set if
# words[j] is not zero. It may also be set when words[j] has become zero since: a search that comes by clears it.
# Finding the nearest member looks at a handful of words.


@compiled
def _insert(words: NDArray[np.uint64], summary: NDArray[np.uint64], number: int) -> None:
    word = number >> 6
    before = words[word]
    words[word] = before | (_1 << np.uint64(number & 63))
    if before == 0:
        summary[word >> 6] |= _1 << np.uint64(word & 63)


@compiled
def _remove_if(words: NDArray[np.uint64], number: int, gone: bool) -> None:
    words[number >> 6] &= ~(np.uint64(gone) << np.uint64(number & 63))


@compiled
def _largest_up_to(words: NDArray[np.uint64], summary: NDArray[np.uint64], number: int) -> int:
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
def _smallest_from(words: NDArray[np.uint64], summary: NDArray[np.uint64], number: int) -> int:
    """The smallest member >= ``number`` (which is within the set's range), or -1."""
    word = number >> 6
    bits = words[word] & (_ALL << np.uint64(number & 63))
    block = word >> 6
    higher = (_ALL << np.uint64(word & 63)) << _1
    while bits == 0:
        upper = summary[block] & higher
        if upper == 0:
            block += 1
            higher = _ALL
            if block >= summary.size:
                return -1
            continue
        bit = _trailing_zeros(upper)
        word = (block << 6) + np.int64(bit)
        bits = words[word]
        if bits == 0:
            summary[block] &= ~(_1 << bit)
    return (word << 6) + np.int64(_trailing_zeros(bits))


class _Pool(NamedTuple):
    """The documents that random-fill-close may choose from: the next ones of the stream that are not in a pack.

    Those of one weight are a stretch of a stack (``top`` by weight, ``below`` by place), the newest on top, taken from
    there to close packs; the stream and the big ones take the oldest. So the top is in the pool whenever ``waiting``,
    how many there are, is not zero. ``words`` and ``summary`` are the set of weights that have some. ``sums``: the
    weight of all, and how many are big, that is above ``half``.
    """

    top: NDArray[np.int32]
    below: NDArray[np.int32]
    waiting: NDArray[np.int32]
    words: NDArray[np.uint64]
    summary: NDArray[np.uint64]
    sums: NDArray[np.int64]
    half: int


@compiled
def _empty_pool(count: int, heaviest: int, half: int) -> _Pool:
    return _Pool(
        np.empty(heaviest + 1, np.int32),
        np.empty(count, np.int32),
        np.zeros(heaviest + 1, np.int32),
        np.zeros((heaviest >> 6) + 1, np.uint64),
        np.zeros((heaviest >> 12) + 1, np.uint64),
        np.zeros(2, np.int64),
        half,
    )


@compiled
def _enter(pool: _Pool, weights: NDArray[np.uint32], first: int, stop: int) -> int:
    """Put places ``[first, stop)`` into the pool; returns ``stop``, or ``first`` if that is more."""
    for place in range(first, stop):
        weight = weights[place]
        pool.below[place] = pool.top[weight]
        pool.top[weight] = place
        pool.waiting[weight] += 1
        _insert(pool.words, pool.summary, weight)
        pool.sums[0] += weight
        pool.sums[1] += weight > pool.half
    return max(first, stop)


@compiled
def _leave(pool: _Pool, weight: int) -> None:
    """One document of ``weight`` less."""
    left = pool.waiting[weight] - 1
    pool.waiting[weight] = left
    _remove_if(pool.words, weight, left == 0)
    pool.sums[0] -= weight
    pool.sums[1] -= weight > pool.half


@compiled
def _next_big(weights: NDArray[np.uint32], taken: NDArray[np.bool_], place: int, half: int) -> int:
    """The first place from ``place`` on with a document of more than ``half`` that is not in a pack (there is one)."""
    while taken[place] or weights[place] <= half:
        place += 1
    return place


@compiled
def _fill(
    pool: _Pool,
    weights: NDArray[np.uint32],
    taken: NDArray[np.bool_],
    head: int,
    entered: int,
    room: int,
    packed: NDArray[np.int32],
) -> tuple[int, int, int]:
    """Take the stream from ``head`` on, to one that does not fit, the end of the pool, or that of ``packed``.

    Writes the places of those taken to ``packed``; returns the new head, the room left, and how many were taken.
    """
    filled = 0
    while filled < packed.size and head < entered:
        if not taken[head]:
            weight = weights[head]
            if weight > room:
                break
            _leave(pool, weight)
            room -= weight
            packed[filled] = head
            filled += 1
        head += 1
    return head, room, filled


@compiled
def _close(
    pool: _Pool,
    weights: NDArray[np.uint32],
    taken: NDArray[np.bool_],
    entered: int,
    room: int,
    packed: NDArray[np.int32],
) -> tuple[int, int]:
    """Take the heaviest that fit, the newest of equals, while there is one; for each, one enters the pool.

    Writes their places to ``packed``; returns how many places have entered the pool, and how many were taken.
    """
    filled = 0
    heaviest = pool.top.size - 1
    while filled < packed.size and room > 0:
        weight = _largest_up_to(pool.words, pool.summary, min(room, heaviest))
        if weight < 0:
            break
        place = pool.top[weight]
        pool.top[weight] = pool.below[place]
        taken[place] = True
        _leave(pool, weight)
        room -= weight
        packed[filled] = place
        filled += 1
        entered = _enter(pool, weights, entered, min(entered + 1, weights.size))
    return entered, filled


@compiled
def random_fill_close(
    weights: NDArray[np.uint32],
    capacity: int,
    ahead: int,
    max_docs: int,
    places: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> int:
    """Pack a stream of documents of ``weights``, looking ``ahead`` documents ahead; returns the number of packs.

    A pack takes the next documents of the stream until one does not fit, and is closed with the heaviest that fit out
    of the pool, the newest of equals. The one that did not fit opens the next pack. Pack ``p`` is the documents at
    ``places[offsets[p]:offsets[p + 1]]`` of the stream.
    """
    count = weights.size
    pool = _empty_pool(count, np.int64(weights.max()), capacity // 2)
    taken = np.zeros(count, np.bool_)
    entered = 0  # places below this have entered the pool
    head = 0  # no place below this is in the pool
    big_head = 0  # no place below this is in the pool and big
    filled = 0
    packs = 0
    offsets[0] = 0
    while filled < count:
        room = np.int64(capacity)
        stop = min(count, filled + max_docs)
        entered = _enter(pool, weights, entered, min(count, filled + ahead))
        if pool.sums[1] > 0 and 100 * pool.sums[1] * capacity >= BIG_SHARE * pool.sums[0]:
            big_head = _next_big(weights, taken, big_head, pool.half)
            taken[big_head] = True
            _leave(pool, weights[big_head])
            room -= weights[big_head]
            places[filled] = big_head
            filled += 1
        while True:  # again where the pool was too small for one pack
            known = entered
            head, room, more = _fill(pool, weights, taken, head, known, room, places[filled:stop])
            filled += more
            entered = _enter(pool, weights, known, min(count, filled + ahead))
            if head < known or entered == known:
                break
        entered, more = _close(pool, weights, taken, entered, room, places[filled:stop])
        filled += more
        packs += 1
        offsets[packs] = filled
    return packs


@compiled
def gathered(values: NDArray[np.int32], places: NDArray[np.int32], out: NDArray[np.int32]) -> None:
    """``out[i] = values[places[i]]``, without the 64-bit copy of ``places`` that NumPy makes."""
    for index in range(places.size):
        out[index] = values[places[index]]


class Runs(NamedTuple):
    """Packs that are filled alike: run ``r`` stands for ``packs[r]`` packs, each of ``documents[r]`` documents.

    Each takes ``amount[i]`` documents of ``weight[i]`` for ``i`` in ``[begin[r], begin[r + 1])``, in this order.
    """

    weight: NDArray[np.int32]
    amount: NDArray[np.int32]
    begin: NDArray[np.int64]
    documents: NDArray[np.int64]
    packs: NDArray[np.int64]


@compiled
def count_weights(weights: NDArray[np.int32]) -> NDArray[np.int64]:
    """``first`` int64[heaviest + 2]: sorted by weight, documents of weight w are those in ``[first[w], first[w + 1])``."""
    first = np.zeros(np.int64(weights.max()) + 2, np.int64)
    for place in range(weights.size):
        first[np.uint32(weights[place]) + 1] += 1
    for weight in range(first.size - 1):
        first[weight + 1] += first[weight]
    return first


@compiled
def _sorted_by_weight(
    weights: NDArray[np.int32],
    first: NDArray[np.int64],
    stretches: NDArray[np.int32],
    width: int,
    dealt: NDArray[np.int32],
) -> None:
    """Document ids by weight; equals as they come in ``stretches`` of ``width`` documents in a row."""
    free = first.copy()
    for index in range(stretches.size):
        begin = np.int64(stretches[index]) * width
        for document in range(begin, min(begin + width, weights.size)):
            weight = np.uint32(weights[document])
            dealt[free[weight]] = document
            free[weight] += 1


@compiled
def _nearest_left(nearest: NDArray[np.int32], number: int) -> int:
    """Follow ``nearest`` to the largest weight <= ``number`` that has documents left (0: none), halving the path."""
    while nearest[number] != number:
        nearest[number] = nearest[nearest[number]]
        number = nearest[number]
    return number


@compiled
def first_fit_decreasing(first: NDArray[np.int64], capacity: int, max_docs: int) -> Runs:
    """Exact first-fit decreasing. Its first pack is "the heaviest that fits, again and again", and so is the next.

    A pattern is repeated while its documents last.
    """
    heaviest = first.size - 2
    count = first[heaviest + 1]
    left = first[1:] - first[:-1]
    nearest = np.arange(heaviest + 1).astype(np.int32)
    for weight in range(1, heaviest + 1):
        if left[weight] == 0:
            nearest[weight] = weight - 1
    runs = _no_runs(count)
    parts = 0
    size = 0
    weight = int(_nearest_left(nearest, heaviest))
    while weight > 0:
        room = int(capacity)
        places = int(max_docs)
        repeats = int(count)
        begin = parts
        while weight > 0 and places > 0:
            amount = min(left[weight], room // weight, places)
            runs.weight[parts] = weight
            runs.amount[parts] = amount
            parts += 1
            repeats = min(repeats, left[weight] // amount)
            room -= amount * weight
            places -= amount
            weight = int(_nearest_left(nearest, min(room, weight - 1)))
        for part in range(begin, parts):
            weight = runs.weight[part]
            left[weight] -= repeats * runs.amount[part]
            if left[weight] == 0:
                nearest[weight] = weight - 1
        runs.documents[size] = max_docs - places
        runs.packs[size] = repeats
        size += 1
        runs.begin[size] = parts
        weight = int(_nearest_left(nearest, heaviest))
    return _trimmed(runs, size)


@compiled
def _no_runs(count: int) -> Runs:
    """Room for all runs of ``count`` documents: every part of a run takes at least one, so there are at most that."""
    runs = Runs(
        np.empty(count, np.int32),
        np.empty(count, np.int32),
        np.empty(count + 1, np.int64),
        np.empty(count, np.int64),
        np.empty(count, np.int64),
    )
    runs.begin[0] = 0
    return runs


@compiled
def _trimmed(runs: Runs, size: int) -> Runs:
    parts = runs.begin[size]
    return Runs(
        runs.weight[:parts],
        runs.amount[:parts],
        runs.begin[: size + 1],
        runs.documents[:size],
        runs.packs[:size],
    )


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
                packs = int(forest.alike[base])
            take = min(room // weight, int(max_docs - forest.documents[base]))
            packs = min(packs, left // take)
            if packs == 0:  # fewer left than one pack takes
                packs = 1
                take = left
            if base > 0:
                forest.alike[base] -= packs
                if forest.alike[base] == 0:
                    top[room] = forest.below[base]
                    _remove_if(words, room, top[room] == 0)
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
                _insert(words, summary, rest)
            nodes += 1
    return forest


@compiled
def best_fit_decreasing(first: NDArray[np.int64], capacity: int, max_docs: int) -> Runs:
    """Exact best-fit decreasing: each document goes to the pack with the least room that still takes it.

    Closed packs (full, or with ``max_docs``) come first, then by room, the latest of equals first.
    """
    forest = _grown_forest(first, capacity, max_docs)
    runs = _no_runs(first[first.size - 1])
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
    return _trimmed(runs, size)


@compiled
def hand_out(
    weights: NDArray[np.int32],
    first: NDArray[np.int64],
    stretches: NDArray[np.int32],
    width: int,
    runs: Runs,
    order: NDArray[np.int32],
    dealt: NDArray[np.int32],
    items: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> None:
    """Give the documents to the packs of ``runs``, pack ``order[p]`` to place ``p`` of ``items`` and ``offsets``.

    Documents of one weight go to runs, and within a run to packs, as they come in ``stretches`` of ``width`` documents.
    """
    _sorted_by_weight(weights, first, stretches, width, dealt)
    place_of = np.empty(order.size, np.int32)
    for place in range(order.size):
        place_of[order[place]] = place
    offsets[0] = 0
    pack = 0
    for run in range(runs.packs.size):
        for _ in range(runs.packs[run]):
            offsets[place_of[pack] + 1] = runs.documents[run]
            pack += 1
    for place in range(order.size):
        offsets[place + 1] += offsets[place]
    next_of = first.copy()
    pack = 0
    for run in range(runs.packs.size):
        for _ in range(runs.packs[run]):
            filled = offsets[place_of[pack]]
            for part in range(runs.begin[run], runs.begin[run + 1]):
                weight = np.uint32(runs.weight[part])
                source = next_of[weight]
                amount = runs.amount[part]
                for copy in range(amount):
                    items[filled + copy] = dealt[source + copy]
                next_of[weight] = source + amount
                filled += amount
            pack += 1
