"""The strategies in which DeepSpeed divides the training among the ranks (ZeRO, arXiv 1910.02054): stages 1, 2 and 3.

Stage 1 divides the optimizer's state, stage 2 gradients as well, stage 3 also the weights. DeepSpeed's engine is made
directly, in the process group that is there already: accelerate's DeepSpeed wants another order of starting for each
device, and silently becomes DDP on a CPU. The loop says when a step is over and scales the loss; the engine divides by
no accumulation. Its config comes from ``trainer_launch.zero``.

Number formats. As in the other strategies masters, gradients that are reduced and optimizer state are float32, and the
module computes under autocast by itself; DeepSpeed's own 16-bit modes would round weights and gradients elsewhere. The
price is paid in stage 3: weights are gathered in the format in which they are stored, and in full fine-tuning in 16
bits the graph keeps autocast's casts of them until the backward pass, unless activations are checkpointed.

What a rank owns is read out of attributes of DeepSpeed that are no public interface, because only they are exact and
live; hence the range of versions in ``pyproject.toml``, and the checks after ``prepare``, which look at the partitions
and not at a setting.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.distributed.fragments import MOMENTS, Fragment, adam_state
from trainer.distributed.prepared import Prepared, prepared
from trainer.distributed.ranks import Ranks, choose_accelerator
from trainer.distributed.zero_files import Pending, Read, divide, without_numbers
from trainer.errors import RunError, TrainingFault
from trainer_launch.zero import ZeroSpec, deepspeed_config


class Zero(Prepared, ABC):
    """What the three stages have in common: DeepSpeed's engine, driven by the loop."""

    def __init__(self, ranks: Ranks, spec: ZeroSpec, *, clip_norm: float) -> None:
        super().__init__(ranks, replicated=False, in_step=False, clip_norm=clip_norm)
        self._spec = spec
        self._engine: Any = None

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer around AdamW, which has the partitions."""
        return prepared(self._engine).optimizer

    def prepare(self, module: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        """Make the optimizer, and have DeepSpeed divide it and what else the stage says.

        Raises:
            RunError: DeepSpeed is not installed.
            TrainingFault: nothing to train, parameters that are not fp32, or partitions other than planned.
        """
        self._take(module)
        stored = {name: (parameter.numel(), parameter.dtype) for name, parameter in module.named_parameters()}
        pending = without_numbers(module)
        self._optimizer = make_optimizer(module)
        if pending:
            self._read_and_divide(pending)
        self._module = self._engine = start_engine(module, self._optimizer, self._spec, device=self.ranks.device)
        self._check(stored)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Stage 1 reduces gradients in the ``last`` micro-batch, stages 2 and 3 in each, into the owner's part."""
        prepared(self._engine).set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss``; DeepSpeed averages them over the ranks and divides by nothing else."""
        prepared(self._engine).backward(loss, scale_wrt_gas=False)

    def clip(self) -> torch.Tensor:
        """Global L2 norm over the parts of all ranks; ``clip_norm`` 0 only measures it."""
        gradients = [gradient.detach() for gradient in self._gradients()]
        local = nn.utils.get_total_norm(gradients).to(self.ranks.device, torch.float64)
        norm = self.ranks.sum_over_ranks(local.square()).sqrt().float()
        if self._clip_norm > 0:
            factor = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.device))
        return norm

    def step(self) -> None:
        """Optimizer step on this rank's part; weights are gathered from all ranks where they are whole on each."""
        prepared(self._engine).step()

    def discard(self) -> None:
        """A step of the engine in which AdamW does nothing: gradients, buffers and counters are cleared as always."""
        self.optimizer.step = lambda *_, **__: None  # type: ignore[method-assign]  # for this one step
        try:
            prepared(self._engine).step()
        finally:
            del self.optimizer.step

    def fragments(self, *, saving: bool) -> Iterator[Fragment]:
        """This rank's part of every parameter of which it owns one."""
        for name, parameter in self._trainable.items():
            found = self._owned(parameter)
            if found is None:
                continue
            flat, first, start, length = found
            state = adam_state(self.optimizer, flat)
            whole = {"param": flat.detach(), **{key: state[key] for key in MOMENTS}}
            tensors = {key: tensor.narrow(0, first, length) for key, tensor in whole.items()}
            yield Fragment(name, start, self._shapes[name], state["step"], tensors)

    def _gradients(self) -> list[torch.Tensor]:
        """This rank's part of the gradients, averaged over the ranks; live until the step."""
        if not self._spec.offload_optimizer:
            return [gradient for group in self._zero.averaged_gradients.values() for gradient in group]
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)  # they are copied to main memory beside the computation
        return [flat.grad for flat in self._partitions() if flat.grad is not None]

    def _read_and_divide(self, pending: Pending) -> None:
        """Give parameters without numbers their own.

        Raises:
            RuntimeError: this stage keeps all weights on every rank: a defect of the program.
        """
        raise RuntimeError(f"{pending[0][0]} has no numbers, and stage {self._spec.stage} needs them on every rank")

    @abstractmethod
    def _partitions(self) -> list[nn.Parameter]:
        """Flat float32 masters that this rank owns, one per group of parameters."""

    @abstractmethod
    def _owned(self, parameter: nn.Parameter) -> tuple[nn.Parameter, int, int, int] | None:
        """(flat partition, first element in it, first element in the flattened parameter, length) of what is owned."""

    def _check(self, stored: Mapping[str, tuple[int, torch.dtype]]) -> None:
        """Compare what there is with the plan; ``stored``: elements and dtype of every parameter before."""
        if (got := prepared(self._engine).dp_world_size) != self.ranks.world_size:
            raise divided_otherwise("the engine", f"{got} ranks", f"{self.ranks.world_size} ranks")
        for flat in self._partitions():
            if flat.dtype != torch.float32:
                raise divided_otherwise("the masters", str(flat.dtype), "torch.float32")
        owned = torch.tensor([sum(fragment.length for fragment in self.fragments(saving=True))], dtype=torch.int64)
        (total,) = self.ranks.sum_over_ranks(owned).tolist()
        wanted = sum(prod(shape) for shape in self._shapes.values())
        if total != wanted:
            raise divided_otherwise("all ranks together", f"{total} trained elements", f"{wanted}")
        held, most = sum(flat.numel() for flat in self._partitions()), self._most_owned(wanted)
        if held > most:
            raise divided_otherwise(f"rank {self.ranks.rank}", f"{held} trained elements", f"at most {most}")

    def _most_owned(self, elements: int) -> int:
        """Most of ``elements`` that one rank may own: its share, and what is filled up in every parameter or group."""
        return -(-elements // self.ranks.world_size) + 2 * len(self._trainable) + 2 * self.ranks.world_size


class DividedState(Zero):
    """Stages 1 and 2: every rank has all weights, and owns a part of the optimizer's state (2: and of gradients)."""

    def refresh(self) -> None:
        """Copy the masters into the weights, and those of the other ranks."""
        self._zero.update_lp_params()

    def _partitions(self) -> list[nn.Parameter]:
        return self._zero.single_partition_of_fp32_groups

    def _owned(self, parameter: nn.Parameter) -> tuple[nn.Parameter, int, int, int] | None:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's; None: another rank's
        if mapping is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return self._partitions()[mapping.param_group_index], here.start, there.start, here.numel


class DividedWeights(Zero):
    """Stage 3: every rank owns a part of weights, gradients and optimizer state; a module is whole while it computes.

    ``gather_for_generation``: hold the whole model on every rank in ``gathered()``. ``read``: numbers of parameters
    that are on the meta device (``zero_files``); None: all have theirs.
    """

    def __init__(
        self,
        ranks: Ranks,
        spec: ZeroSpec,
        *,
        clip_norm: float,
        gather_for_generation: bool,
        read: Read | None = None,
    ) -> None:
        super().__init__(ranks, spec, clip_norm=clip_norm)
        self.in_step = not gather_for_generation
        self._read = read

    def refresh(self) -> None:
        """Give back what is gathered, and copy the masters into what is gathered next."""
        zero = self._zero
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Gathered one at a time; no rank ever holds two."""
        from deepspeed.runtime.zero import GatheredParameters  # type: ignore[import-not-found]

        for name, parameter in self._trainable.items():
            with GatheredParameters([parameter]):
                whole = parameter.detach().clone() if self.ranks.is_first else None
            yield name, whole

    @contextmanager
    def gathered(self, *, layers: bool | None = None) -> Iterator[nn.Module]:
        """The whole model with ``gather_for_generation`` (or as ``layers`` says), else a module while it computes."""
        if self.in_step or layers is False:
            yield self.inner
            return
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation  # type: ignore[import-not-found]

        with unwrap_model_for_generation(self._engine):
            yield self.inner

    def _read_and_divide(self, pending: Pending) -> None:
        import_deepspeed(self.ranks.device)
        divide(pending, prepared(self._read), deepspeed_config(self._spec), reads=self.ranks.is_first)

    def _partitions(self) -> list[nn.Parameter]:
        return self._zero.fp32_partitioned_groups_flat

    def _owned(self, parameter: nn.Parameter) -> tuple[nn.Parameter, int, int, int] | None:
        group, first, filled = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = self.ranks.rank * filled
        length = min(filled, whole_size(parameter) - start)
        return None if length < 1 else (self._partitions()[group], first, start, length)

    def _check(self, stored: Mapping[str, tuple[int, torch.dtype]]) -> None:
        super()._check(stored)
        for name, parameter in self.inner.named_parameters():
            check_divided(name, parameter, *stored[name], world_size=self.ranks.world_size, spec=self._spec)


def check_divided(
    name: str, parameter: torch.Tensor, elements: int, dtype: torch.dtype, *, world_size: int, spec: ZeroSpec
) -> None:
    """Check that ``parameter`` (whole: ``elements`` in ``dtype``) is divided among ``world_size`` ranks, or may not be.

    Raises:
        TrainingFault: it is not; the message says what it is.
    """
    part: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    share, allowed = -(-elements // world_size), elements if elements <= spec.keep_whole_below else 0
    here = "no part" if part is None else f"a part of {part.numel()} elements in {part.dtype}"
    wanted = f"a part of {share} elements in {dtype}"
    if here != wanted or parameter.numel() > allowed:
        raise divided_otherwise(name, f"{here}, {parameter.numel()} whole", f"{wanted}, at most {allowed} whole")


def divided_otherwise(where: str, got: str, allowed: str) -> TrainingFault:
    """The error of a division that is not the planned one."""
    return TrainingFault(
        "DeepSpeed did not divide the training as planned",
        where=where,
        got=got,
        allowed=allowed,
        do="report this together with env.json of the run",
    )


def whole_size(parameter: torch.Tensor) -> int:
    """Elements of the whole ``parameter``, also while stage 3 has taken it apart."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def start_engine(module: nn.Module, optimizer: Optimizer, spec: ZeroSpec, *, device: torch.device) -> Any:
    """DeepSpeed's engine around ``module`` and ``optimizer``, in the process group that is there.

    Raises:
        RunError: DeepSpeed is not installed here.
    """
    deepspeed = import_deepspeed(device)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(spec))
    return engine


def import_deepspeed(device: torch.device) -> Any:
    """The package, set to compute on ``device`` and to compile nothing.

    Raises:
        RunError: DeepSpeed is not installed here.
    """
    choose_accelerator(device)
    try:
        import deepspeed  # type: ignore[import-not-found]
    except ModuleNotFoundError as fault:
        raise RunError(
            "DeepSpeed cannot be imported on this machine",
            where="parallel.name",
            got=str(fault),
            allowed="the packages that the run was planned with",
            do="pip install -c constraints.txt -e '.[deepspeed]', or parallel=fsdp",
        ) from fault
    # torch renamed two collectives in 2.13; DeepSpeed 0.19.8 calls both by their old names, at every use.
    renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    # A kernel for all-reduces between CPU processes, which would be compiled at the first start, with g++, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
