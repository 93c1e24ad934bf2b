"""The seeded order of documents: a keyed bijection of ``[0, n)`` instead of a shuffled array.

A shuffled array must be made whole before its first element can be read, and the order of a library's shuffle may
change with its version. A Feistel network is a bijection whatever its round function is (Luby and Rackoff 1988), can be
entered anywhere, and is integers only: the same on every machine, at every world size.

A round looks at half of the bits, so it can only be asked about as many values as the square root of the count. All
answers are computed once, with a scrambler as strong as one likes, and fit in the fastest cache; a round is then one
look-up. Values outside ``[0, count)`` are collected and sent through again together: one by one, every such branch
would be mispredicted.
"""

import numpy as np
from numpy.typing import NDArray

from trainer_kernels.compiled import compiled

DOCUMENTS = 1
"""Purpose of an order: of documents."""
PACKS = 2
"""Purpose of an order: of finished packs. Another purpose gives an unrelated order for the same seed and epoch."""

ROUNDS = 4
SMALLEST_BITS = 12
"""Halves of few bits mix badly; small counts borrow a larger domain, and values outside ``[0, n)`` are walked over."""

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLY_1 = 0xBF58476D1CE4E5B9
MULTIPLY_2 = 0x94D049BB133111EB

_MULTIPLY_1 = np.uint64(MULTIPLY_1)
_MULTIPLY_2 = np.uint64(MULTIPLY_2)
_30 = np.uint64(30)
_27 = np.uint64(27)
_31 = np.uint64(31)

_BATCH = 2048
"""Places computed together; what belongs to a batch stays in the fastest cache."""


def mix(value: int) -> int:
    """A bijective scrambler of 64 bits: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    value &= MASK
    value = ((value ^ (value >> 30)) * MULTIPLY_1) & MASK
    value = ((value ^ (value >> 27)) * MULTIPLY_2) & MASK
    return value ^ (value >> 31)


def round_keys(seed: int, epoch: int, purpose: int) -> list[int]:
    """``ROUNDS`` 64-bit keys of one order."""
    state = mix(seed + purpose * GOLDEN)
    state = mix(state + (epoch + 1) * GOLDEN)
    return [mix(state + (index + 1) * GOLDEN) for index in range(ROUNDS)]


def domain_bits(count: int) -> tuple[int, int]:
    """``(high, low)``: the widths of the two halves of the smallest domain used for ``count`` elements."""
    bits = max(SMALLEST_BITS, (count - 1).bit_length())
    return bits // 2, bits - bits // 2


def permuted(
    count: int, seed: int, epoch: int, purpose: int, first: int = 0, stop: int | None = None
) -> NDArray[np.int32]:
    """Elements at places ``[first, stop)`` of the order of ``[0, count)``; ``count`` in ``[1, 2**31)``."""
    stop = count if stop is None else stop
    keys = np.array(round_keys(seed, epoch, purpose), np.uint64)
    high, low = domain_bits(count)
    out = np.empty(stop - first, np.int32)
    _fill_order(count, first, _round_tables(keys, high, low), low, out)
    return out


@compiled
def _mix(value: np.uint64) -> np.uint64:
    value = (value ^ (value >> _30)) * _MULTIPLY_1
    value = (value ^ (value >> _27)) * _MULTIPLY_2
    return value ^ (value >> _31)


@compiled
def _round_tables(keys: NDArray[np.uint64], high: int, low: int) -> NDArray[np.uint16]:
    """What each round adds to one half, by the value of the other: uint16[ROUNDS, 2**low]; halves have <= 16 bits."""
    tables = np.zeros((keys.size, 1 << low), np.uint16)
    for index in range(keys.size):
        changes_high = index % 2 == 0
        mask = np.uint64((1 << (high if changes_high else low)) - 1)
        for value in range(1 << (low if changes_high else high)):
            tables[index, value] = _mix(np.uint64(value) + keys[index]) & mask
    return tables


@compiled
def _encrypt(value: np.uint32, tables: NDArray[np.uint16], low: np.uint32, low_mask: np.uint32) -> np.uint32:
    left = value >> low
    right = value & low_mask
    left ^= np.uint32(tables[0, right])
    right ^= np.uint32(tables[1, left])
    left ^= np.uint32(tables[2, right])
    right ^= np.uint32(tables[3, left])
    return np.uint32((left << low) | right)


@compiled
def _fill_order(count: int, first: int, tables: NDArray[np.uint16], low_bits: int, out: NDArray[np.int32]) -> None:
    low = np.uint32(low_bits)
    low_mask = np.uint32((1 << low_bits) - 1)
    outside = np.empty(_BATCH, np.int64)  # where values of this batch are that are not below `count`
    for begin in range(0, out.size, _BATCH):
        batch = out[begin : begin + _BATCH].view(np.uint32)
        pending = 0
        for index in range(batch.size):
            batch[index] = _encrypt(np.uint32(first + begin + index), tables, low, low_mask)
        for index in range(batch.size):
            outside[pending] = index
            pending += batch[index] >= count
        while pending > 0:
            still = 0
            for which in range(pending):
                index = outside[which]
                batch[index] = _encrypt(np.uint32(batch[index]), tables, low, low_mask)
                outside[still] = index
                still += batch[index] >= count
            pending = still
