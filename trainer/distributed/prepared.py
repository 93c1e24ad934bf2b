"""What every strategy demands of the module it is given, and of its own user: be trainable, and be prepared first."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from trainer.errors import TrainingFault

T = TypeVar("T")


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of what is trained in ``module``.

    Raises:
        TrainingFault: nothing, or parameters that are not float32.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    _check_trainable(trainable)
    return trainable


def _check_trainable(trainable: Mapping[str, nn.Parameter]) -> None:
    if not trainable:
        raise TrainingFault(
            "there is nothing to train",
            got="0 trainable parameters",
            do="check method.targets, method.layers, method.freeze_layers and method.freeze_embeddings",
        )
    narrow: Sequence[str] = [name for name, p in trainable.items() if p.dtype != torch.float32]
    if narrow:
        raise TrainingFault(
            "trainable parameters have to be float32; the compute dtype is set by autocast",
            got=f"{trainable[narrow[0]].dtype} in {len(narrow)} of {len(trainable)}, first {narrow[0]}",
            allowed="torch.float32",
            do="load the model in float32 for full fine-tuning, and make adapters in float32",
        )


def prepared(value: T | None) -> T:
    """``value``, which ``prepare`` has set.

    Raises:
        RuntimeError: it has not: a defect of the program.
    """
    if value is None:
        raise RuntimeError("the strategy was used before prepare()")
    return value
