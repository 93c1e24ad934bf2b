"""Everything that differs between one process and many: the group of ranks, and the strategy that trains with it.

The loop, the checkpoints and the evaluation are written once. What a way of sharing the work changes (how a model is
wrapped, when gradients are summed, which part of a tensor a rank owns) is one small class here. After the start, world
size, device, kind of wrapping and dtype are compared with the plan: launchers fall back silently (``accelerate launch
--cpu --num_processes 2`` starts one process), this module does not.

The environment is read here and nowhere else in the trainer: the variables that torchrun, ``accelerate launch`` and
``trainer_launch`` all set (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trainer.errors import RunError, TrainingFault

StrategyName = Literal["single", "ddp"]
T = TypeVar("T")

GROUP_TIMEOUT = timedelta(minutes=30)
"""A rank that waits longer than this for the others gives up; publishing a large checkpoint has to fit in."""

ENVIRONMENT = os.environ  # noqa: TID251  (this is the one place of the trainer that reads it)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state per element; with ``step`` all of its state."""


@dataclass(frozen=True, slots=True)
class LaunchedAs:
    """Who this process is according to its launcher."""

    rank: int
    local_rank: int
    world_size: int


def launched_as() -> LaunchedAs:
    """The launcher's variables; without any, one process alone.

    Raises:
        RunError: only some of them are set, or they are not numbers.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = {name: ENVIRONMENT[name] for name in names if name in ENVIRONMENT}
    if not given:
        return LaunchedAs(rank=0, local_rank=0, world_size=1)
    if len(given) < len(names) or not all(value.isdecimal() for value in given.values()):
        raise RunError(
            "the launcher's variables are incomplete",
            got=", ".join(f"{name}={given.get(name, '(not set)')}" for name in names),
            allowed="RANK, LOCAL_RANK and WORLD_SIZE, all three, as whole numbers",
            do="start with `python -m trainer`, torchrun or `accelerate launch`",
        )
    return LaunchedAs(*(int(given[name]) for name in names))


class Ranks:
    """The group of processes of a run, and what they can agree on. Every method is called by all ranks alike."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what exists once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.accelerator.wait_for_everyone()

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum ``values`` (any shape, the same on every rank) element by element; the result is on the device."""
        values = values.to(self.device)
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` holds on at least one rank."""
        return bool(self.sum_over_ranks(torch.tensor(float(flag))).item() > 0)

    def from_first(self, value: int) -> int:
        """Rank 0's ``value``, on every rank."""
        return int(self.sum_over_ranks(torch.tensor(value if self.is_first else 0, dtype=torch.int64)).item())

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in the order of ranks. They travel as pickle, between processes of one run only."""
        if self.world_size == 1:
            return [value]
        gathered: list[T] = [value] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def same_on_all_ranks(self, digest: str, *, what: str) -> None:
        """Check that every rank computed the same ``digest`` of ``what``.

        Raises:
            TrainingFault: on all ranks, naming those that differ from rank 0.
        """
        digests = self.gather(digest)
        different = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if different:
            raise TrainingFault(
                f"the ranks do not have the same {what}",
                got=f"rank 0 {digests[0][:12]}, "
                + ", ".join(f"rank {rank} {digests[rank][:12]}" for rank in different),
                allowed="one and the same on every rank",
                do="check that all machines see the same run folder, the same code and the same packages",
            )

    def close(self) -> None:
        """Leave the group; call it last."""
        if dist.is_initialized():
            dist.destroy_process_group()


def start_ranks(*, device: Literal["cpu", "cuda"], world_size: int, threads: int | None = None) -> Ranks:
    """Join the group of ranks, and check that it is the one that was planned.

    Args:
        device: where every rank computes; on CUDA, rank ``LOCAL_RANK`` takes the GPU of that number.
        world_size: ranks of the plan.
        threads: CPU threads of this rank; None leaves them alone.

    Raises:
        RunError: started with another number of processes, or the device is not there.
    """
    launched = launched_as()
    if launched.world_size != world_size:
        raise RunError(
            "this run was planned for another number of processes",
            got=f"{launched.world_size} started",
            allowed=f"{world_size} (plan.json)",
            do=f"start {world_size} processes, or plan again with launch.processes={launched.world_size}",
        )
    if device == "cuda" and torch.cuda.device_count() <= launched.local_rank:
        raise RunError(
            "there is no GPU for this rank",
            got=f"local rank {launched.local_rank}, {torch.cuda.device_count()} visible GPUs",
            do="lower launch.processes, or use launch.device=cpu",
        )
    if threads is not None:
        torch.set_num_threads(threads)
    if world_size == 1:
        # For accelerate LOCAL_RANK alone means a group, and it would wrap the model in DDP around a group of one.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            ENVIRONMENT.pop(name, None)
    else:
        # Our own call, because accelerate forgets the timeout on the CPU.
        if device == "cuda":
            torch.cuda.set_device(launched.local_rank)
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, rank=launched.rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    ranks = Ranks(_accelerator(device))
    _check_group(ranks, device, world_size)
    return ranks


def _accelerator(device: str) -> Accelerator:
    """Accelerate without opinions of its own: precision, accumulation and their scaling are the loop's business."""
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(cpu=device == "cpu", mixed_precision="no", gradient_accumulation_steps=1, kwargs_handlers=[ddp])


def _check_group(ranks: Ranks, device: str, world_size: int) -> None:
    kinds = {DistributedType.NO} if world_size == 1 else {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    kind = ranks.accelerator.distributed_type
    if kind not in kinds or ranks.world_size != world_size or ranks.device.type != device:
        raise TrainingFault(
            "accelerate did not start what was planned",
            got=f"{kind.value} with {ranks.world_size} ranks on {ranks.device}",
            allowed=f"{' or '.join(sorted(k.value for k in kinds))} with {world_size} ranks on {device}",
            do="look for ACCELERATE_* variables and a default accelerate config on this machine",
        )


def seed_all(*parts: int) -> None:
    """Seed Python, NumPy and torch (all devices) from whole numbers >= 0; other numbers give an unrelated stream.

    The loop calls this before every micro-batch with (seed, step, documents), so dropout noise belongs to the data and
    not to a rank: no random state exists between two micro-batches, a resumed run and a run at another world size draw
    the same noise.
    """
    # NumPy fills up with zeros, so (7,) and (7, 0) would be one seed without the length.
    state = int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0])
    random.seed(state)
    np.random.seed(state % 2**32)
    torch.manual_seed(state % 2**63)


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


class Strategy(Protocol):
    """A way to share the training among ranks. ``prepare`` comes first; then ``module`` is what the loop calls.

    ``replicated``: every rank owns all weights and all optimizer state.
    """

    ranks: Ranks
    replicated: bool

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
        """``inner`` with whole parameters, for evaluation and generation."""
        ...


class Plain:
    """One process alone, or a replica per rank (DDP): every rank has all parameters and all optimizer state."""

    def __init__(self, ranks: Ranks, *, dtype: torch.dtype, clip_norm: float) -> None:
        self.ranks = ranks
        self.replicated = True
        self._clip_norm = clip_norm
        self._module: nn.Module | None = None
        self._inner: nn.Module | None = None
        self._optimizer: Optimizer | None = None
        self._trainable: dict[str, nn.Parameter] = {}
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)

    @property
    def module(self) -> nn.Module:
        """The inner module, or DDP around it."""
        return _prepared(self._module)

    @property
    def inner(self) -> nn.Module:
        """The module as given to ``prepare``."""
        return _prepared(self._inner)

    @property
    def optimizer(self) -> Optimizer:
        """Made on the device, after wrapping."""
        return _prepared(self._optimizer)

    @property
    def trainable(self) -> Mapping[str, nn.Parameter]:
        """By name in ``inner``."""
        return self._trainable

    def prepare(self, module: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        """Wrap ``module`` and make its optimizer.

        Raises:
            TrainingFault: nothing to train, parameters that are not fp32, or a wrapping other than planned.
        """
        self._trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        _check_trainable(self._trainable)
        self._inner = module
        self._module = self.ranks.accelerator.prepare_model(module)
        wanted = DistributedDataParallel if self.ranks.world_size > 1 else type(module)
        if type(self._module) is not wanted:
            raise TrainingFault(
                "accelerate did not wrap the model as planned",
                got=type(self._module).__name__,
                allowed=wanted.__name__,
                do="report this together with the versions that `python -m trainer doctor` prints",
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
            self._scaler.load_state_dict(dict(state))

    def refresh(self) -> None:
        """Nothing: the forward pass reads the fragments themselves."""

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """The parameters as they are."""
        for name, parameter in self._trainable.items():
            yield name, parameter.detach() if self.ranks.is_first else None

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Every rank has the whole model anyway."""
        yield self.inner


def make_strategy(kind: StrategyName, ranks: Ranks, *, dtype: torch.dtype, clip_norm: float) -> Strategy:
    """The strategy named in the plan, for a group that was started.

    Args:
        kind: "single" for one process, "ddp" for several.
        ranks: the group.
        dtype: compute dtype of the forward pass, which the module sees to itself; float16 adds a loss scale here.
            Trainable parameters are fp32 whatever it is.
        clip_norm: largest global gradient norm; 0 turns clipping off.

    Raises:
        RunError: the kind does not fit the number of ranks.
    """
    if (kind == "single") != (ranks.world_size == 1):
        raise RunError(
            "the planned strategy does not fit the number of ranks",
            got=f"{kind} with {ranks.world_size} ranks",
            allowed="single with one rank, ddp with several",
            do="plan again: `python -m trainer plan` with the same overrides",
        )
    return Plain(ranks, dtype=dtype, clip_norm=clip_norm)


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
            do="use AdamW; other optimizers need their state in trainer/distributed.py",
        )
    return state


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


def _prepared(value: T | None) -> T:
    if value is None:
        raise RuntimeError("the strategy was used before prepare()")
    return value
