"""Lengths as data has them, for the benchmarks: one definition, so that their tables can be compared.

Lognormal chat data, short instructions, a tenth of long documents among chat, and uniform lengths, which are the hard
case of packing: half of the documents need a pack of their own.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int32]


def lognormal(count: int, median: float, sigma: float, longest: int, random: np.random.Generator) -> Lengths:
    """``count`` lengths in tokens, cut to ``[1, longest]``."""
    return np.clip(random.lognormal(np.log(median), sigma, count), 1, longest).astype(np.int32)


def chat(count: int, capacity: int, seed: int) -> Lengths:
    """Median 350, a heavy tail up to 8192."""
    return lognormal(count, 350, 1.1, min(capacity, 8192), np.random.default_rng(seed))


def short(count: int, capacity: int, seed: int) -> Lengths:
    """Median 120, up to 2048."""
    return lognormal(count, 120, 0.7, min(capacity, 2048), np.random.default_rng(seed))


def long_mix(count: int, capacity: int, seed: int) -> Lengths:
    """Nine in ten as in chat, one in ten of median 6000, up to a whole pack."""
    random = np.random.default_rng(seed)
    usual = lognormal(count, 350, 1.1, min(capacity, 8192), random)
    long = lognormal(count, 6000, 0.8, capacity, random)
    return np.where(random.random(count) < 0.1, long, usual).astype(np.int32)


def uniform(count: int, capacity: int, seed: int) -> Lengths:
    """1 to a whole pack."""
    return np.random.default_rng(seed).integers(1, capacity + 1, count).astype(np.int32)


LENGTHS: dict[str, Callable[[int, int, int], Lengths]] = {
    "chat": chat,
    "short": short,
    "long_mix": long_mix,
    "uniform": uniform,
}


def lower_bound(lengths: Lengths, capacity: int) -> int:
    """Fewest packs that could do: the larger of volume / capacity and the bound L2 of Martello and Toth (1990).

    L2: documents above ``capacity - k`` fit with nothing of at least ``k``, so for every ``k`` up to half a pack, those
    above half a pack need one each, and what the room they leave cannot take of ``[k, capacity / 2]`` needs more.
    """
    number = np.bincount(lengths, minlength=capacity + 1).astype(np.int64)
    count, volume = np.cumsum(number), np.cumsum(number * np.arange(capacity + 1))
    half = capacity // 2
    k = np.arange(1, half + 1)
    between = count[capacity - k] - count[half]
    their_volume = volume[capacity - k] - volume[half]
    small = volume[half] - volume[k - 1]
    more = np.maximum(0, -(-(small - (between * capacity - their_volume)) // capacity))
    bound = (count[capacity] - count[half]) + int(more.max(initial=0))
    return max(int(bound), -(-int(volume[capacity]) // capacity))
