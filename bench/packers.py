"""Packers as a study of training compares them: ours, and TRL's as its trainer calls it.

Each gives the packs of an epoch as document numbers; ``steps_of`` makes optimizer steps of them in one way for all.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from numpy.typing import NDArray
from trl.data_utils import pack_dataset

from trainer_kernels import pack

Packer = Literal["rfc", "bfd", "bfd-grouped"]
Ids = NDArray[np.int32]
Packs = list[Ids]
"""Document ids of every pack."""


def ours(lengths: Ids, capacity: int, seed: int, epoch: int, *, algorithm: Literal["rfc", "bfd"]) -> Packs:
    """A pass over all documents, packed anew every epoch as our trainer does it."""
    plan = pack(lengths, capacity, algorithm=algorithm, seed=seed, epoch=epoch)
    return [plan.pack(number) for number in range(len(plan))]


def grouped(lengths: Ids, capacity: int, seed: int, epoch: int) -> Packs:
    """TRL's `pack_dataset` with its defaults, the same packs in every epoch.

    It gives tokens back and not document numbers, so the tokens of a document are its number.
    """
    disable_progress_bar()
    numbers = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(numbers))}))
    packed = pack_dataset(rows, capacity, map_kwargs={"load_from_cache_file": False, "keep_in_memory": True})
    return [
        np.array(ids, np.int32)[np.cumsum([0, *parts[:-1]])]
        for ids, parts in zip(packed["input_ids"], packed["seq_lengths"], strict=True)
    ]


PACKERS: dict[Packer, Callable[[Ids, int, int, int], Packs]] = {
    "rfc": lambda *given: ours(*given, algorithm="rfc"),
    "bfd": lambda *given: ours(*given, algorithm="bfd"),
    "bfd-grouped": grouped,
}


def steps_of(
    packer: Packer, lengths: Ids, *, capacity: int, packs_per_step: int, epochs: int, seed: int
) -> list[Packs]:
    """The packs of every optimizer step: shuffled in each epoch, then dealt in equal stretches.

    The number of steps follows from the tokens. A packer that fills less has a pack more in some steps, and not more
    steps: it would otherwise be given more updates, or fewer tokens.
    """
    row: Packs = []
    for epoch in range(epochs):
        packs = PACKERS[packer](lengths, capacity, seed, epoch)
        row += [packs[number] for number in np.random.default_rng([2, seed, epoch]).permutation(len(packs))]
    tokens = epochs * int(lengths.sum(dtype=np.int64))
    count = max(1, -(-tokens // (capacity * packs_per_step)))
    bounds = [number * len(row) // count for number in range(count + 1)]
    return [row[first:stop] for first, stop in pairwise(bounds)]


def log_length_variance(lengths: Ids, steps: Sequence[Packs]) -> float:
    """Variance over steps of the mean natural logarithm of the lengths of a step's documents."""
    return float(np.var([np.log(lengths[np.concatenate(step)]).mean() for step in steps]))
