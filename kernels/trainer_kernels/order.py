"""The seeded order of documents: a keyed bijection of ``[0, n)`` instead of a shuffled array.

A shuffled array must be made whole before its first element can be read, and the order of a library's shuffle may
change with its version. A Feistel network is a bijection whatever its round function is (Luby and Rackoff 1988), needs
no memory, can be entered anywhere, and is integers only: the same on every machine, at every world size.
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
_1 = np.uint64(1)


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
    _fill_order(np.uint64(count), np.uint64(first), keys, np.uint64(high), np.uint64(low), out)
    return out


@compiled
def _mix(value: np.uint64) -> np.uint64:
    value = (value ^ (value >> _30)) * _MULTIPLY_1
    value = (value ^ (value >> _27)) * _MULTIPLY_2
    return value ^ (value >> _31)


@compiled
def _fill_order(
    count: np.uint64,
    first: np.uint64,
    keys: NDArray[np.uint64],
    high: np.uint64,
    low: np.uint64,
    out: NDArray[np.int32],
) -> None:
    high_mask = (_1 << high) - _1
    low_mask = (_1 << low) - _1
    key0, key1, key2, key3 = keys[0], keys[1], keys[2], keys[3]
    for place in range(out.size):
        value = first + np.uint64(place)
        while True:
            left = value >> low
            right = value & low_mask
            left ^= _mix(right + key0) & high_mask
            right ^= _mix(left + key1) & low_mask
            left ^= _mix(right + key2) & high_mask
            right ^= _mix(left + key3) & low_mask
            value = (left << low) | right
            if value < count:
                break
        out[place] = np.int32(value)
