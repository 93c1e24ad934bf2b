"""The way of a batch to a GPU: compact and expanded there, against three int64 tensors, and what a step waits for data.

    python bench/h2d.py [--capacity 65536] [--rounds 200] [--documents 20000]

The first table is time on the device, by events, with the queue kept full, in turn, medians: the copy of ids with the
loss bit and of the boundaries, then the kernel; against a copy of ids, labels and positions out of pinned and out of
ordinary memory. Both must give the batch of the CPU, to the bit. The second is time of the host: how long the thread
that trains is kept by asking for a micro-batch, while the device computes; batches made ahead, made when asked for, and
made as three fresh pinned int64 tensors.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from collate import make_arena

from trainer.data.batches import Documents, Load, TrainingBatches
from trainer.data.scheduling import ScheduleOptions, training_schedule
from trainer.data.transfer import BatchShape, collate_fixed
from trainer_kernels import Buffers, PackedBatch, Schedule, TokenArena, collate

GOAL_US = 30
AHEAD_OF_EVENTS = 2_000_000
"""Cycles that the device is kept busy for, so that what is measured is queued before it begins."""
COMPUTE = 20_000_000
"""Cycles of a micro-batch's computation, about 10 ms."""
Rows = torch.Tensor
"""int64 [3, T]: ids, labels, positions."""


class Ways:
    """One batch and the ways to get it to the device. Each returns int64 [3, T] there."""

    def __init__(self, arena: TokenArena, documents: Documents, shape: BatchShape) -> None:
        from trainer_kernels.expand import expand

        self._expand = expand
        self._shape = shape
        self._sent = torch.empty(shape.boundaries + shape.positions, dtype=torch.int32, pin_memory=True)
        room = Buffers(self._sent[None, shape.boundaries :].numpy(), self._sent[: shape.boundaries].numpy())
        collate_fixed(arena, documents, shape=shape, pad_token_id=0, out=room)
        self.wanted: PackedBatch = collate(arena, documents, pad_to=shape.positions)
        rows = [self.wanted.input_ids, self.wanted.labels, self.wanted.position_ids]
        self._pageable = torch.from_numpy(np.stack(rows))
        self._pinned = self._pageable.pin_memory()
        self._there = torch.empty(self._sent.numel(), dtype=torch.int32, device="cuda")
        self._rows = torch.empty_like(self._pageable, device="cuda")

    def copy_compact(self) -> Rows:
        """The copy alone."""
        self._there.copy_(self._sent, non_blocking=True)
        return self._rows

    def expand(self) -> Rows:
        """The kernel alone."""
        size = self._shape.boundaries
        ids, labels, positions = self._rows
        self._expand(self._there[size:], self._there[:size], input_ids=ids, labels=labels, position_ids=positions)
        return self._rows

    def compact(self) -> Rows:
        """Both: what training does."""
        self.copy_compact()
        return self.expand()

    def pinned(self) -> Rows:
        """24 bytes a token out of pinned memory."""
        return self._rows.copy_(self._pinned, non_blocking=True)

    def pageable(self) -> Rows:
        """24 bytes a token out of ordinary memory."""
        return self._rows.copy_(self._pageable)


def device_us(work: Callable[[], Rows]) -> float:
    """Microseconds of the device for ``work``."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD_OF_EVENTS)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000


def time_ways(ways: Ways, rounds: int) -> None:
    """Check that the ways lead to the same batch, and print how long they take."""
    wanted = [ways.wanted.input_ids.tolist(), ways.wanted.labels.tolist(), ways.wanted.position_ids.tolist()]
    for work in (ways.compact, ways.pinned, ways.pageable):
        ways._rows.fill_(77)
        assert work().tolist() == wanted, f"{work.__name__} is not exact"
    print("the batch on the device is that of the CPU, to the bit\n")
    works = {work.__name__: work for work in (ways.compact, ways.copy_compact, ways.expand, ways.pinned, ways.pageable)}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(device_us(work))
    ours = median(taken["compact"])
    print(f"{'':44}{'us':>8}{'(least)':>9}{'times ours':>12}")
    words = {
        "compact": f"copy and expand (goal: {GOAL_US} us or less)",
        "copy_compact": "  the copy",
        "expand": "  the kernel",
        "pinned": "3 x int64, pinned",
        "pageable": "3 x int64, ordinary memory (the host waits)",
    }
    for name, values in taken.items():
        print(f"{words[name]:44}{median(values):8.1f}{min(values):9.1f}{median(values) / ours:12.2f}")


def time_waiting(arena: TokenArena, plan: Schedule, capacity: int) -> None:
    """Print how long the training thread is kept by asking for a micro-batch."""
    source = TrainingBatches(arena, plan, capacity=capacity, rank=0, device=torch.device("cuda", 0), pad_token_id=0)

    def three_tensors(documents: Documents) -> None:
        packed = collate(arena, documents)
        for row in (packed.input_ids, packed.labels, packed.position_ids, packed.cu_seqlens):
            torch.from_numpy(row).pin_memory().to("cuda", non_blocking=True)

    with source.ahead(0) as load:
        ahead = waits(source, load)
    rows = {
        "made ahead": ahead,
        "made when asked for": waits(source, source.load),
        "3 x int64, pinned anew": waits(source, three_tensors),
    }
    print(f"\n{'the training thread, for a micro-batch':44}{'us':>8}{'(most)':>9}{'times ours':>12}")
    for name, values in rows.items():
        print(f"{name:44}{median(values):8.1f}{max(values):9.1f}{median(values) / median(ahead):12.2f}")
    step = median(ahead) * plan.accumulation / 1000
    print(f"a step of {plan.accumulation} micro-batches waits {step:.3f} ms for its data")


def waits(source: TrainingBatches, load: Load | Callable[[Documents], None]) -> list[float]:
    """Microseconds of each call of ``load``, but those of the first two steps, with computation between them."""
    found: list[float] = []
    for planned in source.steps(0):
        for documents in planned.documents:
            begin = time.perf_counter()
            load(documents)
            taken = (time.perf_counter() - begin) * 1e6
            if planned.index >= 2:
                found.append(taken)
            torch.cuda._sleep(COMPUTE)
        torch.cuda.synchronize()  # as the loop does when it reads the loss
    return found


def main() -> int:
    """Run everything; 1 without a GPU."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--capacity", type=int, default=65536, help="at least 8192, the longest document")
    arguments.add_argument("--rounds", type=int, default=200)
    arguments.add_argument("--documents", type=int, default=20_000)
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device here: nothing was measured", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        arena = make_arena(Path(folder) / "arena", given.documents)
        options = ScheduleOptions(capacity=given.capacity, accumulation=4)
        plan = training_schedule(arena.lengths, arena.targets, options)
        shape = BatchShape(positions=given.capacity, documents=plan.row.most_documents)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        print(f"{given.capacity} tokens a batch, {shape.boundaries} boundaries, {plan.num_steps} steps; medians")
        time_ways(Ways(arena, plan.documents(0)[0], shape), given.rounds)
        time_waiting(arena, plan, given.capacity)
    return 0


if __name__ == "__main__":
    sys.exit(main())
