"""Which documents come when: the schedule of a run as a pure function of a few numbers.

``prepare`` describes the schedule that the ranks then follow, so both have to ask for the same one: the numbers are
taken out of the plan in one place.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.data.timing import sync_of
from trainer.errors import DataError
from trainer.plan import RunPlan
from trainer_kernels import CostModel, PackingError, PackPlan, Schedule, pack, schedule
from trainer_kernels.schedule import Sync

Algorithm = Literal["rfc", "ffd", "bfd"]


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
        capacity=packing.capacity,
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


def training_schedule(lengths: NDArray[np.int32], targets: NDArray[np.int32], options: ScheduleOptions) -> Schedule:
    """The packs of every optimizer step of a run, for all ranks.

    ``lengths``, ``targets``: int32 [n], tokens and target tokens of each document, as ``TokenArena`` has them.

    Raises:
        DataError: fewer packs than one step takes, a document longer than ``capacity``, a step without targets.
    """
    cost = CostModel(1.0, options.cost_ratio) if options.cost_ratio else None
    by_time = packs_by_time(lengths, options)

    def packs(epoch: int) -> PackPlan:
        return pack(
            lengths,
            options.capacity,
            algorithm=options.algorithm,
            seed=options.seed,
            epoch=epoch,
            max_docs=options.max_documents,
            cost=cost if by_time else None,
        )

    try:
        epochs = options.epochs
        if options.max_steps is not None:
            # One pass more than the first one's packs say: other passes may need a pack less for the same documents.
            per_step = options.world_size * options.accumulation
            epochs = ceil(options.max_steps * per_step / len(packs(0))) + 1
        return schedule(
            packs,
            targets,
            epochs=epochs,
            world_size=options.world_size,
            accumulation=options.accumulation,
            max_steps=options.max_steps,
            sync=options.sync,
            costs=cost.weight(lengths) if cost is not None and not by_time else None,
        )
    except PackingError as fault:
        raise DataError(
            fault.what, where="optim.batch_packs, packing", got=fault.got, allowed=fault.allowed, do=fault.do
        ) from fault


def packs_by_time(lengths: NDArray[np.int32], options: ScheduleOptions) -> bool:
    """Whether packs are filled by time: a ratio is given, and the longest document takes no longer than a pack has."""
    if not options.cost_ratio:
        return False
    longest = lengths[[lengths.argmax()]]
    return int(CostModel(1.0, options.cost_ratio).weight(longest)[0]) <= options.capacity
