"""Which packs each rank trains on in each optimizer step, and by how many targets that step's loss is divided.

The packs of all epochs are one long row; step s is its s-th stretch of ``world_size * accumulation`` packs. So the
global batches do not depend on how many ranks share them, an epoch's remainder opens the next one instead of being
dropped, any step can be found without going through those before it, and the number of targets of a step over all
ranks is a difference of two prefix sums: nobody has to count, let alone ask the other ranks.
"""

import heapq
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isfinite
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trainer_kernels.checks import whole, whole_numbers
from trainer_kernels.compiled import compiled
from trainer_kernels.errors import PackingError
from trainer_kernels.packing import PackPlan, joined

Sync = Literal["micro", "step"]
Position = tuple[int, int]
"""``(part, pack)``: part ``epoch * blocks + block`` of the run, and a pack of its plan."""

MOST = 1 << 40
"""Largest number of ranks, micro-batches or steps; only there to refuse nonsense."""

_NO_DOCUMENTS = np.empty(0, np.int32)
_NO_DOCUMENTS.flags.writeable = False


class _Latest:
    """``packs``, with the ``most`` latest plans kept. Threads that ask for the same plan wait for one that makes it.

    Nobody waits for a plan that is there, while another thread already makes the next one.
    """

    def __init__(self, packs: Callable[[int], PackPlan], most: int) -> None:
        self._packs = packs
        self._most = most
        self._kept: dict[int, PackPlan] = {}
        self._making = threading.Lock()

    def __call__(self, part: int) -> PackPlan:
        plan = self._kept.get(part)
        if plan is not None:
            return plan
        with self._making:
            plan = self._kept.get(part)
            if plan is None:
                plan = self._packs(part)
                self._kept = dict([*self._kept.items(), (part, plan)][-self._most :])
            return plan


@dataclass(frozen=True, slots=True, eq=False)
class PackRow:
    """The row of all packs of a run without their documents: enough to know every step, before anything is packed.

    ``first`` int64[epochs * blocks + 1]: the place in the row at which each part begins, and the end of the last one.
    ``targets`` int64[num_packs]: targets of each pack. ``costs`` int64[num_packs], or None: see ``schedule``.
    ``most_documents``: of any pack. ``blocks``: parts of an epoch. A row does not depend on how many ranks there are;
    it can be kept for later starts.
    """

    first: NDArray[np.int64]
    targets: NDArray[np.int64]
    costs: NDArray[np.int64] | None
    most_documents: int
    blocks: int = 1

    @property
    def epochs(self) -> int:
        """Passes over the documents, the last one begun counted whole."""
        return (len(self.first) - 1) // self.blocks

    def size(self, epoch: int) -> int:
        """Packs of a whole epoch."""
        return int(self.first[(epoch + 1) * self.blocks] - self.first[epoch * self.blocks])


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """All steps of a run; made by ``schedule`` or ``schedule_of``. Equal on every rank.

    ``num_steps`` optimizer steps over ``num_packs`` packs; ``num_empty`` empty packs fill up the last step.
    """

    num_steps: int
    num_packs: int
    world_size: int
    accumulation: int
    sync: Sync
    row: PackRow
    _packs: Callable[[int], PackPlan]
    _targets: NDArray[np.int64]  # [num_packs + 1] targets in all packs before a place

    @property
    def packs_per_step(self) -> int:
        """``world_size * accumulation``."""
        return self.world_size * self.accumulation

    @property
    def num_empty(self) -> int:
        """Empty packs in the last step."""
        return self.num_steps * self.packs_per_step - self.num_packs

    def num_targets(self, step: int) -> int:
        """Targets of ``step`` over all ranks and micro-batches, at least 1: what its summed loss is divided by."""
        first, stop = self._stretch(step)
        return int(self._targets[stop] - self._targets[first])

    def epoch_of(self, step: int) -> float:
        """Passes over the data that are done when ``step`` is done."""
        _, stop = self._stretch(step)
        epoch = self._position(stop - 1)[0] // self.row.blocks
        return epoch + (stop - int(self.row.first[epoch * self.row.blocks])) / self.row.size(epoch)

    def positions(self, step: int) -> list[Position | None]:
        """The packs of ``step``; rank r trains on entries r, r + world_size, ... in this order. None: an empty pack."""
        first, stop = self._stretch(step)
        places: list[Position | None] = [self._position(place) for place in range(first, stop)]
        places += [None] * (self.packs_per_step - len(places))
        if self.row.costs is None:
            return places
        costs = [*map(int, self.row.costs[first:stop]), *[0] * (self.packs_per_step - (stop - first))]
        spread = _sorted_by_cost(costs) if self.sync == "micro" else _even_sums(costs, self.world_size)
        return [places[entry] for entry in spread]

    def plan(self, epoch: int) -> PackPlan:
        """The packs of a pass over the documents; the latest are kept, so asking again costs next to nothing."""
        whole("epoch", epoch, 0, self.row.epochs - 1)
        blocks = self.row.blocks
        return joined([self._packs(part) for part in range(epoch * blocks, (epoch + 1) * blocks)])

    def documents(self, step: int) -> list[NDArray[np.int32]]:
        """Document ids of the packs of ``step`` in the order of ``positions``, empty for an empty pack."""
        return [self._documents(position) for position in self.positions(step)]

    def batches(self, rank: int, start: int = 0) -> Iterator[list[NDArray[np.int32]]]:
        """Per step from ``start`` on: ``accumulation`` arrays of document ids for ``rank``, empty for an empty pack."""
        whole("rank", rank, 0, self.world_size - 1)
        whole("start", start, 0, self.num_steps)  # a finished run has nothing left
        return self._batches(rank, start)

    def _batches(self, rank: int, start: int) -> Iterator[list[NDArray[np.int32]]]:
        for step in range(start, self.num_steps):
            yield [self._documents(position) for position in self.positions(step)[rank :: self.world_size]]

    def _documents(self, position: Position | None) -> NDArray[np.int32]:
        if position is None:
            return _NO_DOCUMENTS
        part, pack = position
        plan = self._packs(part)
        expected = int(self.row.first[part + 1] - self.row.first[part])
        if len(plan) != expected:
            raise PackingError(
                f"epoch {part // self.row.blocks} was packed in another way than before",
                got=f"{len(plan)} packs",
                allowed=f"{expected} packs, as when the schedule was made",
                do="let packs(part) depend on nothing but the number of the part",
            )
        return plan.pack(pack)

    def _stretch(self, step: int) -> tuple[int, int]:
        whole("step", step, 0, self.num_steps - 1)
        first = step * self.packs_per_step
        return first, min(first + self.packs_per_step, self.num_packs)

    def _position(self, place: int) -> Position:
        part = int(np.searchsorted(self.row.first, place, side="right")) - 1
        return part, place - int(self.row.first[part])


def schedule(
    packs: Callable[[int], PackPlan],
    targets: NDArray[np.integer],
    *,
    epochs: float,
    world_size: int,
    accumulation: int,
    sync: Sync = "micro",
    max_steps: int | None = None,
    costs: NDArray[np.integer] | None = None,
    blocks: int = 1,
) -> Schedule:
    """Lay out a run of ``epochs`` passes (fractions are allowed) over plans ``packs(part)``.

    An epoch has ``blocks`` parts (``Packer.blocks``); part p is block ``p % blocks`` of epoch ``p // blocks``, so with
    one block, parts are epochs. ``packs`` depends on that number alone; it is called once per part now and again while
    stepping (the latest plans are kept). ``targets`` int[n]: targets of each document. The run ends after the given
    share of the last epoch's packs, rounded up, or after ``max_steps`` optimizer steps, whichever comes first.

    ``costs`` int[n], the cost of each document (``CostModel.weight``), changes only who does which pack of a step: with
    ``sync="micro"`` (ranks wait for each other in every micro-batch, as in FSDP) packs of like cost run together;
    with ``sync="step"`` (they wait once per step) every rank gets about the same sum.

    Raises ``PackingError`` for options out of range, fewer packs than one step takes, or a step without targets.
    """
    whole("world_size", world_size, 1, MOST)
    whole("accumulation", accumulation, 1, MOST)
    if max_steps is not None:
        whole("max_steps", max_steps, 1, MOST)
    if not (isfinite(epochs) and epochs > 0):
        raise PackingError("epochs is out of range", got=epochs, allowed="above 0", do="give a number of passes")
    limit = None if max_steps is None else max_steps * world_size * accumulation
    targets = whole_numbers("targets", targets, 0)
    if costs is not None:
        costs = whole_numbers("costs", costs, 0)
    whole("blocks", blocks, 1, MOST)
    kept = _Latest(packs, _plans_kept(blocks))
    row = _lay_out(kept, targets, costs, epochs, limit, blocks)
    return schedule_of(kept, row, world_size=world_size, accumulation=accumulation, sync=sync)


def schedule_of(
    packs: Callable[[int], PackPlan], row: PackRow, *, world_size: int, accumulation: int, sync: Sync = "micro"
) -> Schedule:
    """The schedule that ``row`` belongs to, or that of the same packs at another world size.

    ``packs`` is not called before documents are asked for, and then only for their part. Otherwise as ``schedule``.

    Raises ``PackingError`` for options out of range, fewer packs than one step takes, or a step without targets.
    """
    whole("world_size", world_size, 1, MOST)
    whole("accumulation", accumulation, 1, MOST)
    if sync not in get_args(Sync):
        raise PackingError(
            "unknown kind of sync", got=repr(sync), allowed=", ".join(get_args(Sync)), do="choose when ranks wait"
        )
    per_step, count = world_size * accumulation, len(row.targets)
    if count < per_step:
        raise PackingError(
            "the whole run has fewer packs than one optimizer step takes",
            got=f"{count} packs in {row.epochs} epochs",
            allowed=f"at least {per_step} (world_size {world_size} x accumulation {accumulation})",
            do="take fewer packs per step, a smaller capacity, or more epochs",
        )
    prefix = np.concatenate([np.zeros(1, np.int64), np.cumsum(row.targets, dtype=np.int64)])
    _refuse_empty_steps(prefix, per_step)
    return Schedule(
        num_steps=ceil(count / per_step),
        num_packs=count,
        world_size=world_size,
        accumulation=accumulation,
        sync=sync,
        row=row,
        _packs=packs if isinstance(packs, _Latest) else _Latest(packs, _plans_kept(row.blocks)),
        _targets=prefix,
    )


def _plans_kept(blocks: int) -> int:
    """The part in use and one more, and a whole epoch for whoever looks at one."""
    return max(2, blocks)


def _lay_out(
    packs: Callable[[int], PackPlan],
    targets: NDArray[np.integer],
    costs: NDArray[np.integer] | None,
    epochs: float,
    limit: int | None,
    blocks: int,
) -> PackRow:
    """The row of packs, at most ``limit`` of them: packs every part once."""
    wanted = Fraction(epochs).limit_denominator(1_000_000)  # 0.1 means a tenth, not its nearest double
    if wanted == 0:
        wanted = Fraction(1, 1_000_000)
    first = [0]
    used = most_documents = 0
    target_parts: list[NDArray[np.int64]] = []
    cost_parts: list[NDArray[np.int64]] = []
    for epoch in range(ceil(wanted)):
        of_epoch: list[NDArray[np.int64]] = []
        costs_of_epoch: list[NDArray[np.int64]] = []
        seen = 0
        for part in range(epoch * blocks, (epoch + 1) * blocks):
            plan = packs(part)
            seen += len(plan.items)
            of_epoch.append(_per_pack(plan, targets, "targets"))
            if costs is not None:
                costs_of_epoch.append(_per_pack(plan, costs, "costs"))
            first.append(first[-1] + len(plan))
            most_documents = max(most_documents, plan.most_documents)
        _same_documents(seen, targets, "targets")
        _same_documents(seen, costs, "costs")
        share = ceil(min(Fraction(1), wanted - epoch) * sum(map(len, of_epoch)))
        take = share if limit is None else min(share, limit - used)
        target_parts.append(np.concatenate(of_epoch)[:take])
        if costs is not None:
            cost_parts.append(np.concatenate(costs_of_epoch)[:take])
        used += take
        if used == limit:
            break
    return PackRow(
        first=np.array(first, np.int64),
        targets=np.concatenate(target_parts),
        costs=np.concatenate(cost_parts) if cost_parts else None,
        most_documents=most_documents,
        blocks=blocks,
    )


def _same_documents(seen: int, values: NDArray[np.integer] | None, name: str) -> None:
    if values is not None and seen != len(values):
        raise PackingError(
            f"the plan and the {name} are of different documents",
            got=f"{seen} documents in the plan, {len(values)} {name}",
            allowed="one number per document of the plan",
            do="take lengths, targets and costs from the same arena",
        )


def _per_pack(plan: PackPlan, values: NDArray[np.integer], name: str) -> NDArray[np.int64]:
    """Sums of a per-document array over each pack, int64[len(plan)]."""
    if int(plan.items.max()) >= len(values):  # compiled code reads what the plan names without looking
        _same_documents(int(plan.items.max()) + 1, values, name)
    sums = np.empty(len(plan), np.int64)
    _sum_packs(values if values.dtype == np.int32 else values.astype(np.int64), plan.items, plan.offsets, sums)
    return sums


@compiled
def _sum_packs(
    values: NDArray[np.integer], items: NDArray[np.int32], offsets: NDArray[np.int64], sums: NDArray[np.int64]
) -> None:
    for pack in range(sums.size):
        total = np.int64(0)
        for index in range(offsets[pack], offsets[pack + 1]):
            total += np.int64(values[items[index]])
        sums[pack] = total


def _refuse_empty_steps(prefix: NDArray[np.int64], per_step: int) -> None:
    ends = np.append(prefix[per_step::per_step], prefix[-1:] if (len(prefix) - 1) % per_step else prefix[:0])
    per_step_targets = np.diff(ends, prepend=0)
    empty = np.flatnonzero(per_step_targets < 1)
    if len(empty):
        raise PackingError(
            "optimizer steps without a single target: their loss would be 0 / 0",
            got=f"{len(empty)} of {len(ends)} steps, the first: step {empty[0]}",
            allowed="at least 1 target in every step",
            do="leave documents without targets out, or take more packs per step",
        )


def _sorted_by_cost(costs: list[int]) -> list[int]:
    """Entries, the dearest first: neighbours cost about the same."""
    return sorted(range(len(costs)), key=lambda entry: (-costs[entry], entry))


def _even_sums(costs: list[int], world_size: int) -> list[int]:
    """Entries such that ranks (every ``world_size``-th) have equal counts and about equal sums.

    Longest processing time first (Graham 1969): the dearest left goes to the least loaded rank that has a place left.
    """
    accumulation = len(costs) // world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for entry in _sorted_by_cost(costs):
        load, rank = heapq.heappop(loads)
        shares[rank].append(entry)
        if len(shares[rank]) < accumulation:
            heapq.heappush(loads, (load + costs[entry], rank))
    return [shares[rank][micro] for micro in range(accumulation) for rank in range(world_size)]
