"""The specification: every algorithm of this package in plain Python, as slow and as obvious as possible.

Nothing here is used in training. Tests require the fast versions to give the same numbers, document for document; where
they differ, this file is right. The constants (round keys, shares, formats) are shared with the fast versions: they
are part of the definition.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from math import ceil

import numpy as np

from trainer_kernels.arena import TokenArena
from trainer_kernels.collate import IGNORE, CompactBatch, PackedBatch
from trainer_kernels.order import DOCUMENTS, PACKS, domain_bits, mix, round_keys
from trainer_kernels.packing import BLOCK_DOCUMENTS, SMALLEST_POOL, STRETCHES, Algorithm
from trainer_kernels.planners import BIG_SHARE


def permutation(count: int, seed: int, epoch: int, purpose: int) -> list[int]:
    """The seeded order of ``[0, count)``: a Feistel network on the smallest domain, outsiders walked over."""
    high, low = domain_bits(count)
    keys = round_keys(seed, epoch, purpose)

    def encrypt(value: int) -> int:
        left, right = value >> low, value & ((1 << low) - 1)
        left ^= mix(right + keys[0]) & ((1 << high) - 1)
        right ^= mix(left + keys[1]) & ((1 << low) - 1)
        left ^= mix(right + keys[2]) & ((1 << high) - 1)
        right ^= mix(left + keys[3]) & ((1 << low) - 1)
        return (left << low) | right

    order: list[int] = []
    for place in range(count):
        value = encrypt(place)
        while value >= count:
            value = encrypt(value)
        order.append(value)
    return order


def weight(length: int, a: float, b: float) -> int:
    """Weight of one document under ``CostModel(a, b)``."""
    return length + ceil(b / a * float(length * length))


def pack(
    weights: Sequence[int],
    capacity: int,
    *,
    algorithm: Algorithm = "rfc",
    seed: int = 0,
    epoch: int = 0,
    pool: int | None = None,
    max_docs: int | None = None,
    block: int = BLOCK_DOCUMENTS,
    stretches: int = STRETCHES,
) -> list[list[int]]:
    """The packs of ``trainer_kernels.pack``, each a list of document ids in order."""
    most = len(weights) if max_docs is None else max_docs
    if algorithm == "rfc":
        order = permutation(len(weights), seed, epoch, DOCUMENTS)
        ahead = max(SMALLEST_POOL, 4 * capacity * len(weights) // sum(weights)) if pool is None else pool
        blocks = [order[first : first + block] for first in range(0, len(order), block)]
        return [pack for part in blocks for pack in random_fill_close(weights, part, capacity, ahead, most)]
    width = ceil(len(weights) / stretches)
    order = [
        document
        for stretch in permutation(ceil(len(weights) / width), seed, epoch, DOCUMENTS)
        for document in range(stretch * width, min(stretch * width + width, len(weights)))
    ]
    decreasing = first_fit_decreasing if algorithm == "ffd" else best_fit_decreasing
    packs = decreasing(weights, order, capacity, most)
    return [packs[place] for place in permutation(len(packs), seed, epoch, PACKS)]


def random_fill_close(
    weights: Sequence[int], order: Sequence[int], capacity: int, pool: int, max_docs: int
) -> list[list[int]]:
    """Fill with the next documents of the stream; close with the heaviest of the pool that fit, the newest of equals.

    The pool is at all times the next ``pool`` documents of the stream that are not in a pack. When the packs for all
    big documents (more than half a pack) would hold ``BIG_SHARE`` percent of the pool, a pack starts with the next
    big one.
    """
    rest = list(order)
    packs: list[list[int]] = []
    while rest:
        room = capacity
        packed: list[int] = []

        def take(document: int) -> int:
            rest.remove(document)
            packed.append(document)  # noqa: B023  (called in this turn of the loop alone)
            return weights[document]

        seen = rest[:pool]
        big = [document for document in seen if weights[document] > capacity // 2]
        volume = sum(weights[document] for document in seen)
        if big and 100 * len(big) * capacity >= BIG_SHARE * volume:
            room -= take(big[0])
        while rest and len(packed) < max_docs and weights[rest[0]] <= room:
            room -= take(rest[0])
        while len(packed) < max_docs:
            fitting = [document for document in rest[:pool] if weights[document] <= room]
            if not fitting:
                break
            heaviest = max(weights[document] for document in fitting)
            room -= take([document for document in fitting if weights[document] == heaviest][-1])
        packs.append(packed)
    return packs


def first_fit_decreasing(weights: Sequence[int], order: Sequence[int], capacity: int, max_docs: int) -> list[list[int]]:
    """The heaviest first, equals in ``order``: each goes to the first pack that takes it, else to a new one."""
    packs: list[list[int]] = []
    for document in sorted(order, key=lambda document: -weights[document]):
        for packed in packs:
            if len(packed) < max_docs and sum(weights[other] for other in packed) + weights[document] <= capacity:
                packed.append(document)
                break
        else:
            packs.append([document])
    return packs


def best_fit_decreasing(weights: Sequence[int], order: Sequence[int], capacity: int, max_docs: int) -> list[list[int]]:
    """The heaviest first: each goes to the pack with the least room that takes it, the last used one of equals.

    That decides which weights share a pack. Packs that can take no more (full, or ``max_docs``) come first, then those
    with less room; among equals the last used one first. Documents of one weight are dealt to them in ``order``.
    """
    filled: list[list[int]] = []  # weights, the last used pack last
    for heavy in sorted((weights[document] for document in order), reverse=True):
        takers = [held for held in filled if len(held) < max_docs and sum(held) + heavy <= capacity]
        fullest = max(map(sum, takers), default=0)
        held = [held for held in takers if sum(held) == fullest][-1] if takers else []
        filled = [other for other in filled if other is not held] + [[*held, heavy]]
    filled.reverse()
    filled.sort(key=lambda held: 0 if len(held) == max_docs else capacity - sum(held))
    waiting = {heavy: [document for document in order if weights[document] == heavy] for heavy in set(weights)}
    return [[waiting[heavy].pop(0) for heavy in held] for held in filled]


def steps(
    packs: Callable[[int], int], *, epochs: float, packs_per_step: int, max_steps: int | None = None
) -> list[list[tuple[int, int] | None]]:
    """``(epoch, pack)`` of every place of every optimizer step, without costs; ``packs(epoch)`` is their number."""
    row: list[tuple[int, int] | None] = []
    wanted = Fraction(epochs).limit_denominator(1_000_000)
    for epoch in range(ceil(wanted)):
        count = packs(epoch)
        row += [(epoch, pack) for pack in range(ceil(min(Fraction(1), wanted - epoch) * count))]
    while len(row) % packs_per_step:
        row.append(None)
    cut = [row[first : first + packs_per_step] for first in range(0, len(row), packs_per_step)]
    return cut[:max_steps]


def is_target(arena: TokenArena, document: int) -> list[bool]:
    """Which tokens of a document are learnt: never its first, none of the muted, none with bit 31."""
    start = int(arena.starts[document])
    muted = int(arena.muted[document])
    raw = [int(arena.tokens[start + t]) for t in range(int(arena.lengths[document]))]
    return [t >= 1 and t >= muted and token >= 0 for t, token in enumerate(raw)]


def collate(
    arena: TokenArena, documents: Sequence[int], *, pad_to: int | None = None, pad_id: int = 0, align: int = 1
) -> PackedBatch:
    """The int64 batch of ``trainer_kernels.collate``."""
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    boundaries = [0]

    def pad(count: int) -> None:
        ids.extend([pad_id] * count)
        labels.extend([IGNORE] * count)

    for document in documents:
        start, length = int(arena.starts[document]), int(arena.lengths[document])
        target = is_target(arena, document)
        ids += [int(token) & 0x7FFFFFFF for token in arena.tokens[start : start + length]]
        own = ids[len(ids) - length :]
        labels += [own[t + 1] if t + 1 < length and target[t + 1] else IGNORE for t in range(length)]
        pad(-length % align)
        positions += range(ceil(length / align) * align)
        boundaries.append(len(ids))
    padding = (max(len(ids), align) if pad_to is None else pad_to) - len(ids)
    if padding:
        pad(padding)
        positions += range(padding)
        boundaries.append(len(ids))
    return PackedBatch(
        input_ids=np.array(ids, np.int64),
        labels=np.array(labels, np.int64),
        position_ids=np.array(positions, np.int64),
        cu_seqlens=np.array(boundaries, np.int32),
        max_seqlen=max(end - begin for begin, end in pairwise(boundaries)),
        num_tokens=sum(int(arena.lengths[document]) for document in documents),
        num_targets=sum(label != IGNORE for label in labels),
        num_documents=len(documents),
    )


def expand(batch: CompactBatch) -> PackedBatch:
    """The int64 batch that a compact one stands for: what a device kernel has to reproduce."""
    size = len(batch.tokens)
    raw = [int(token) for token in batch.tokens]
    labels = [raw[t + 1] if t + 1 < size and raw[t + 1] >= 0 else IGNORE for t in range(size)]
    positions: list[int] = []
    for begin, end in pairwise(batch.cu_seqlens):
        positions += range(int(end) - int(begin))
    return PackedBatch(
        input_ids=np.array([token & 0x7FFFFFFF for token in raw], np.int64),
        labels=np.array(labels, np.int64),
        position_ids=np.array(positions, np.int64),
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        num_tokens=batch.num_tokens,
        num_targets=batch.num_targets,
        num_documents=batch.num_documents,
    )
