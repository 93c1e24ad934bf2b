"""What a run will do, decided once and frozen: ranks and ``prepare`` read ``plan.json`` and never the config files.

Also the identity of a run: ten hex digits of everything its training depends on, and nothing else. The same command
therefore finds its run again, on another machine too, and a run is never continued with other data or settings.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from trainer import __version__
from trainer.capacity import with_capacity
from trainer.config import Config, ParallelConfig
from trainer.config.cost import CostConfig
from trainer.errors import ConfigError, RunError
from trainer.fingerprint import digest
from trainer.fitting import (
    Candidate,
    Case,
    Considered,
    candidates,
    choose,
    memory_of,
    planned_dtype,
    rank_room,
    too_large,
    zero_of,
)
from trainer.host_memory import SavingRoom, saving_room
from trainer.identity import FORMAT as FORMAT
from trainer.identity import flatten as flatten
from trainer.identity import identity_of, identity_parts
from trainer.imagined import contradictions, counted_on
from trainer.inputs import absolute_paths, data_fingerprint, input_problems, model_fingerprint, model_shape
from trainer.layout import Devices as Devices
from trainer.layout import layer_problems, plan_layout, ranks_here
from trainer.markers import STAGES
from trainer.memory import MemoryEstimate, ModelShape, StrategyName
from trainer.rules import check as check
from trainer.rules.added_tokens import added_tokens
from trainer_launch.zero import ZeroSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """``plan.json``. ``config`` is the composed and checked config with absolute paths.

    ``batch_packs`` is the global batch in packs, ``accumulation`` the micro-batches of one rank in one optimizer step:
    ``batch_packs == world_size * accumulation``. ``threads`` are CPU threads of one rank.

    ``parallel`` and ``checkpointing`` are what the ranks go by: those of the config, or what ``parallel=auto`` took
    after all of ``considered``. ``machine``: what was there. ``capacity_reason``: why ``packing.capacity=auto`` is its
    number. ``waits_for_saves``: why the training waits for its saves though ``checkpoint.asynchronous`` is on.
    """

    format: int
    identity: str
    name: str
    run_dir: str
    cache_dir: str
    config: Config
    model_fingerprint: str
    data_fingerprint: str
    nodes: int
    processes: int
    world_size: int
    device: Literal["cpu", "cuda"]
    threads: int
    strategy: StrategyName
    batch_packs: int
    accumulation: int
    code_version: str
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpointing: bool = False
    considered: list[Considered] = field(default_factory=list[Considered])
    machine: Devices | None = None
    capacity_reason: str = ""
    waits_for_saves: str = ""


def make_plan(config: Config, *, devices: Devices, cwd: Path) -> RunPlan:
    """Return the plan of ``config`` on this machine.

    Raises:
        ConfigError: with all problems: combinations of fields, missing or empty inputs, devices, batch arithmetic.
    """
    of_inputs = input_problems(config, cwd)
    shape, why = model_shape(config, cwd), ""
    devices = devices if (unlike := contradictions(config, devices)) else counted_on(config, devices)
    if config.packing.capacity == "auto":
        if of_inputs or unlike:
            raise ConfigError.of([*of_inputs, *unlike])
        config, why = with_capacity(config, _case_before(config, shape, devices), shape)
    problems = check(config) + of_inputs + unlike
    problems += layer_problems(config, shape)
    layout = plan_layout(config, devices, problems)
    if problems:
        raise ConfigError.of(list(dict.fromkeys(problems)))
    located = absolute_paths(config, cwd)
    of_model, of_data = model_fingerprint(located, cwd), data_fingerprint(located, cwd)
    identity = identity_of(located, of_model, of_data)
    folder = Path(located.run.root) / located.run.name / identity if located.run.dir is None else Path(located.run.dir)
    plan = RunPlan(
        format=FORMAT,
        identity=identity,
        name=located.run.name,
        run_dir=str(folder),
        cache_dir=located.run.cache,
        config=located,
        model_fingerprint=of_model,
        data_fingerprint=of_data,
        nodes=layout.nodes,
        processes=layout.processes,
        world_size=layout.nodes * layout.processes,
        device=layout.device,
        threads=layout.threads,
        strategy=layout.strategy,
        batch_packs=layout.batch_packs,
        accumulation=layout.accumulation,
        code_version=__version__,
        parallel=config.parallel,
        checkpointing=config.model.activation_checkpointing is True,
        machine=devices,
        capacity_reason=why,
    )
    return fitted(plan, shape)


def fitted(plan: RunPlan, shape: ModelShape | None, dtype: str | None = None) -> RunPlan:
    """Return ``plan`` with a layout that fits into the memory for a model of this ``shape``, in the compute ``dtype``.

    As it is where sizes or memory are not known.

    Raises:
        ConfigError: nothing fits; with the figures, and what would.
    """
    if shape is None or plan.machine is None:
        return plan
    case = _case(plan, shape, dtype)
    options = candidates(
        plan.config,
        world_size=plan.world_size,
        accumulation=plan.accumulation,
        device=plan.device,
        deepspeed=plan.machine.deepspeed,
    )
    taken, seen = choose(case, options)
    if taken is None:
        raise ConfigError.of([too_large(case, seen, options)])
    plan = replace(
        plan, strategy=taken.strategy, parallel=taken.parallel, checkpointing=taken.checkpointing, considered=seen
    )
    memory = memory_of(case, taken)
    if memory is None or not plan.config.checkpoint.asynchronous:
        return plan
    return replace(plan, waits_for_saves=room_for_saves(plan, memory).why_not)


def room_for_saves(plan: RunPlan, memory: MemoryEstimate) -> SavingRoom:
    """Return what saves behind the training need in main memory, with ``memory`` for a rank."""
    return saving_room(
        memory,
        plan.strategy,
        device=plan.device,
        processes=plan.processes,
        owners=(plan.parallel.shard_ranks if plan.strategy == "fsdp" else None) or plan.world_size,
        main_memory=None if plan.machine is None else plan.machine.main_memory,
    )


def _case(plan: RunPlan, shape: ModelShape, dtype: str | None) -> Case:
    machine = plan.machine or Devices(gpus=0, cores=1)
    return Case(
        config=plan.config,
        shape=shape,
        device=plan.device,
        processes=plan.processes,
        world_size=plan.world_size,
        accumulation=plan.accumulation,
        dtype=planned_dtype(plan.config, plan.device) if dtype in (None, "auto") else dtype,
        deepspeed=machine.deepspeed,
        compiles=machine.compiles,
        room=rank_room(plan.device, machine, plan.processes),
        main_room=machine.main_memory,
    )


def _case_before(config: Config, shape: ModelShape | None, devices: Devices) -> Case | None:
    """What packs are chosen for, before there is a batch in packs."""
    if shape is None:
        return None
    device, processes = ranks_here(config, devices)
    return Case(
        config=config,
        shape=shape,
        device=device,
        processes=processes,
        world_size=(config.launch.nodes or 1) * processes,
        accumulation=1,
        dtype=planned_dtype(config, device),
        deepspeed=devices.deepspeed,
        compiles=devices.compiles,
        room=rank_room(device, devices, processes),
        main_room=devices.main_memory,
    )


def zero_spec(plan: RunPlan) -> ZeroSpec | None:
    """Return what DeepSpeed divides among the ranks; None under the other strategies."""
    return zero_of(layout_of(plan), world_size=plan.world_size, accumulation=plan.accumulation)


def layout_of(plan: RunPlan) -> Candidate:
    """The layout that the ranks of ``plan`` have."""
    return Candidate(strategy=plan.strategy, parallel=plan.parallel, checkpointing=plan.checkpointing)


# ---- memory


def estimate_memory(plan: RunPlan, dtype: str | None = None) -> MemoryEstimate | None:
    """Estimate one rank's memory; None (unknown) for a model that is not on disk or not Llama-like.

    ``dtype`` is the resolved compute dtype; without it ``auto`` counts as bfloat16 on a GPU and float32 on a CPU.
    """
    shape = model_shape(plan.config, Path(plan.run_dir))
    return None if shape is None else memory_of(_case(plan, shape, dtype), layout_of(plan))


# ---- identity


def flat_identity(plan: RunPlan) -> dict[str, Any]:
    """Return everything that the result of a run's training depends on, by its dotted name: ``optim.lr``."""
    return flatten(identity_parts(plan.config, plan.model_fingerprint, plan.data_fingerprint))


def identity_diff(old: RunPlan, new: RunPlan) -> list[str]:
    """Return what makes two runs different, one line each: ``optim.lr: 0.002 -> 0.001``; empty: nothing does."""
    before, after = flat_identity(old), flat_identity(new)
    names = [*before, *(name for name in after if name not in before)]
    return [
        f"{name}: {_short(before.get(name))} -> {_short(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _short(value: object) -> str:
    """Shorten digests; they only say that something differs."""
    text = "null" if value is None else str(value)
    return f"{text[:10]}..." if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def stage_inputs(plan: RunPlan, stage: str) -> str:
    """Return the digest of everything that ``stage`` depends on; a marker with the same one makes it skip.

    Raises:
        ValueError: there is no such stage.
    """
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}; stages are {', '.join(STAGES)}")
    config = plan.config
    prepare: list[object] = [
        FORMAT,
        plan.model_fingerprint,
        plan.data_fingerprint,
        config.model.dtype,
        config.model.trust_remote_code,
        plan.device,
        config.data,
        config.task,
        config.packing,
        config.method.name if config.packing.cost == "time" else "",
        config.run.seed,
        *added_tokens(config).items(),
    ]
    trained = [plan.identity]
    parts: dict[str, list[object]] = {
        "prepare": prepare,
        "baseline": [*prepare, config.eval.baselines, config.eval.batch_tokens],
        "train": [*trained],
        "evaluate": [*trained, *prepare, config.eval],
        "export": [*trained, config.export],
        "verify": [*trained, config.export, "verify"],
        "card": [*trained, *prepare, config.eval, config.export, config.run.name, *_not_default(config.cost)],
    }
    return digest(parts[stage])


def _not_default(cost: CostConfig) -> list[object]:
    """Factors that are given; none for the runs of before there were any, whose cards stay as they are."""
    return [] if cost == CostConfig() else [cost]


# ---- plan.json


def dump_plan(plan: RunPlan) -> bytes:
    """Return ``plan.json``."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n"


def load_plan(raw: bytes) -> RunPlan:
    """Read ``plan.json``.

    Raises:
        RunError: it is damaged, or was written in another format.
    """
    try:
        plan_format = msgspec.json.decode(raw, type=_Format).format
        if plan_format != FORMAT:
            raise RunError(
                "this run was made by another version of the format",
                where="plan.json",
                got=f"format {plan_format}",
                allowed=f"format {FORMAT}",
                do="use the version of trimtab that made it, or start a new run",
            )
        return msgspec.json.decode(raw, type=RunPlan)
    except msgspec.DecodeError as error:
        raise RunError(
            "the plan cannot be read",
            where="plan.json",
            got=error,
            allowed="the file as it was written",
            do="start the run again with the same command; finished stages are kept",
        ) from error


class _Format(msgspec.Struct):
    format: int
