"""What every strategy demands of the module it is given, and of its own user: be trainable, and be prepared first."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.distributed.ranks import Ranks
from trainer.errors import TrainingFault

T = TypeVar("T")


class Prepared:
    """What a strategy has once its ``prepare`` is done; ``Strategy`` says what it means.

    Without more, all weights are on every rank and there is no loss scale. A subclass sets ``_module`` and
    ``_optimizer``, and calls ``_take`` for the rest.
    """

    def __init__(self, ranks: Ranks, *, replicated: bool, in_step: bool, clip_norm: float) -> None:
        self.ranks = ranks
        self.replicated = replicated
        self.in_step = in_step
        self._clip_norm = clip_norm
        self._module: nn.Module | None = None
        self._inner: nn.Module | None = None
        self._optimizer: Optimizer | None = None
        self._trainable: dict[str, nn.Parameter] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    @property
    def module(self) -> nn.Module:
        """What the loop calls."""
        return prepared(self._module)

    @property
    def inner(self) -> nn.Module:
        """The module as given to ``prepare``."""
        return prepared(self._inner)

    @property
    def optimizer(self) -> Optimizer:
        """Over what this rank owns."""
        return prepared(self._optimizer)

    @property
    def trainable(self) -> Mapping[str, nn.Parameter]:
        """By name in ``inner``, as they are on this rank."""
        return self._trainable

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the whole parameters."""
        return self._shapes

    @property
    def may_overflow(self) -> bool:
        """Never, unless there is a loss scale."""
        return False

    def discard(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def scaler_state(self) -> dict[str, float]:
        """There is no loss scale."""
        return {}

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """There is no loss scale to set."""

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """The parameters as they are, where every rank has all of them."""
        for name, parameter in self._trainable.items():
            yield name, parameter.detach() if self.ranks.is_first else None

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The module as it is, where every rank has all of it."""
        yield self.inner

    def _take(self, module: nn.Module) -> None:
        """``module`` is what is trained, whole or in parts that still tell the shape of the whole.

        Raises:
            TrainingFault: nothing to train, or parameters that are not fp32.
        """
        self._inner = module
        self._trainable = trainable_parameters(module)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._trainable.items()}


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
