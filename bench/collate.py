"""Collation: ours in every layout, a plain copy of as many bytes, transformers' DataCollatorWithFlattening and TRL's.

    python bench/collate.py [--capacity 65536] [--rounds 8] [--documents 20000]

All are timed in turn on other packs each time, in CPU time of the thread, so that a busy machine slows all alike;
medians and ratios are printed. Ours reads the memory-mapped arena in random order, the peers read rows of a `datasets`
table as their loaders do, TRL the finished packs of its offline packing. The first batch is compared: the peers' must
hold the same tokens, positions and targets, which they leave to the model to shift.

`cold` reads tokens that were not read lately, as training does, out of the page cache into buffers that are used again;
`warm` the same pack twice in a row. `first` is the first pass over an arena that was just opened: the pages are in
memory, but the process does not know where; a run sees it once, in its first epoch.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from synthetic import chat

from trainer_kernels import Ahead, ArenaWriter, Buffers, CompactBatch, PackedBatch, TokenArena, collate, pack

Layout = Literal["int64", "int32", "compact"]
BYTES: dict[Layout, int] = {"int64": 24, "int32": 12, "compact": 4}
Documents = NDArray[np.int32]
VOCABULARY = 50_000


@dataclass(frozen=True)
class Peers:
    """Each makes a batch of a pack, by its number, as a dictionary of tensors."""

    flattening: Callable[[int], dict[str, Any]]
    trl: Callable[[int], dict[str, Any]]


def make_arena(folder: Path, documents: int) -> TokenArena:
    """Random tokens, six in ten of them learnt."""
    random = np.random.default_rng(0)
    with ArenaWriter(folder) as writer:
        for length in chat(documents, 8192, 0):
            writer.add(random.integers(1, VOCABULARY, length), random.random(length) < 0.6)
        return writer.close()


def peers(arena: TokenArena, packs: list[Documents]) -> Peers:
    """The same documents, and the same packs, in the tables and collators of others."""
    import pyarrow as pa
    from datasets import Dataset
    from transformers import DataCollatorWithFlattening
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    ids = np.concatenate([arena.document(i)[0] for i in range(arena.num_documents)])
    target = np.concatenate([arena.document(i)[1] for i in range(arena.num_documents)])
    labels = np.where(target, ids, -100)
    starts = np.concatenate([[0], np.cumsum(arena.lengths)])

    def table(offsets: NDArray[np.int64], chosen: NDArray[np.int64], lengths: list[list[int]] | None) -> Dataset:
        columns: dict[str, Any] = {
            name: pa.ListArray.from_arrays(
                pa.array(offsets.astype(np.int32)), pa.array(values[chosen].astype(np.int64))
            )
            for name, values in (("input_ids", ids), ("labels", labels))
        }
        return Dataset(pa.table(columns if lengths is None else columns | {"seq_lengths": pa.array(lengths)}))

    rows = table(starts, np.arange(len(ids)), None)
    begins = starts.tolist()
    chosen = [
        np.concatenate([np.arange(begins[d], begins[d + 1]) for d in pack]) for pack in map(np.ndarray.tolist, packs)
    ]
    ends = np.concatenate([[0], np.cumsum([len(places) for places in chosen])])
    packed = table(ends, np.concatenate(chosen), [arena.lengths[documents].tolist() for documents in packs])
    flattening = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    trl = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return Peers(
        flattening=lambda number: flattening(rows.__getitems__(packs[number].tolist())),
        trl=lambda number: dict(trl(packed.__getitems__([number]))),
    )


def check_same(ours: PackedBatch, flattened: dict[str, Any], trl: dict[str, Any]) -> None:
    """Stop if the batches of a pack differ in a token, a position, a target or a boundary."""
    for name, theirs in (("DataCollatorWithFlattening", flattened), ("TRL", trl)):
        following = np.append(theirs["labels"][0].numpy()[1:], -100)
        following[ours.cu_seqlens[1:] - 1] = -100
        assert np.array_equal(theirs["input_ids"][0].numpy(), ours.input_ids), name
        assert np.array_equal(theirs["position_ids"][0].numpy(), ours.position_ids), name
        assert np.array_equal(following, ours.labels), name
    assert np.array_equal(flattened["cu_seq_lens_q"].numpy(), ours.cu_seqlens)
    assert flattened["max_length_q"] == ours.max_seqlen


def seconds(work: Callable[[Any], object], given: object) -> float:
    """CPU time of this thread for ``work(given)``."""
    begin = time.thread_time_ns()
    work(given)
    return (time.thread_time_ns() - begin) / 1e9


def time_ours(arena: TokenArena, packs: list[Documents], capacity: int, rounds: int) -> dict[str, float]:
    """Print the table of our layouts beside copies; returns the median seconds of each, cold."""
    head = "".join(f"{name:>10}" for name in ("copy", "cold", "(least)", "warm", "first"))
    print(f"{'':10}{head}   ns/token;{'cold/copy':>10}{'warm/copy':>10}")
    cold: dict[str, float] = {}
    for layout in get_args(Layout):
        size = BYTES[layout] * capacity
        source, target = np.ones(max(16, 200_000_000 // size) * size, np.uint8), np.zeros(size, np.uint8)
        out = Buffers.of(layout, capacity, max(map(len, packs)))

        opened = TokenArena.open(arena.path)

        def make(
            documents: Documents, arena: TokenArena = arena, layout: Layout = layout, out: Buffers = out
        ) -> PackedBatch | CompactBatch:
            return collate(arena, documents, pad_to=capacity, layout=layout, out=out)

        for documents in packs:
            make(documents)
        taken: list[tuple[float, float, float]] = []  # of copy, cold and warm
        for number in range(rounds * len(packs)):
            documents, place = packs[number % len(packs)], number * size % len(source)
            copy = seconds(partial(np.copyto, target), source[place : place + size])
            times = copy, seconds(make, documents), seconds(make, documents)
            if all(times):  # the clock of a thread has been seen to stand still on a busy virtual machine
                taken.append(times)
        copy, first, again = (median(times) for times in zip(*taken, strict=True))
        least = min(time for _, time, _ in taken)
        unknown = median(seconds(partial(make, arena=opened), documents) for documents in packs)
        columns = "".join(f"{value / capacity * 1e9:10.3f}" for value in (copy, first, least, again, unknown))
        ratios = [median(times[which] / times[0] for times in taken) for which in (1, 2)]
        print(f"{layout:10}{columns}{'':12}{ratios[0]:10.2f}{ratios[1]:10.2f}")
        cold[layout] = first
    return cold


def time_peers(theirs: Peers, packs: list[Documents], capacity: int, rounds: int, ours: float) -> None:
    """Print the times of the peers beside our int64 batch, which is the same."""
    works: tuple[tuple[str, Callable[[int], object]], ...] = (
        ("DataCollatorWithFlattening", theirs.flattening),
        ("TRL, offline packs", theirs.trl),
    )
    print(f"\n{'':30}{'ns/token':>10}{'ms a batch':>12}{'ours is faster by':>20}")
    for name, work in works:
        work(0)
        taken = median(seconds(work, number) for number in range(min(rounds, len(packs))))
        print(f"{name:30}{taken / capacity * 1e9:10.1f}{taken * 1e3:12.2f}{taken / ours:19.0f}x")
    print(f"{'ours, int64':30}{ours / capacity * 1e9:10.1f}{ours * 1e3:12.2f}{1:19}x")


def time_ahead(arena: TokenArena, packs: list[Documents], capacity: int) -> None:
    """Print how long the thread that trains waits for a batch that was made ahead, with work between two of them."""

    def make(documents: Documents, out: Buffers) -> PackedBatch:
        return collate(arena, documents, pad_to=capacity, out=out)

    work, product = np.ones((512, 512), np.float32), np.ones((512, 512), np.float32)
    waits: list[float] = []
    with Ahead(packs, make, lambda: Buffers.of("int64", capacity, max(map(len, packs)))) as ring:
        while True:
            begin = time.thread_time_ns()
            if next(ring, None) is None:
                break
            waits.append((time.thread_time_ns() - begin) / 1e9)
            for _ in range(4):
                np.matmul(work, work, out=product)
    print(f"\nmade ahead, int64: {median(waits) * 1e6:.1f} us of the training thread for a batch")


def main() -> None:
    """Run everything."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--capacity", type=int, default=65536)
    arguments.add_argument("--rounds", type=int, default=8)
    arguments.add_argument("--documents", type=int, default=20_000)
    given = arguments.parse_args()
    print(f"{platform.processor() or platform.machine()}, CPU time; {given.capacity} tokens a batch, medians\n")
    with tempfile.TemporaryDirectory() as folder:
        arena = make_arena(Path(folder) / "arena", given.documents)
        plan = pack(arena.lengths, given.capacity)
        packs = [plan.pack(number) for number in range(len(plan) - 1)]
        cold = time_ours(arena, packs, given.capacity, given.rounds)
        theirs = peers(arena, packs)
        check_same(collate(arena, packs[0]), theirs.flattening(0), theirs.trl(0))
        print("\nfirst batch: the same tokens, positions, targets and boundaries")
        time_peers(theirs, packs, given.capacity, given.rounds, cold["int64"])
        time_ahead(arena, packs, given.capacity)


if __name__ == "__main__":
    main()
