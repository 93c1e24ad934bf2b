"""How long a run waits for its first batch, from the beginning and from the middle, with ten million documents.

    python bench/start.py [--documents 10000000] [--epochs 3] [--capacity 8192] [--rounds 5]

The arena is there, with chat lengths (median 350, up to 8192); its documents are views of one short run of tokens, so
that it fits on a small disk: what is measured is planning, not reading. Every round starts anew, as a process of a run
does: opens the arena, reads what `prepare` recorded of the packs, makes the schedule, and asks the ring for a batch.
Seeking starts with the schedule there and asks for the batches of a step in the middle of another epoch. CPU and wall
time, medians.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import msgspec
import numpy as np
import torch
from synthetic import chat

from trainer.data.batches import TrainingBatches
from trainer.data.scheduling import ScheduleOptions, read_row, row_key, save_row, training_schedule
from trainer.train.state import TrainState
from trainer_kernels import ArenaWriter, Schedule, TokenArena

CPU = torch.device("cpu")
VIEWS = 100_000
LONGEST = 8192


def make_arena(folder: Path, documents: int) -> TokenArena:
    """``documents`` views of 64 k random tokens."""
    random = np.random.default_rng(0)
    lengths = chat(documents, LONGEST, 0)
    with ArenaWriter(folder) as writer:
        for first in range(0, documents, VIEWS):
            some = lengths[first : first + VIEWS]
            starts = random.integers(0, 8 * LONGEST - some + 1)
            views = [(start, length, 0) for start, length in zip(starts.tolist(), some.tolist(), strict=True)]
            writer.add(random.integers(1, 50_000, 8 * LONGEST), np.ones(8 * LONGEST, np.bool_), views)
        return writer.close()


def timed(work: Callable[[], object], times: list[tuple[float, float]]) -> None:
    """Add wall and CPU seconds of ``work``."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    times.append((time.perf_counter() - wall, time.process_time() - cpu))


def first_batch(source: TrainingBatches, start: int) -> None:
    """The first batch of step ``start``, through the ring."""
    planned = next(source.steps(start))
    with source.ahead(start) as load:
        load(planned.documents[0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--capacity", type=int, default=LONGEST)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    options = ScheduleOptions(capacity=given.capacity, epochs=given.epochs, accumulation=8)
    with tempfile.TemporaryDirectory() as scratch:
        folder, record = Path(scratch) / "arena", Path(scratch) / "schedule.npz"
        sha256 = make_arena(folder, given.documents).sha256
        key = row_key(sha256, options)
        found: dict[str, list[tuple[float, float]]] = {}

        def open_arena() -> TokenArena:
            return TokenArena.open(folder, expect_sha256=sha256)

        def plan() -> Schedule:
            arena = open_arena()
            made = training_schedule(arena.lengths, arena.targets, options)
            save_row(record, made.row, key=key)
            return made

        def start(step: int = 0) -> None:
            arena = open_arena()
            made = training_schedule(arena.lengths, arena.targets, options, read_row(record, key=key))
            first_batch(batches(arena, made), step)

        def batches(arena: TokenArena, made: Schedule) -> TrainingBatches:
            return TrainingBatches(arena, made, capacity=given.capacity, rank=0, device=CPU, pad_token_id=0)

        middle = plan().num_steps // 2
        arena = open_arena()
        for _ in range(given.rounds):
            timed(open_arena, found.setdefault("open the arena, its hashes checked", []))
            timed(plan, found.setdefault(f"prepare: pack {given.epochs:g} epochs, record them", []))
            timed(start, found.setdefault("first batch of a run, arena and record there", []))
            timed(lambda: start(middle), found.setdefault("the same in the middle of the run", []))
            made = training_schedule(arena.lengths, arena.targets, options, read_row(record, key=key))
            source = batches(arena, made)
            timed(partial(first_batch, source, middle), found.setdefault("seek to the middle, another epoch", []))
        size = record.stat().st_size
    print(f"{given.documents:,} documents, {given.epochs:g} epochs, capacity {given.capacity}; {given.rounds} rounds")
    print(f"{'':48}{'wall ms':>9}{'CPU ms':>9}{'(least)':>9}")
    for name, times in found.items():
        wall, cpu = (median(column) * 1e3 for column in zip(*times, strict=True))
        print(f"{name:48}{wall:9.1f}{cpu:9.1f}{min(cpu for _, cpu in times) * 1e3:9.1f}")
    state = len(msgspec.json.encode(TrainState()))
    print(
        f"record of prepare: {size / 1e6:.1f} MB; state of the data in a checkpoint: the step; all state {state} bytes"
    )


if __name__ == "__main__":
    main()
