"""What a run will look like: packs, steps, what ranks lose by waiting; known before anything is computed."""

from dataclasses import dataclass

from trainer.data.timing import waiting_share
from trainer_kernels import CostModel, Schedule, TokenArena
from trainer_kernels.schedule import Sync


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSchedule:
    """``launch/schedule.json``: packs of the first epoch, the share of them that is filled, and what a step is.

    ``by_time``: packs are filled by time and not by tokens. ``waiting``: share of the time that ranks wait for the
    slowest one; None with one rank, and for a model whose shape says nothing about it. ``sync``: they wait in every
    micro-batch ("micro") or once per step ("step").
    """

    packs: int
    fill: float
    steps: int
    steps_per_epoch: float
    tokens_per_step: float
    waiting: float | None
    by_time: bool
    sync: Sync


def planned_schedule(schedule: Schedule, arena: TokenArena, *, ratio: float | None, by_time: bool) -> PlannedSchedule:
    """Describe the ``schedule`` of the documents in ``arena``; ``ratio`` is what the time of packs is estimated by.

    ``ratio`` in 1 / tokens (``timing.cost_ratio``); None: the time lost by waiting is unknown.
    """
    first = schedule.plan(0)
    waiting = None
    if schedule.world_size > 1 and ratio is not None:
        waiting = waiting_share(schedule, CostModel(1.0, ratio).weight(arena.lengths))
    return PlannedSchedule(
        packs=len(first),
        fill=first.fill,
        steps=schedule.num_steps,
        steps_per_epoch=len(first) / schedule.packs_per_step,
        tokens_per_step=arena.num_tokens / len(first) * schedule.packs_per_step,
        waiting=waiting,
        by_time=by_time,
        sync=schedule.sync,
    )
