"""How long packs take: what ``packing.cost=time`` packs by, what ranks lose by waiting, and what a run measured of it.

A pack full of short documents and one that is a single long document have the same number of tokens, but attention
makes the second one slower, and every rank waits for the slowest. The model is ``a * n + b * n**2`` for a document of
n tokens (``trainer_kernels.CostModel``); only ``b / a`` matters for who goes with whom. It is fixed before the first
step: packs that depended on measured times could not be made again.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.memory import ModelShape
from trainer_kernels import Schedule
from trainer_kernels.schedule import Sync

LOOKED_AT = 64
"""Steps from which the time lost by waiting is estimated."""
WARM_UP = 3
"""First steps of a process that are not measured: compilation, caches."""
FEWEST = 20
"""With fewer measured steps nothing is suggested."""
SIGMAS = 3.0
"""A measured ratio is suggested when it is this many standard errors above zero."""


def cost_ratio(shape: ModelShape, *, frozen_base: bool) -> float:
    """``b / a`` of a model, in 1 / tokens: FLOP of a pair of tokens in causal attention over FLOP of a token elsewhere.

    Forward and backward take 6 FLOP per weight and token, 4 with a frozen base (no gradients of its weights); causal
    attention takes 6 x layers x width per pair of tokens (Korthikanti et al., arXiv 2205.05198, appendix A, halved for
    the causal mask).
    """
    weights = shape.layers * shape.layer_parameters + shape.hidden * shape.vocabulary
    pair = 6 * shape.layers * shape.heads * shape.head_dim
    return pair / ((4 if frozen_base else 6) * weights)


def sync_of(strategy: str) -> Sync:
    """When ranks wait for each other: in every micro-batch where gradients are reduced in each, else once per step."""
    return "micro" if strategy in ("fsdp", "zero2", "zero3") else "step"


def waiting_share(schedule: Schedule, weights: NDArray[np.int64], *, steps: int = LOOKED_AT) -> float:
    """Share of the time (0 to 1) that an average rank waits for the slowest, over the first ``steps`` of ``schedule``.

    ``weights`` int64[n]: time of each document in any unit. With ``sync="micro"`` ranks wait in every micro-batch, with
    ``sync="step"`` once per step.
    """
    spent = waited_for = 0.0
    for step in range(min(steps, schedule.num_steps)):
        packs = [float(weights[documents].sum()) for documents in schedule.documents(step)]
        by_micro_batch = np.array(packs).reshape(schedule.accumulation, schedule.world_size)
        loads = by_micro_batch if schedule.sync == "micro" else by_micro_batch.sum(0, keepdims=True)
        spent += float(loads.mean(1).sum())
        waited_for += float(loads.max(1).sum())
    return 1 - spent / waited_for if waited_for else 0.0


@dataclass(frozen=True, slots=True)
class MeasuredRatio:
    """``ratio``: ``b / a`` in 1 / tokens, with its standard ``error``, from ``steps`` optimizer steps."""

    ratio: float
    error: float
    steps: int


def measured_ratio(
    tokens: NDArray[np.float64], pairs: NDArray[np.float64], seconds: NDArray[np.float64]
) -> MeasuredRatio | None:
    """Least squares of ``seconds = c + a * tokens + b * pairs`` over optimizer steps; None where it says nothing.

    float64[steps] each: ``tokens``, the sum of the lengths of a step's documents; ``pairs``, the sum of their squares;
    ``seconds``. Says nothing: fewer than 20 steps, steps that are too much alike, or a ``b`` within three standard
    errors of zero. The error is that of ``b`` over ``a``: that of ``a`` is far smaller.
    """
    count = len(seconds)
    if count < FEWEST:
        return None
    scale = np.array([1.0, np.mean(tokens), np.mean(pairs)])
    features = np.stack([np.ones(count), tokens, pairs], axis=1) / scale
    if np.linalg.matrix_rank(features, tol=1e-6) < 3:
        return None
    solution, *_ = np.linalg.lstsq(features, seconds, rcond=None)
    residual = seconds - features @ solution
    variance = float(residual @ residual) / (count - 3) * np.linalg.inv(features.T @ features)
    a, b = float(solution[1] / scale[1]), float(solution[2] / scale[2])
    error = float(np.sqrt(variance[2, 2])) / float(scale[2])
    if a <= 0 or b <= SIGMAS * error:
        return None
    return MeasuredRatio(b / a, error / a, count)
