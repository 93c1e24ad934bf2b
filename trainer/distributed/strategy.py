"""What a way of sharing the training among ranks has to do, and which one a plan asks for.

How a model is wrapped, when gradients are summed, which part of a tensor a rank owns: the loop, the checkpoints and the
evaluation ask the strategy, and a new way of sharing is a new class beside ``plain.py``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.distributed.fragments import Fragment
from trainer.distributed.fsdp import FullySharded, Sharding
from trainer.distributed.plain import Plain
from trainer.distributed.ranks import Ranks
from trainer.distributed.zero import DividedState, DividedWeights
from trainer.errors import RunError
from trainer.memory import StrategyName as StrategyName
from trainer_launch.zero import ZeroSpec


class Strategy(Protocol):
    """A way to share the training among ranks. ``prepare`` comes first; then ``module`` is what the loop calls.

    ``replicated``: every rank owns all weights and all optimizer state. ``in_step``: a forward pass inside ``gathered``
    is still one that all ranks make together.
    """

    ranks: Ranks
    replicated: bool
    in_step: bool

    @property
    def module(self) -> nn.Module:
        """The wrapped module: takes a batch, returns the summed loss of its targets."""
        ...

    @property
    def inner(self) -> nn.Module:
        """The module as it was given to ``prepare``."""
        ...

    @property
    def optimizer(self) -> Optimizer:
        """Its ``param_groups`` take the learning rate."""
        ...

    @property
    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Trainable parameters by the name they have in ``inner``; the same names under every strategy."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the whole trainable parameters, by the same names."""
        ...

    def prepare(self, module: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        """Move to the device, wrap, make the optimizer, and check the result against the plan."""
        ...

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; gradients are summed over ranks in the ``last`` one."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss``; over ranks they are averaged."""
        ...

    def clip(self) -> torch.Tensor:
        """Clip to ``clip_norm``; returns the global norm before clipping, a scalar on the device."""
        ...

    @property
    def may_overflow(self) -> bool:
        """Whether a non-finite gradient may be no more than a loss scale that is too high (float16)."""
        ...

    def step(self) -> None:
        """Apply the gradients and clear them; float16 skips the update and lowers the scale after an overflow."""
        ...

    def discard(self) -> None:
        """Take no step: clear the gradients and leave weights and optimizer as they are. All ranks alike."""
        ...

    def fragments(self, *, saving: bool) -> Iterator[Fragment]:
        """What this rank has to write (``saving``) or to fill; all ranks' written parts cover every parameter once."""
        ...

    def scaler_state(self) -> dict[str, float]:
        """State of the loss scale; empty without one."""
        ...

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Continue with this state of the loss scale."""
        ...

    def refresh(self) -> None:
        """Bring what the forward pass reads up to date after writing to fragments."""
        ...

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Trainable parameters one by one, whole, on rank 0; None elsewhere. All ranks iterate together."""
        ...

    def gathered(self) -> AbstractContextManager[nn.Module]:
        """``inner`` as generation needs it: parts of it can be called, each rank on its own unless ``in_step``.

        All ranks enter and leave together. A forward pass of ``module`` needs no ``gathered``, but the same number of
        them on every rank.
        """
        ...


def make_strategy(
    kind: StrategyName,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    clip_norm: float,
    sharding: Sharding | None = None,
    zero: ZeroSpec | None = None,
    gather_for_generation: bool = True,
    read: Callable[[str, int, int], torch.Tensor] | None = None,
) -> Strategy:
    """The strategy named in the plan, for a group that was started.

    Args:
        kind: "single" for one process, the others for several.
        ranks: the group.
        dtype: compute dtype of the forward pass, which the module sees to itself; float16 adds a loss scale here.
            Trainable parameters are fp32 whatever it is.
        clip_norm: largest global gradient norm; 0 turns clipping off.
        sharding: what "fsdp" cuts and when it gathers; the others have no use for it.
        zero: what "zero1", "zero2" and "zero3" divide; the others have no use for it.
        gather_for_generation: "zero3" holds the whole model on every rank in ``gathered()``.
        read: numbers of parameters that are on the meta device, for "zero3" (``Sharding`` has it for "fsdp").

    Raises:
        RunError: the kind does not fit the number of ranks, or cannot train in ``dtype``.
    """
    if (kind == "single") != (ranks.world_size == 1):
        raise RunError(
            "the planned strategy does not fit the number of ranks",
            got=f"{kind} with {ranks.world_size} ranks",
            allowed="single with one rank, ddp, fsdp or zero1 to zero3 with several",
            do="plan again: `python -m trainer plan` with the same overrides",
        )
    if kind in ("single", "ddp"):
        return Plain(ranks, dtype=dtype, clip_norm=clip_norm)
    if dtype == torch.float16:
        raise RunError(
            f"{kind} has no loss scale, without which float16 cannot be trained",
            where="model.dtype",
            got=f"float16 with parallel={kind}",
            allowed="bfloat16, float32",
            do="model.dtype=bfloat16, or parallel=ddp",
        )
    if kind == "fsdp":
        if sharding is None:
            raise ValueError("fsdp needs to know the layers to shard")
        return FullySharded(ranks, sharding, dtype=dtype, clip_norm=clip_norm)
    if zero is None or f"zero{zero.stage}" != kind:
        raise ValueError(f"{kind} needs to know what of it to divide, got {zero}")
    if zero.stage == 3:
        return DividedWeights(ranks, zero, clip_norm=clip_norm, gather_for_generation=gather_for_generation, read=read)
    return DividedState(ranks, zero, clip_norm=clip_norm)
