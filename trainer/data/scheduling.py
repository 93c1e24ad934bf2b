"""Which documents come when: the schedule of a run as a pure function of a few numbers.

``prepare`` describes the schedule that the ranks then follow, so both have to ask for the same one: the numbers are
taken out of the plan in one place.

How many steps there are, and by how many targets each is divided, is known only once every epoch has been packed: half
a second for ten million documents, each. ``prepare`` does that once and records it (``save_row``); a rank then packs
just the block of a million documents that it is in.
"""

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from trainer.data.timing import sync_of
from trainer.errors import DataError
from trainer.paths import write_atomic
from trainer.plan import RunPlan
from trainer_kernels import (
    PLAN_FORMAT,
    CostModel,
    Packer,
    PackingError,
    PackPlan,
    PackRow,
    Schedule,
    schedule,
    schedule_of,
)
from trainer_kernels.schedule import Sync

Algorithm = Literal["rfc", "ffd", "bfd"]
ROW_FORMAT = 2
"""Raised whenever a recorded row would be read differently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleOptions:
    """All that a schedule depends on, besides the documents.

    ``capacity``: tokens per pack. ``algorithm``: how documents are packed; every epoch packs them anew.
    ``max_documents``: most documents in a pack. ``seed``: of the order of documents. ``epochs``: passes over the
    documents. ``max_steps``: train exactly so many optimizer steps instead, however many passes that takes.
    ``world_size``: ranks. ``accumulation``: packs per rank and step; the global batch is ``world_size * accumulation``
    packs. ``cost_ratio``: above 0, packs are filled by time (``timing.py``); where a document takes more time than a
    pack has, they are filled by tokens, and the packs of a step are dealt to the ranks by time. ``sync``: whether
    ranks wait for each other in every micro-batch ("micro") or once per step ("step").
    """

    capacity: int
    algorithm: Algorithm = "rfc"
    max_documents: int | None = None
    seed: int = 0
    epochs: float = 1.0
    max_steps: int | None = None
    world_size: int = 1
    accumulation: int = 1
    cost_ratio: float = 0.0
    sync: Sync = "step"


def schedule_options(plan: RunPlan, *, cost_ratio: float) -> ScheduleOptions:
    """The options of a run; ``cost_ratio`` is what ``prepare`` decided (``Prepared.cost_ratio``)."""
    packing, optim = plan.config.packing, plan.config.optim
    return ScheduleOptions(
        capacity=packing.tokens,
        algorithm=packing.algorithm,
        max_documents=packing.max_documents,
        seed=plan.config.run.seed,
        epochs=optim.epochs,
        max_steps=optim.max_steps,
        world_size=plan.world_size,
        accumulation=plan.accumulation,
        cost_ratio=cost_ratio,
        sync=sync_of(plan.strategy),
    )


def training_schedule(
    lengths: NDArray[np.int32], targets: NDArray[np.int32], options: ScheduleOptions, recorded: PackRow | None = None
) -> Schedule:
    """The packs of every optimizer step of a run, for all ranks.

    ``lengths``, ``targets``: int32 [n], tokens and target tokens of each document, as ``TokenArena`` has them.
    ``recorded``: the row of just this schedule, from an earlier call; with it nothing is packed before it is asked for.

    Raises:
        DataError: fewer packs than one step takes, a document longer than ``capacity``, a step without targets.
    """
    cost = CostModel(1.0, options.cost_ratio) if options.cost_ratio else None
    by_time = packs_by_time(lengths, options)

    ranks = {"world_size": options.world_size, "accumulation": options.accumulation}
    try:
        packer = Packer(
            lengths,
            options.capacity,
            algorithm=options.algorithm,
            seed=options.seed,
            max_docs=options.max_documents,
            cost=cost if by_time else None,
        )
        packs = parts_of(packer)
        if recorded is not None:
            return schedule_of(packs, recorded, **ranks, sync=options.sync)
        return schedule(
            packs,
            targets,
            epochs=_most_epochs(options, packer),
            max_steps=options.max_steps,
            **ranks,
            sync=options.sync,
            costs=cost.weight(lengths) if cost is not None and not by_time else None,
            blocks=packer.blocks,
        )
    except PackingError as fault:
        raise DataError(
            fault.what, where="optim.batch_packs, packing", got=fault.got, allowed=fault.allowed, do=fault.do
        ) from fault


def parts_of(packer: Packer) -> Callable[[int], PackPlan]:
    """The packs of part ``epoch * blocks + block``, as a schedule asks for them."""
    return lambda part: packer.block(*divmod(part, packer.blocks))


def _most_epochs(options: ScheduleOptions, packer: Packer) -> float:
    """As configured, or enough for ``max_steps``."""
    if options.max_steps is None:
        return options.epochs
    # One pass more than the first one's packs say: other passes may need a pack less for the same documents.
    return ceil(options.max_steps * options.world_size * options.accumulation / len(packer.epoch(0))) + 1


def packs_by_time(lengths: NDArray[np.int32], options: ScheduleOptions) -> bool:
    """Whether packs are filled by time: a ratio is given, and the longest document takes no longer than a pack has."""
    if not options.cost_ratio:
        return False
    longest = lengths[[lengths.argmax()]]
    return int(CostModel(1.0, options.cost_ratio).weight(longest)[0]) <= options.capacity


# ---- what prepare records


def row_key(arena_sha256: str, options: ScheduleOptions) -> str:
    """All that a row depends on, as text. Not the number of ranks: only the packs of a step over all of them."""
    of_ranks = {"world_size", "accumulation", "sync"}
    numbers = {name: value for name, value in msgspec.to_builtins(options).items() if name not in of_ranks}
    numbers |= {"packs_per_step": options.world_size * options.accumulation, "arena": arena_sha256}
    return msgspec.json.encode(numbers | {"format": ROW_FORMAT, "plan_format": PLAN_FORMAT}, order="sorted").decode()


def save_row(path: Path, row: PackRow, *, key: str) -> None:
    """Write ``row`` to a file of 8 bytes a pack, or 16."""
    costs = np.zeros(0, np.int64) if row.costs is None else row.costs
    numbers = np.array([row.most_documents, row.costs is not None, row.blocks], np.int64)
    stream = io.BytesIO()
    np.savez(stream, key=np.array(key), first=row.first, targets=row.targets, costs=costs, numbers=numbers)
    write_atomic(path, stream.getvalue())


def read_row(path: Path, *, key: str) -> PackRow | None:
    """The row that was saved there with this ``key``; None where there is none, another one, or a damaged one."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            most_documents, has_costs, blocks = file["numbers"].tolist()
            costs = file["costs"] if has_costs else None
            return PackRow(file["first"], file["targets"], costs, most_documents, blocks)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
