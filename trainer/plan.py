"""What a run will do, decided once and frozen: ranks and ``prepare`` read ``plan.json`` and never the config files.

Also the identity of a run: ten hex digits of everything its training depends on, and nothing else. The same command
therefore finds its run again, on another machine too, and a run is never continued with other data or settings.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from trainer import __version__
from trainer.config import Config
from trainer.errors import ConfigError, RunError
from trainer.fingerprint import digest
from trainer.inputs import absolute_paths, data_fingerprint, input_problems, model_fingerprint, model_shape
from trainer.layout import Devices as Devices
from trainer.layout import adapted_layers, batch_packs, layer_problems, plan_layout
from trainer.markers import STAGES
from trainer.memory import MemoryEstimate, Shards, StrategyName, estimate, lora_parameters, loss_chunk
from trainer.rules import check as check
from trainer_launch.zero import Stage, ZeroSpec

FORMAT = 1
ZERO_STAGES: dict[StrategyName, Stage] = {"zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """``plan.json``. ``config`` is the composed and checked config with absolute paths.

    ``batch_packs`` is the global batch in packs, ``accumulation`` the micro-batches of one rank in one optimizer step:
    ``batch_packs == world_size * accumulation``. ``threads`` are CPU threads of one rank.
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


def make_plan(config: Config, *, devices: Devices, cwd: Path) -> RunPlan:
    """Return the plan of ``config`` on this machine.

    Raises:
        ConfigError: with all problems: combinations of fields, missing or empty inputs, devices, batch arithmetic.
    """
    problems = check(config)
    problems += input_problems(config, cwd)
    problems += layer_problems(config, model_shape(config, cwd))
    layout = plan_layout(config, devices, problems)
    if problems:
        raise ConfigError.of(list(dict.fromkeys(problems)))
    located = absolute_paths(config, cwd)
    of_model, of_data = model_fingerprint(located, cwd), data_fingerprint(located, cwd)
    identity = identity_of(located, of_model, of_data)
    folder = Path(located.run.root) / located.run.name / identity if located.run.dir is None else Path(located.run.dir)
    return RunPlan(
        format=FORMAT,
        identity=identity,
        name=located.run.name,
        run_dir=str(folder),
        cache_dir=located.run.cache,
        config=located,
        model_fingerprint=of_model,
        data_fingerprint=of_data,
        nodes=1,
        processes=layout.processes,
        world_size=layout.processes,
        device=layout.device,
        threads=layout.threads,
        strategy=layout.strategy,
        batch_packs=layout.batch_packs,
        accumulation=layout.accumulation,
        code_version=__version__,
    )


def zero_spec(plan: RunPlan) -> ZeroSpec | None:
    """Return what DeepSpeed divides among the ranks; None under the other strategies."""
    stage = ZERO_STAGES.get(plan.strategy)
    if stage is None:
        return None
    parallel = plan.config.parallel
    return ZeroSpec(
        stage=stage,
        world_size=plan.world_size,
        accumulation=plan.accumulation,
        keep_whole_below=parallel.keep_whole_below if stage == 3 else 0,
        offload_optimizer=parallel.offload_optimizer,
        offload_parameters=parallel.offload_parameters,
    )


# ---- memory


def estimate_memory(plan: RunPlan, dtype: str | None = None) -> MemoryEstimate | None:
    """Estimate one rank's memory; None (unknown) for a model that is not on disk or not Llama-like.

    ``dtype`` is the resolved compute dtype; without it ``auto`` counts as bfloat16 on a GPU and float32 on a CPU.
    """
    config = plan.config
    method, shape = config.method, model_shape(plan.config, Path(plan.run_dir))
    if shape is None:
        return None
    if dtype is None:
        dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if plan.device == "cuda" else "float32"
    layers = range(shape.layers) if method.layers is None else adapted_layers(method.layers, shape.layers)
    if layers is None:
        return None
    adapter = lora_parameters(
        shape, rank=method.rank, targets=method.targets, adapted_layers=len(layers), dora=method.dora
    )
    frozen = method.freeze_layers * shape.layer_parameters
    frozen += shape.embedding_parameters if method.freeze_embeddings else 0
    return estimate(
        shape,
        method=method.name,
        dtype=dtype,
        capacity=config.packing.capacity,
        strategy=plan.strategy,
        shards=_shards(plan),
        zero=zero_spec(plan),
        gather_for_generation=config.parallel.gather_for_generation,
        adapter_parameters=adapter if method.name == "lora" else 0,
        frozen_parameters=frozen,
        quantized=method.quantize is not None,
        traversed_layers=shape.layers - layers.start if method.name == "lora" else None,
        checkpointing=config.model.activation_checkpointing,
        loss_chunk=loss_chunk(plan.strategy, plan.device, config.packing.capacity, shape.vocabulary),
    )


def _shards(plan: RunPlan) -> Shards | None:
    """Return how fsdp divides the model; None under the other strategies."""
    if plan.strategy != "fsdp":
        return None
    parallel = plan.config.parallel
    return Shards(
        ranks=parallel.shard_ranks or plan.world_size,
        keep_layers=not parallel.reshard_after_forward,
        whole_gradients=plan.accumulation > 1 and not parallel.reduce_every_micro_batch,
        gather_for_generation=parallel.gather_for_generation,
        offload=parallel.offload_parameters,
        sliced=reads_slices(plan.config),
    )


def reads_slices(config: Config) -> bool:
    """Whether ranks of fsdp can read their own rows of the base, as far as the config tells."""
    dora = config.method.name == "lora" and config.method.dora
    return not (config.method.adapter is not None or dora or config.model.trust_remote_code)


# ---- identity


def identity_parts(config: Config, of_model: str, of_data: str) -> dict[str, Any]:
    """Return everything that the result of training depends on, as plain values.

    Left out on purpose: where and how it runs (parallel, launch, ``model.activation_checkpointing``,
    ``model.compile``, cache and run folder), what happens afterwards (export, baselines, ``eval.max_loss``,
    ``data.max_test_rows``, result slices), what only guards it (guard, checkpoint, ``data.max_dropped_share``), and the
    code. Kept of ``eval`` is what chooses the best checkpoint or ends training early: another ``eval.metric`` or
    ``eval.patience`` is another result.
    Fields that have no effect beside others are left out as well, so that they cannot split one run in two.
    """
    sections = cast("dict[str, dict[str, Any]]", asdict(config))
    model, data, method, optim = sections["model"], sections["data"], sections["method"], sections["optim"]
    dropped = [
        "train",
        "validation",
        "test",
        "mixture",
        "revision",
        "slice_columns",
        "max_test_rows",
        "max_dropped_share",
    ]
    if config.data.over_long != "split":
        dropped.append("split_overlap")
    lora = config.method.name == "lora"
    silent = [
        "adapter",
        *(["quantize"] if config.method.quantize is None else []),
    ]  # null: the runs of before there was it
    of_method = [name for name in method if name not in silent and name.startswith("freeze_") != lora]
    return {
        "format": FORMAT,
        "model": {"content": of_model, "dtype": model["dtype"], "trust_remote_code": model["trust_remote_code"]},
        "data": {"content": of_data, **{name: value for name, value in data.items() if name not in dropped}},
        "task": {"name": config.task.name, "labels": config.task.labels},
        "method": {name: method[name] for name in of_method},
        "optim": {
            **{name: value for name, value in optim.items() if name not in ("batch_packs", "batch_tokens")},
            "batch_packs": batch_packs(config),
        },
        "packing": sections["packing"],
        "eval": _selection(config),
        "run": {"seed": config.run.seed},
    }


def _selection(config: Config) -> dict[str, Any]:
    """Return what chooses the best checkpoint and the end of training."""
    evaluation = config.eval
    parts: dict[str, Any] = {"every": evaluation.every, "metric": evaluation.metric}
    if evaluation.patience is not None:
        parts |= {"patience": evaluation.patience}
    if evaluation.min_improvement:
        parts |= {"min_improvement": evaluation.min_improvement}
    if evaluation.metric != "loss":
        parts |= {"generate_rows": evaluation.generate_rows, "max_new_tokens": config.task.max_new_tokens}
    return parts


def identity_of(config: Config, of_model: str, of_data: str) -> str:
    """Return the first ten hex digits of the digest of ``identity_parts``."""
    return digest(identity_parts(config, of_model, of_data))[:10]


def flat_identity(plan: RunPlan) -> dict[str, Any]:
    """Return everything that the result of a run's training depends on, by its dotted name: ``optim.lr``."""
    return _flat(identity_parts(plan.config, plan.model_fingerprint, plan.data_fingerprint))


def identity_diff(old: RunPlan, new: RunPlan) -> list[str]:
    """Return what makes two runs different, one line each: ``optim.lr: 0.002 -> 0.001``; empty: nothing does."""
    before, after = flat_identity(old), flat_identity(new)
    names = [*before, *(name for name in after if name not in before)]
    return [
        f"{name}: {_short(before.get(name))} -> {_short(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _flat(parts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in parts.items():
        if isinstance(value, dict) and name != "columns":
            flat |= _flat(cast("dict[str, Any]", value), f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


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
    ]
    trained = [plan.identity]
    parts: dict[str, list[object]] = {
        "prepare": prepare,
        "baseline": [*prepare, config.eval.baselines, config.eval.batch_tokens],
        "train": [*trained],
        "evaluate": [*trained, *prepare, config.eval],
        "export": [*trained, config.export],
        "verify": [*trained, config.export, "verify"],
        "card": [*trained, *prepare, config.eval, config.export, config.run.name],
    }
    return digest(parts[stage])


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
