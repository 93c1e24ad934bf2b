"""The optimizer and its learning rate.

The learning rate is a pure function of the step: the loop writes it into the parameter groups before every step, so
there is no scheduler object whose state could be lost, saved twice or stepped once too often. The curves themselves are
transformers' own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from trainer.model.adapters import TOKEN_ROWS, trainable_parameters

ScheduleName = Literal["constant", "linear", "cosine", "warmup_stable_decay"]

DECAY_SHARE = 0.2
"""Share of the steps in which ``warmup_stable_decay`` comes down."""


def make_optimizer(
    module: nn.Module, *, lr: float, betas: Sequence[float], eps: float, weight_decay: float
) -> Optimizer:
    """AdamW over the trainable parameters of ``module``, fused where torch has it for their device.

    Args:
        module: on its final device; parameters without ``requires_grad`` are left out.
        lr: starting value; the loop overwrites it.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of matrices; norms, biases, vectors and embeddings have none.
    """
    trainable = trainable_parameters(module)
    spared = undecayed(module)
    groups = [
        {"params": [p for name, p in trainable.items() if name not in spared], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable.items() if name in spared], "weight_decay": 0.0},
    ]
    beta1, beta2 = betas
    filled = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for p in trainable.values())
    return AdamW(filled, lr=lr, betas=(beta1, beta2), eps=eps, fused=fused)


def undecayed(module: nn.Module) -> set[str]:
    """Names of the parameters that weight decay spares: embeddings and everything that is not a matrix.

    An output layer tied to the embeddings is one parameter with them and is spared too.
    """
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    return {
        name
        for name, p in module.named_parameters()
        if p.ndim < 2 or id(p) in embeddings or TOKEN_ROWS in name  # single rows of the embeddings
    }


def warmup_steps(steps: int, share: float) -> int:
    """Steps of the linear warm-up: ``share`` of ``steps``, rounded up as transformers does."""
    return math.ceil(steps * share)


def lr_schedule(
    name: ScheduleName, *, steps: int, warmup: float = 0.0, min_ratio: float = 0.0
) -> Callable[[int], float]:
    """Factor of the peak learning rate at a step (0, 1, ...), from transformers' schedule of that name.

    Args:
        name: ``constant``, ``linear``, ``cosine`` or ``warmup_stable_decay`` (comes down in the last 20 %).
        steps: optimizer steps of the whole run.
        warmup: share of the steps with a linear warm-up; the first step of a warm-up has factor 0.
        min_ratio: after the warm-up the factor f becomes ``min_ratio + (1 - min_ratio) * f``.
    """
    rising = warmup_steps(steps, warmup)
    extra: dict[str, object] = {}
    if name == "warmup_stable_decay":
        extra["num_decay_steps"] = max(1, min(math.ceil(steps * DECAY_SHARE), steps - rising))
    # transformers hands its formulas out only inside a scheduler; this one has a parameter of no use and is never run.
    nothing = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        nothing,
        num_warmup_steps=rising,
        num_training_steps=steps,
        scheduler_specific_kwargs=extra,
    )
    if not isinstance(scheduler, LambdaLR):
        raise TypeError(f"transformers' schedule {name!r} is not a function of the step")
    formula: Callable[[int], float] = scheduler.lr_lambdas[0]

    def factor(step: int) -> float:
        value = float(formula(step))
        return value if step < rising else min_ratio + (1.0 - min_ratio) * value

    return factor
