"""Held-out loss: every target weighs the same, whatever its batch, rank or mode."""

import math

import pytest
import torch
from torch import nn

from trainer.batch import Batch
from trainer.errors import TrainingFault
from trainer.evaluate.loss import HeldOutLoss, held_out_loss


def batch(losses: list[float]) -> Batch:
    """A pack whose ``position_ids`` carry, in thousandths, the loss of each target."""
    values = torch.tensor([[round(loss * 1000) for loss in losses] or [0]])
    size = values.shape[1]
    return Batch(
        input_ids=values,
        labels=values,
        position_ids=values,
        cu_seqlens=torch.tensor([0, size], dtype=torch.int32),
        boundaries=(0, size),
        max_seqlen=size,
        num_tokens=size,
        num_targets=len(losses),
    )


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.modes: list[bool] = []
        self.gradients: list[bool] = []

    def forward(self, pack: Batch) -> torch.Tensor:
        self.modes.append(self.training)
        self.gradients.append(torch.is_grad_enabled())
        return self.dropout(pack.position_ids.float() / 1000).sum()


PACKS = [[1.0, 2.0, 3.0], [10.0], [], [0.5, 0.5]]


def test_every_target_weighs_the_same():
    module = Sum()
    found = held_out_loss(module, [batch(pack) for pack in PACKS])
    assert found == pytest.approx((17.0, 6))
    assert found.mean == pytest.approx(17 / 6)
    assert found.perplexity == pytest.approx(math.exp(17 / 6))
    assert module.modes == [False] * 4
    assert module.gradients == [False] * 4
    assert module.training
    assert module.dropout.training


def test_ranks_together_equal_one_rank():
    sums: list[torch.Tensor] = []
    for share in (PACKS[:1], PACKS[1:]):
        held_out_loss(Sum(), [batch(pack) for pack in share], lambda part: sums.append(part) or part)
    total = sums[0] + sums[1]
    both = [
        held_out_loss(Sum(), [batch(pack) for pack in share], lambda part: total) for share in (PACKS[:1], PACKS[1:])
    ]
    assert both[0] == both[1] == pytest.approx((17.0, 6))


def test_a_rank_without_batches_still_takes_part():
    assert held_out_loss(Sum(), [], lambda part: part + torch.tensor([6.0, 3.0])) == (6.0, 3)


def test_modes_are_restored_after_an_error():
    module = Sum()
    with pytest.raises(AttributeError):
        held_out_loss(module, [None])  # type: ignore[list-item]
    assert module.training


def test_no_targets_are_refused():
    with pytest.raises(TrainingFault, match="there is nothing to measure the loss on"):
        held_out_loss(Sum(), [batch([])])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(value):
    class Broken(nn.Module):
        def forward(self, pack: Batch) -> torch.Tensor:
            return torch.tensor(value)

    with pytest.raises(TrainingFault, match=f"the held-out loss is not a finite number\n  got: {value} over 1 tokens"):
        held_out_loss(Broken(), [batch([1.0])])


def test_perplexity_beyond_floats_is_infinite():
    assert HeldOutLoss(nll=1000.0, targets=1).perplexity == math.inf
