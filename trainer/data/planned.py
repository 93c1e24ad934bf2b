"""What a run will look like: packs, steps, what ranks lose by waiting; known before anything is computed."""

from dataclasses import dataclass

from trainer.data.batches import Algorithm, epoch_packs, fits_by_time, training_schedule
from trainer.data.timing import waiting_share
from trainer_kernels import CostModel, TokenArena
from trainer_kernels.schedule import Sync


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSchedule:
    """``launch/schedule.json``: packs of the first epoch, the share of them that is filled, and what a step is.

    ``by_time``: packs are filled by time and not by tokens. ``waiting``: share of the time that ranks wait for the
    slowest one; None with one rank, and for a model whose shape says nothing about it.
    """

    packs: int
    fill: float
    steps: int
    steps_per_epoch: float
    tokens_per_step: float
    waiting: float | None
    by_time: bool


def planned_schedule(
    arena: TokenArena,
    *,
    capacity: int,
    algorithm: Algorithm,
    max_documents: int | None,
    seed: int,
    epochs: float,
    max_steps: int | None,
    world_size: int,
    accumulation: int,
    cost_ratio: float,
    model_ratio: float | None,
    sync: Sync,
) -> PlannedSchedule:
    """Lay out the run as the ranks will; the arguments are those of ``training_schedule``.

    ``model_ratio``: what the time of packs is estimated by where ``cost_ratio`` is 0 (None: it is not).

    Raises:
        DataError: as ``training_schedule``.
    """
    schedule = training_schedule(
        arena.lengths,
        arena.targets,
        capacity=capacity,
        algorithm=algorithm,
        max_documents=max_documents,
        seed=seed,
        epochs=epochs,
        max_steps=max_steps,
        world_size=world_size,
        accumulation=accumulation,
        cost_ratio=cost_ratio,
        sync=sync,
    )
    first = epoch_packs(
        arena.lengths,
        capacity=capacity,
        algorithm=algorithm,
        max_documents=max_documents,
        seed=seed,
        cost_ratio=cost_ratio,
    )
    per_step = world_size * accumulation
    ratio = cost_ratio or model_ratio
    waiting = None
    if world_size > 1 and ratio is not None:
        waiting = waiting_share(schedule, CostModel(1.0, ratio).weight(arena.lengths))
    return PlannedSchedule(
        packs=len(first),
        fill=first.fill,
        steps=schedule.num_steps,
        steps_per_epoch=len(first) / per_step,
        tokens_per_step=arena.num_tokens / len(first) * per_step,
        waiting=waiting,
        by_time=bool(cost_ratio) and fits_by_time(arena.lengths, capacity, cost_ratio),
    )
