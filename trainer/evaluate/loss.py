"""Loss on held-out rows, weighted by token.

A mean of batch means weighs a token by how its batch happened to be filled, and it changes with the number of ranks.
So two sums travel, and the division comes last. No logits are kept or gathered: a batch leaves two numbers.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from trainer.batch import Batch
from trainer.errors import TrainingFault


class HeldOutLoss(NamedTuple):
    """``nll``: summed negative log-likelihood in nats; ``targets``: the number of tokens it is summed over."""

    nll: float
    targets: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nll / self.targets

    @property
    def perplexity(self) -> float:
        """``exp(mean)``; infinity where that leaves the range of a float."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


def held_out_loss(
    loss_module: nn.Module,
    batches: Iterable[Batch],
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> HeldOutLoss:
    """Token-weighted loss over the batches of all ranks.

    Args:
        loss_module: called with a ``Batch``, returns the summed loss of its targets as a scalar. It is in evaluation
            mode during the call and as it was afterwards.
        batches: this rank's batches, on the device; a batch without targets counts for nothing (its forward still
            runs: sharded models talk in it).
        reduce: sums a float64 tensor [2] over the ranks, in place or not; every rank calls it once.

    Raises:
        TrainingFault: no target in any batch, or a loss that is not a finite number. Every rank raises alike.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    was_training = [module for module in loss_module.modules() if module.training]
    loss_module.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                loss = loss_module(batch)
                # Sums stay on the device: reading each one would make the device wait for every batch.
                sums = sums.to(loss.device)
                sums[0] += loss.double() if batch.num_targets else 0.0
                sums[1] += batch.num_targets
    finally:
        for module in was_training:
            module.training = True
    nll, targets = reduce(sums).tolist()
    if targets == 0:
        raise TrainingFault(
            "there is nothing to measure the loss on",
            got="0 target tokens in the held-out batches",
            allowed="at least one",
            do="look at the validation and test rows: their answers are empty or cut away",
        )
    if not math.isfinite(nll):
        raise TrainingFault(
            "the held-out loss is not a finite number",
            got=f"{nll} over {int(targets)} tokens",
            do="lower optim.lr, or compute in a wider model.dtype (bfloat16 or float32 in place of float16)",
        )
    return HeldOutLoss(nll=nll, targets=int(targets))
