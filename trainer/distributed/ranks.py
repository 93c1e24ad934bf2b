"""The group of processes of a run: who this one is, how they meet, and what they can agree on.

After the start, world size, device and kind of group are compared with the plan: launchers fall back silently
(``accelerate launch --cpu --num_processes 2`` starts one process), this module does not.

Of all that computes, this module alone reads the environment: the variables that torchrun, ``accelerate launch`` and
``trainer_launch`` all set (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from trainer.distributed.preflight import (
    MEET_SECONDS,
    check_sum,
    meet,
    meeting_point,
    no_longer_than,
    require_same_code,
)
from trainer.errors import RunError, TrainingFault
from trainer.fingerprint import code_digest

T = TypeVar("T")

GROUP_TIMEOUT = timedelta(minutes=30)
"""A rank that waits longer than this for the others gives up; publishing a large checkpoint has to fit in."""

RECORDED_COLLECTIVES = 2000
"""The last collectives of a rank that NCCL's flight recorder remembers."""

ENVIRONMENT = os.environ  # noqa: TID251


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

    def aside(self) -> "Aside":
        """A second channel between the same ranks; called by all of them."""
        group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT) if self.world_size > 1 else None
        return Aside(self.rank, self.world_size, cast(dist.ProcessGroup | None, group))

    def close(self) -> None:
        """Leave the group; call it last."""
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Aside:
    """A channel for one thread beside the training: what it agrees on never mixes with the loop's collectives."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None

    def gather(self, value: T) -> list[T]:
        """As ``Ranks.gather``."""
        if self.group is None:
            return [value]
        gathered: list[T] = [value] * self.world_size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered


def nccl_variables(traces: Path | None) -> dict[str, str]:
    """Environment of a rank on GPUs: a hang ends it, and NCCL's flight recorder says which collective it was.

    ``traces``: folder of the recorder's files, one per rank, written when the group's timeout has run out. What the
    user has set stays.
    """
    # torch renamed some of them; it reads either name.
    variables = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_ENABLE_MONITORING": "1",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": str(RECORDED_COLLECTIVES),
        "TORCH_FR_BUFFER_SIZE": str(RECORDED_COLLECTIVES),
    }
    if traces is not None:
        prefix = str(traces / "nccl_trace_rank")  # followed by the number of the rank
        variables |= {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix, "TORCH_FR_DUMP_TEMP_FILE": prefix}
    return variables


def start_ranks(
    *,
    device: Literal["cpu", "cuda"],
    world_size: int,
    threads: int | None = None,
    meet_seconds: float = MEET_SECONDS,
    traces: Path | None = None,
) -> Ranks:
    """Join the group of ranks, and check that it is the one that was planned.

    Args:
        device: where every rank computes; on CUDA, rank ``LOCAL_RANK`` takes the GPU of that number.
        world_size: ranks of the plan.
        threads: CPU threads of this rank; None leaves them alone.
        meet_seconds: how long to wait for ranks that are missing, and again for a first sum over all of them.
        traces: where NCCL's flight recorder writes.

    Raises:
        RunError: started with another number of processes, the device is not there, ranks are missing (named) or have
            other code.
        TrainingFault: the ranks cannot compute together.
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
            for name, value in nccl_variables(traces).items():
                ENVIRONMENT.setdefault(name, value)
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        store = meet(meeting_point(ENVIRONMENT), launched.rank, world_size, seconds=meet_seconds)
        with no_longer_than(meet_seconds, launched.rank):
            dist.init_process_group(
                backend, store=store, rank=launched.rank, world_size=world_size, timeout=GROUP_TIMEOUT
            )
            check_sum(
                launched.rank, world_size, torch.device(device, launched.local_rank) if device == "cuda" else None
            )
    ranks = Ranks(_accelerator(device))
    _check_group(ranks, device, world_size)
    if world_size > 1:
        require_same_code(ranks.gather((socket.gethostname(), code_digest(), torch.__version__)))
    return ranks


def choose_accelerator(device: torch.device) -> None:
    """Tell DeepSpeed where to compute, before it is imported: by itself it takes a GPU wherever it sees one."""
    ENVIRONMENT["DS_ACCELERATOR"] = device.type


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
