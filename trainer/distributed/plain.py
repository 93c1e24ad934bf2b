"""The strategy in which every rank has everything: one process alone, or replicas that sum their gradients (DDP).

The kind of wrapping and the dtype of what is trained are compared with the plan before anything is trained.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trainer.distributed.fragments import MOMENTS, Fragment, adam_state
from trainer.distributed.prepared import Prepared
from trainer.distributed.ranks import Ranks
from trainer.errors import TrainingFault


class Plain(Prepared):
    """One process alone, or a replica per rank (DDP): every rank has all parameters and all optimizer state."""

    def __init__(self, ranks: Ranks, *, dtype: torch.dtype, clip_norm: float) -> None:
        super().__init__(ranks, replicated=True, in_step=False, clip_norm=clip_norm)
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)

    def prepare(self, module: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        """Wrap ``module`` and make its optimizer.

        Raises:
            TrainingFault: nothing to train, parameters that are not fp32, or a wrapping other than planned.
        """
        self._take(module)
        self._module = self.ranks.accelerator.prepare_model(module)
        wanted = DistributedDataParallel if self.ranks.world_size > 1 else type(module)
        if type(self._module) is not wanted:
            raise TrainingFault(
                "accelerate did not wrap the model as planned",
                got=type(self._module).__name__,
                allowed=wanted.__name__,
                do="report this together with env.json of the run",
            )
        self._optimizer = make_optimizer(module)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Hold the all-reduce of gradients back until the ``last`` micro-batch."""
        module = self.module
        with module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Through accelerate, which other strategies depend on; it divides by nothing here."""
        self.ranks.accelerator.backward(self._scaler.scale(loss))

    def clip(self) -> torch.Tensor:
        """Global L2 norm over all trainable parameters; ``clip_norm`` 0 only measures it."""
        if self._scaler.is_enabled():
            self._scaler.unscale_(self.optimizer)
        bound = self._clip_norm if self._clip_norm > 0 else float("inf")
        return nn.utils.clip_grad_norm_(list(self._trainable.values()), bound)

    @property
    def may_overflow(self) -> bool:
        """True in float16 as long as the loss scale can still be lowered."""
        return self._scaler.is_enabled() and self._scaler.get_scale() > 1.0

    def step(self) -> None:
        """Optimizer step, then clear the gradients."""
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        """Clear the gradients; the scaler, which ``clip`` has told of them, ends the step as well."""
        if self._scaler.is_enabled():
            self._scaler.update()
        super().discard()

    def fragments(self, *, saving: bool) -> Iterator[Fragment]:
        """Whole parameters: rank 0 writes them, every rank reads them."""
        if saving and not self.ranks.is_first:
            return
        for name, parameter in self._trainable.items():
            state = adam_state(self.optimizer, parameter)
            tensors = {"param": parameter.detach(), **{key: state[key] for key in MOMENTS}}
            flat = {key: tensor.view(-1) for key, tensor in tensors.items()}
            yield Fragment(name, 0, tuple(parameter.shape), state["step"], flat)

    def scaler_state(self) -> dict[str, float]:
        """As ``torch.amp.GradScaler`` has it."""
        return {key: float(value) for key, value in self._scaler.state_dict().items()}

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Continue with the loss scale of a checkpoint; one written in another dtype has none, and ours stays."""
        if state and self._scaler.is_enabled():
            counts = {name: int(state[name]) for name in ("growth_interval", "_growth_tracker")}
            self._scaler.load_state_dict({**state, **counts})

    def refresh(self) -> None:
        """Nothing: the forward pass reads the fragments themselves."""
