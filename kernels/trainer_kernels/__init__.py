"""Packing and collation: which documents share a micro-batch, and the arrays made of them.

    ArenaWriter -> TokenArena -> pack -> schedule -> collate -> the model

A leaf: numpy and numba only, no torch, nothing of the trainer. ``reference`` holds the slow, obvious version of
everything; where the two differ, the reference is right.
"""

from trainer_kernels.ahead import Ahead
from trainer_kernels.arena import ARENA_FORMAT, TokenArena
from trainer_kernels.collate import IGNORE, Buffers, CompactBatch, PackedBatch, collate
from trainer_kernels.errors import ArenaError, PackingError
from trainer_kernels.packing import PLAN_FORMAT, CostModel, Packer, PackPlan, joined, pack
from trainer_kernels.schedule import PackRow, Schedule, schedule, schedule_of
from trainer_kernels.writer import ArenaWriter

__all__ = [
    "ARENA_FORMAT",
    "IGNORE",
    "PLAN_FORMAT",
    "Ahead",
    "ArenaError",
    "ArenaWriter",
    "Buffers",
    "CompactBatch",
    "CostModel",
    "PackPlan",
    "PackRow",
    "PackedBatch",
    "Packer",
    "PackingError",
    "Schedule",
    "TokenArena",
    "collate",
    "joined",
    "pack",
    "schedule",
    "schedule_of",
]
