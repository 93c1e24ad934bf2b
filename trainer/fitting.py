"""Which layout fits: those that could be taken, fastest first, each with its estimate against what a device has.

``parallel=auto`` takes the first one that fits and says why not the ones before it; a layout that was asked for is only
refused where it cannot fit. Both happen before anything is loaded, and again after ``prepare`` if the model was not on
disk before. The order and its reasons are in ``docs/which_layout.md``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Literal

from trainer.config import Config, ParallelConfig
from trainer.console import gigabytes
from trainer.errors import Problem
from trainer.layout import Devices, adapted_layers
from trainer.memory import (
    Adapter,
    MemoryEstimate,
    ModelShape,
    Shards,
    StrategyName,
    estimate,
    lora_parameters,
    loss_chunk,
)
from trainer.memory.shape import LINEAR_NAMES
from trainer.rules.added_tokens import added_tokens
from trainer_launch.zero import Stage, ZeroSpec

ZERO_STAGES: dict[StrategyName, Stage] = {"zero1": 1, "zero2": 2, "zero3": 3}
UNSURE = 0.1
"""Share by which the estimate may be wrong: a layout that was asked for is refused where it needs more than that."""
GROUPED_SINCE = (2, 13)
"""From this torch on ``varlen_attn`` takes fewer key heads than query heads; before, keys and values are repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way of sharing the work: ``parallel`` has the settings that the ranks go by, with the strategy's name."""

    strategy: StrategyName
    parallel: ParallelConfig
    checkpointing: bool = False

    @property
    def label(self) -> str:
        """In words, and in a column of a table: ``fsdp, layers kept, checkpointing``."""
        parallel, words = self.parallel, ["one process" if self.strategy == "single" else self.strategy]
        if self.strategy == "fsdp":
            words += [] if parallel.reshard_after_forward else ["layers kept"]
            words += ["reduced each time"] if parallel.reduce_every_micro_batch else []
        words += [f"in groups of {parallel.shard_ranks}"] if parallel.shard_ranks else []
        words += [] if parallel.gather_for_generation else ["generates by layers"]
        words += ["optimizer offloaded"] if parallel.offload_optimizer else []
        words += ["weights offloaded"] if parallel.offload_parameters else []
        return ", ".join([*words, *(["checkpointing"] if self.checkpointing else [])])


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is trained on what: everything that a candidate's memory depends on besides the candidate.

    ``processes``: ranks on a machine; ``world_size``: on all; ``accumulation``: micro-batches of a rank in a step;
    ``dtype``: the compute dtype; ``room``: bytes that a rank may take, None where nobody knows; ``main_room``: bytes of
    main memory that the ranks of a machine may take together.
    """

    config: Config
    shape: ModelShape
    device: Literal["cpu", "cuda"]
    processes: int
    world_size: int
    accumulation: int
    dtype: str
    deepspeed: bool = True
    compiles: bool = True
    room: int | None = None
    main_room: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """A layout that was looked at: ``needed`` of ``room`` bytes, and why it was not taken; "": it was."""

    label: str
    needed: int
    room: int
    why_not: str


def rank_room(device: str, devices: Devices, processes: int) -> int | None:
    """Bytes that one rank has: a GPU's memory, or its part of the main memory; None where it is not known."""
    if device == "cuda":
        return devices.gpu_memory
    return None if devices.main_memory is None else devices.main_memory // processes


def planned_dtype(config: Config, device: str) -> str:
    """The compute dtype before it was decided: ``auto`` counts as bfloat16 on a GPU and float32 on a CPU."""
    if config.model.dtype != "auto":
        return config.model.dtype
    return "bfloat16" if device == "cuda" else "float32"


def candidates(config: Config, *, world_size: int, accumulation: int, device: str, deepspeed: bool) -> list[Candidate]:
    """Layouts that may be taken, fastest first.

    One process: without and with activation checkpointing. Several: replicas, then fsdp with less and less on each rank
    at the price of more traffic; all of it again with checkpointing (a third more arithmetic); on GPUs, with DeepSpeed,
    the optimizer and then the weights in main memory. A layout that was asked for is the only one.
    """
    wanted, asked = config.model.activation_checkpointing, config.parallel
    quantized = config.method.quantize is not None
    modes = [False, True] if wanted is None and asked.name == "auto" else [bool(wanted)]
    if world_size == 1:
        return [Candidate(strategy="single", parallel=asked, checkpointing=mode) for mode in modes]
    if asked.name != "auto":
        return [Candidate(strategy=asked.name, parallel=asked, checkpointing=mode) for mode in modes]
    if config.model.dtype == "float16":
        return [Candidate(strategy="ddp", parallel=replace(asked, name="ddp"), checkpointing=mode) for mode in modes]
    found = [
        Candidate(strategy=parallel.name if parallel.name != "auto" else "ddp", parallel=parallel, checkpointing=mode)
        for mode, parallel in product(modes, _shared(asked, accumulation, quantized=quantized))
    ]
    rows = config.method.name == "lora" and bool(added_tokens(config))  # refused under zero3, which compiles nothing
    if device == "cuda" and deepspeed and not quantized and not rows and config.model.compile is not True:
        found += [
            Candidate(strategy="zero3", parallel=parallel, checkpointing=modes[-1]) for parallel in _offloaded(asked)
        ]
    return found


def _shared(asked: ParallelConfig, accumulation: int, *, quantized: bool) -> Iterator[ParallelConfig]:
    yield replace(asked, name="ddp")
    if quantized:  # what fsdp cannot hold: rules/matrix.py
        return
    fsdp = replace(asked, name="fsdp")
    yield replace(fsdp, reshard_after_forward=False)
    yield fsdp
    smallest = replace(fsdp, reduce_every_micro_batch=accumulation > 1)
    if smallest != fsdp:
        yield smallest
    yield replace(smallest, gather_for_generation=False)


def _offloaded(asked: ParallelConfig) -> Iterator[ParallelConfig]:
    zero3 = replace(asked, name="zero3", offload_optimizer=True)
    yield zero3
    yield replace(zero3, offload_parameters=True)
    yield replace(zero3, offload_parameters=True, gather_for_generation=False)


def memory_of(case: Case, candidate: Candidate, *, capacity: int | None = None) -> MemoryEstimate | None:
    """Estimate a rank's memory under ``candidate``, in packs of the config's or another ``capacity``.

    None for layers that the model does not have.
    """
    config, shape = case.config, case.shape
    method, model = config.method, config.model
    layers = range(shape.layers) if method.layers is None else adapted_layers(method.layers, shape.layers)
    if layers is None:
        return None
    capacity = config.packing.tokens if capacity is None else capacity
    compiled = (
        candidate.strategy != "zero3"
        and method.quantize is None
        and (model.compile is True or (model.compile is None and case.device == "cuda" and case.compiles))
    )
    return estimate(
        shape,
        method=method.name,
        dtype=case.dtype,
        capacity=capacity,
        strategy=candidate.strategy,
        shards=shards_of(
            candidate, world_size=case.world_size, accumulation=case.accumulation, sliced=reads_slices(config)
        ),
        zero=zero_of(candidate, world_size=case.world_size, accumulation=case.accumulation),
        sliced=reads_slices(config),
        gather_for_generation=candidate.parallel.gather_for_generation,
        adapter=_adapter(config, shape, layers) if method.name == "lora" else None,
        frozen_layers=method.freeze_layers,
        frozen_embeddings=method.freeze_embeddings,
        lowest_layer=layers.start,
        checkpointing=candidate.checkpointing,
        loss_chunk=loss_chunk(candidate.strategy, case.device, capacity, shape.vocabulary),
        accumulation=case.accumulation,
        device=case.device,
        compiled=compiled,
        repeats_keys=shape.kv_heads != shape.heads and not has_grouped_attention(),
        quantized=method.quantize is not None,
        added_tokens=bool(added_tokens(config)),
    )


def _adapter(config: Config, shape: ModelShape, layers: range) -> Adapter:
    method = config.method
    count = lora_parameters(
        shape, rank=method.rank, targets=method.targets, adapted_layers=len(layers), dora=method.dora
    )
    names = LINEAR_NAMES if "all-linear" in method.targets else tuple(n for n in LINEAR_NAMES if n in method.targets)
    return Adapter(rank=method.rank, linears=frozenset(names), layers=len(layers), parameters=count)


def reads_slices(config: Config) -> bool:
    """Whether ranks of fsdp and zero3 need never have the whole base, as far as the config tells."""
    dora = config.method.name == "lora" and config.method.dora
    return not (config.method.adapter is not None or dora or config.model.trust_remote_code)


def shards_of(candidate: Candidate, *, world_size: int, accumulation: int, sliced: bool = False) -> Shards | None:
    """How fsdp divides the model; None under the other strategies. ``sliced``: see ``Shards``."""
    if candidate.strategy != "fsdp":
        return None
    parallel = candidate.parallel
    return Shards(
        ranks=parallel.shard_ranks or world_size,
        keep_layers=not parallel.reshard_after_forward,
        whole_gradients=accumulation > 1 and not parallel.reduce_every_micro_batch,
        gather_for_generation=parallel.gather_for_generation,
        offload=parallel.offload_parameters,
        sliced=sliced,
    )


def zero_of(candidate: Candidate, *, world_size: int, accumulation: int) -> ZeroSpec | None:
    """What DeepSpeed divides among the ranks; None under the other strategies."""
    stage, parallel = ZERO_STAGES.get(candidate.strategy), candidate.parallel
    if stage is None:
        return None
    return ZeroSpec(
        stage=stage,
        world_size=world_size,
        accumulation=accumulation,
        keep_whole_below=parallel.keep_whole_below if stage == 3 else 0,
        offload_optimizer=parallel.offload_optimizer,
        offload_parameters=parallel.offload_parameters,
    )


def consider(
    case: Case, candidate: Candidate, *, reserve: float, unsure: float = 0.0, capacity: int | None = None
) -> Considered | None:
    """Hold ``candidate`` against the memory less ``reserve`` (a share); None where there is no estimate or no room.

    ``unsure``: it may need so much more (a share) and is still taken.
    """
    memory = memory_of(case, candidate, capacity=capacity)
    if memory is None or case.room is None:
        return None
    room, why_not = int(case.room * (1 - reserve)), ""
    if memory.peak > room * (1 + unsure):
        why_not = "does not fit: " + largest_parts(memory)
    elif case.main_room is not None and memory.offloaded * case.processes > case.main_room * (1 - reserve):
        need, there = gigabytes(memory.offloaded * case.processes), gigabytes(int(case.main_room * (1 - reserve)))
        why_not = f"needs {need} of {there} main memory for what it offloads"
    return Considered(label=candidate.label, needed=memory.peak, room=room, why_not=why_not)


def choose(
    case: Case, options: Sequence[Candidate], *, capacity: int | None = None
) -> tuple[Candidate | None, list[Considered]]:
    """Return the first of ``options`` that fits, None where none does, and all that were looked at on the way.

    Where there is no estimate the first one is taken, and nothing was looked at. A layout that was asked for may use
    the reserve, and the doubt.
    """
    parallel = case.config.parallel
    reserve, unsure = (parallel.memory_reserve, 0.0) if parallel.name == "auto" else (0.0, UNSURE)
    seen: list[Considered] = []
    for candidate in options:
        entry = consider(case, candidate, reserve=reserve, unsure=unsure, capacity=capacity)
        if entry is None:
            return options[0], []
        seen.append(entry)
        if not entry.why_not:
            return candidate, seen
    return None, seen


def too_large(case: Case, seen: Sequence[Considered], options: Sequence[Candidate]) -> Problem:
    """Say that no layout of ``options`` fits, with the figures of the smallest, and name what would fit."""
    best = min(seen, key=lambda entry: entry.needed)
    memory = memory_of(case, next(option for option in options if option.label == best.label))
    where = "a GPU" if case.device == "cuda" else "main memory for a rank"
    there = gigabytes(case.room or 0)
    reserve = "" if case.config.parallel.name != "auto" else f" less {case.config.parallel.memory_reserve:.0%} reserve"
    return Problem(
        what="the training does not fit into the memory",
        where="parallel.name",
        got=f"{best.label}: {gigabytes(best.needed)}" + ("" if memory is None else f" ({largest_parts(memory)})"),
        allowed=f"{gigabytes(best.room)} ({where}: {there}{reserve})",
        do=" or ".join(remedies(case)) or "a smaller model, or a machine with more memory",
    )


def remedies(case: Case) -> list[str]:
    """What would fit, the least change first: another layout, shorter packs, LoRA, more ranks. At most three."""
    found: list[str] = []
    config = case.config
    automatic = replace(config, parallel=ParallelConfig(memory_reserve=config.parallel.memory_reserve))
    automatic = replace(automatic, model=replace(config.model, activation_checkpointing=None))
    if automatic != config and (taken := _first(replace(case, config=automatic))):
        found.append(f"parallel=auto, which would take {taken.label}")
    capacity = config.packing.tokens // 2
    while capacity >= 256 and not found:
        if taken := _first(replace(case, config=automatic), capacity=capacity):
            found.append(f"packing.capacity={capacity} ({taken.label})")
        capacity //= 2
    if config.method.name == "full":
        lora = replace(config.method, name="lora", freeze_layers=0, freeze_embeddings=False)
        adapted = replace(automatic, method=lora)
        if taken := _first(replace(case, config=adapted)):
            found.append(f"method=lora ({taken.label})")
    world = case.world_size * 2
    while world <= 1024 and case.device == "cuda":
        if taken := _first(replace(case, config=automatic, world_size=world)):
            found.append(f"{world} GPUs of this size ({taken.label})")
            break
        world *= 2
    return found[:3]


def _first(case: Case, *, capacity: int | None = None) -> Candidate | None:
    options = candidates(
        case.config,
        world_size=case.world_size,
        accumulation=case.accumulation,
        device=case.device,
        deepspeed=case.deepspeed,
    )
    return choose(case, options, capacity=capacity)[0]


def largest_parts(memory: MemoryEstimate) -> str:
    """The three largest components of the peak, or what else makes it: ``weights 32.1 GB, optimizer 64.2 GB, ...``."""
    if memory.peak > memory.step:
        when = "the whole model before it is cut" if memory.loading >= memory.generating else "the model in generation"
        return f"{when} {gigabytes(memory.peak)}"
    parts = sorted(components(memory), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in parts)


def components(memory: MemoryEstimate) -> list[tuple[str, int]]:
    """Name and bytes of what a step needs; of the loss and of a layer's backward pass the larger one."""
    logits, working = memory.logits, memory.working
    return [
        ("weights", memory.parameters),
        ("16-bit copies", memory.copies),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("loss", logits) if logits >= working else ("backward pass of a layer", working),
        ("communication", memory.communication),
        ("batches", memory.batches),
    ]


def has_grouped_attention() -> bool:
    """Whether the installed torch has ``varlen_attn`` with grouped heads; without torch here: it will have."""
    try:
        numbers = version("torch").split("+")[0].split(".")
    except PackageNotFoundError:
        return True
    return tuple(int(number) for number in numbers[:2]) >= GROUPED_SINCE
