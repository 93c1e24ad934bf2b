"""What a rank owns of the training state, in the one form that every strategy has and every checkpoint stores.

A strategy may keep whole tensors, flat partitions or shards. As (name, start, flat values) they are all alike, so that
a checkpoint written under one strategy and world size fills the tensors of another.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.errors import TrainingFault

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state per element; with ``step`` all of its state."""


@dataclass(frozen=True, slots=True, eq=False)
class Fragment:
    """The part of one trainable parameter that this rank owns, as flat live views.

    ``tensors``: "param", "exp_avg" and "exp_avg_sq", 1-D views of equal length whose first element is element ``start``
    of the flattened parameter. ``step``: the parameter's own count of optimizer steps, a live scalar. Writing to the
    views changes the training state; call ``refresh`` afterwards.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    step: torch.Tensor
    tensors: Mapping[str, torch.Tensor]

    @property
    def length(self) -> int:
        """Number of elements."""
        return self.tensors["param"].numel()


def adam_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """AdamW's live state of one parameter, made as AdamW would make it when there has been no step yet.

    Raises:
        TrainingFault: the optimizer keeps other things than AdamW; a checkpoint would lose them.
    """
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if not state:
        # A fused step counts on the device, the others on the host (torch.optim.Adam._init_group).
        where = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=where)
        state.update({key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS})
    if set(state) != {"step", *MOMENTS}:
        raise TrainingFault(
            "this optimizer's state is not AdamW's",
            got=", ".join(sorted(state)),
            allowed=", ".join(sorted(("step", *MOMENTS))),
            do="use AdamW; other optimizers need their state in trainer/distributed/fragments.py",
        )
    return state
