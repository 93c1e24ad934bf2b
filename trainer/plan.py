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
from trainer.errors import ConfigError, Problem, RunError
from trainer.fingerprint import digest
from trainer.inputs import absolute_paths, data_fingerprint, input_problems, model_fingerprint
from trainer.markers import STAGES
from trainer.rules import check as check

FORMAT = 1
DEFAULT_BATCH_PACKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What this machine has: visible GPUs and CPU cores."""

    gpus: int
    cores: int


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
    strategy: Literal["single", "ddp"]
    batch_packs: int
    accumulation: int
    code_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the ranks run and how a batch is divided among them."""

    device: Literal["cpu", "cuda"]
    processes: int
    threads: int
    strategy: Literal["single", "ddp"]
    batch_packs: int
    accumulation: int


def make_plan(config: Config, *, devices: Devices, cwd: Path) -> RunPlan:
    """Return the plan of ``config`` on this machine.

    Raises:
        ConfigError: with all problems: combinations of fields, missing or empty inputs, devices, batch arithmetic.
    """
    problems = check(config)
    problems += input_problems(config, cwd)
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


# ---- devices and batch


def plan_layout(config: Config, devices: Devices, problems: list[Problem]) -> Layout:
    """Return device, ranks and batch; what does not work out goes to ``problems``, and the layout is then no use."""
    launch = config.launch
    device = launch.device if launch.device != "auto" else "cuda" if devices.gpus else "cpu"
    processes = launch.processes or (max(devices.gpus, 1) if device == "cuda" else 1)
    if device == "cuda" and processes > devices.gpus:
        problems.append(
            Problem(
                what="more ranks than GPUs",
                where="launch.device" if devices.gpus == 0 else "launch.processes",
                got=f"{processes} with {devices.gpus} visible",
                allowed=f"1 to {devices.gpus}" if devices.gpus else "launch.device=cpu: no GPU is visible here",
                do=f"launch.processes={devices.gpus}" if devices.gpus else "launch.device=cpu, or check the driver",
            )
        )
    if device == "cpu" and config.model.dtype == "float16":
        problems.append(
            Problem(
                what="float16 is not computed on CPUs",
                where="model.dtype",
                got="float16 with launch.device=cpu",
                allowed="auto, bfloat16, float32",
                do="model.dtype=auto",
            )
        )
    if config.parallel.name == "ddp" and processes == 1:
        problems.append(
            Problem(
                what="needs at least two ranks",
                where="parallel.name",
                got="ddp with 1 rank",
                allowed="launch.processes of 2 or more",
                do="launch.processes=2, or parallel=auto",
            )
        )
    packs = batch_packs(config)
    if packs % processes:
        problems.append(_remainder(config, packs, processes))
    return Layout(
        device=device,
        processes=processes,
        threads=launch.threads or max(1, devices.cores // processes),
        strategy="ddp" if processes > 1 else "single",
        batch_packs=packs,
        accumulation=max(1, packs // processes),
    )


def batch_packs(config: Config) -> int:
    """Return the global batch in packs, whichever way it was given; 8 when it was not."""
    optim = config.optim
    if optim.batch_packs is not None:
        return optim.batch_packs
    if optim.batch_tokens is not None:
        return max(1, optim.batch_tokens // config.packing.capacity)
    return DEFAULT_BATCH_PACKS


def _remainder(config: Config, packs: int, world: int) -> Problem:
    """Explain a global batch that does not divide among the ranks, with the numbers that would."""
    below, above = packs // world * world, -(-packs // world) * world
    fitting = [number for number in (below, above) if number]
    in_tokens = config.optim.batch_tokens is not None
    key, unit = ("batch_tokens", config.packing.capacity) if in_tokens else ("batch_packs", 1)
    ranks = [number for number in range(world - 1, 0, -1) if packs % number == 0]
    return Problem(
        what="the global batch does not divide among the ranks",
        where=f"optim.{key}",
        got=f"{packs} packs for {world} ranks",
        allowed=f"a multiple of {world * unit}",
        do=" or ".join(f"optim.{key}={number * unit}" for number in fitting) + f", or launch.processes={ranks[0]}",
    )


# ---- identity


def identity_parts(config: Config, of_model: str, of_data: str) -> dict[str, Any]:
    """Return everything that the result of training depends on, as plain values.

    Left out on purpose: where and how it runs (parallel, launch, ``model.activation_checkpointing``, cache and run
    folder), what happens afterwards (export, baselines, ``eval.max_loss``, ``data.max_test_rows``, result slices),
    what only guards it (guard, checkpoint, ``data.max_dropped_share``), and the code. Kept of ``eval`` is what chooses
    the best checkpoint or ends training early: another ``eval.metric`` or ``eval.patience`` is another result.
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
    of_method = [name for name in method if name != "adapter" and name.startswith("freeze_") != lora]
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


def identity_diff(old: RunPlan, new: RunPlan) -> list[str]:
    """Return what makes two runs different, one line each: ``optim.lr: 0.002 -> 0.001``; empty: nothing does."""
    before = _flat(identity_parts(old.config, old.model_fingerprint, old.data_fingerprint))
    after = _flat(identity_parts(new.config, new.model_fingerprint, new.data_fingerprint))
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
        config.packing.capacity,
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
