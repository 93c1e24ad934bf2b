"""Loading without a copy of the model per rank: fsdp reads its own rows from the files, zero3 a parameter at a time.

Modules are made without numbers, adapters are put on, everything is cut, and then the rows are read. The self-check and
the baseline come after that, on the shards, with a layer gathered at a time; what is trained is the same bit by bit as
when every rank loads the whole base first. Where that cannot be done, the reason is printed.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from trainer.distributed.fsdp import FullySharded
from trainer.distributed.strategy import Strategy
from trainer.distributed.zero import DividedWeights
from trainer.model.adapters import added_rows
from trainer.model.device import peak_memory_gb
from trainer.model.load import settle
from trainer.model.loss import PackedLoss
from trainer.model.slices import (
    StoredTensor,
    parameter_names,
    plan_slices,
    slice_reader,
    standing_in,
    stored_tensors,
    without_numbers,
)
from trainer.rank.job import Job
from trainer.rank.model import check_model, planned_strategy, trained_loss


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A base without numbers, and where they are by the name of the parameter."""

    model: nn.Module
    places: dict[str, StoredTensor]


def skeleton(job: Job) -> Skeleton | None:
    """The base without numbers; None where the ranks have to load all of it."""
    if job.plan.strategy not in ("fsdp", "zero3"):
        return None
    found = _skeleton(job)
    if isinstance(found, Skeleton):
        return found
    job.say(f"every rank loads the whole base before it is cut: {found}")
    return None


def sharded_loss(job: Job, base: Skeleton) -> tuple[PackedLoss, Strategy]:
    """What is trained, cut among the ranks and read, and checked on the spot."""
    names = parameter_names(base.model)
    with standing_in(base.model):
        loss = trained_loss(job, base.model, "head")
    fill_added_rows(loss.model, base.places)
    strategy = cast(FullySharded | DividedWeights, planned_strategy(job, loss, slice_reader(loss, names, base.places)))
    with strategy.gathered(layers=False):
        loss.logits_via = check_model(job, loss.model)
    return loss, cast(Strategy, strategy)


def fill_added_rows(model: nn.Module, places: Mapping[str, StoredTensor]) -> None:
    """Give the rows of added tokens their first values: peft copied them from a base without numbers.

    ``places``: of the base's matrices by name.
    """
    for name, (rows, ids) in added_rows(model).items():
        width = rows.shape[1]
        with torch.no_grad():
            for row, token in zip(rows, ids, strict=True):
                row.copy_(places[name].read(token * width, width, row.dtype))


@contextmanager
def loading(job: Job, done: str = "loaded") -> Iterator[None]:
    """Around the loading of the base, or another part of it: say how long it took, and what at most on one rank."""
    start = time.monotonic()
    yield
    peaks = job.ranks.gather(peak_memory_gb(job.ranks.device))
    job.say(f"{done} in {time.monotonic() - start:.1f} s, at most {max(peaks):.2f} GB on a rank so far")


def say_peaks(job: Job) -> None:
    """Say what the run took at most so far on rank 0, which puts an export together, and on the others."""
    first, *others = job.ranks.gather(peak_memory_gb(job.ranks.device))
    beside = f", {max(others):.2f} GB on another" if others else ""
    job.say(f"at most {first:.2f} GB on rank 0 so far{beside}")


def _skeleton(job: Job) -> Skeleton | str:
    config, directory = job.plan.config, Path(job.prepared.base.directory)
    if config.method.adapter is not None:
        return "it continues an adapter"
    if config.method.name == "lora" and config.method.dora:
        return "DoRA needs the norms of its weights"
    if config.model.trust_remote_code:
        return "it brings code of its own"
    weights = torch.float32 if config.method.name == "full" else job.compute_dtype
    job.say(f"reading {job.prepared.base.name} in slices: weights {weights}, computing in {job.prepared.dtype}")
    model = without_numbers(directory, weights)
    if model is None:
        return "it has buffers that are in no file"
    settle(model)
    places = plan_slices(model, stored_tensors(directory))
    return places if isinstance(places, str) else Skeleton(cast(nn.Module, model), places)
