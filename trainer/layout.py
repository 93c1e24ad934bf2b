"""Devices, ranks and the arithmetic of the global batch: what must divide, and which numbers would.

The user sets the global batch; how many micro-batches a rank takes follows from the ranks. A remainder is an error and
never rounded away, so that the same config is the same training on any number of GPUs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trainer.config import Config
from trainer.errors import Problem
from trainer.memory import ModelShape, StrategyName

DEFAULT_BATCH_PACKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What this machine has: visible GPUs, CPU cores, and whether DeepSpeed is installed.

    ``gpu_memory``: bytes of the smallest GPU; ``main_memory``: of this machine; None: nobody knows. ``compiles``:
    layers can be compiled on GPUs here.
    """

    gpus: int
    cores: int
    deepspeed: bool = True
    gpu_memory: int | None = None
    main_memory: int | None = None
    compiles: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the ranks run and how a batch is divided among them."""

    device: Literal["cpu", "cuda"]
    nodes: int
    processes: int
    threads: int
    strategy: StrategyName
    batch_packs: int
    accumulation: int


def ranks_here(config: Config, devices: Devices) -> tuple[Literal["cpu", "cuda"], int]:
    """Return where the ranks compute, and how many there are on a machine."""
    launch = config.launch
    device = launch.device if launch.device != "auto" else "cuda" if devices.gpus else "cpu"
    return device, launch.processes or (max(devices.gpus, 1) if device == "cuda" else 1)


def plan_layout(config: Config, devices: Devices, problems: list[Problem]) -> Layout:
    """Return device, ranks and batch; what does not work out goes to ``problems``, and the layout is then no use."""
    launch = config.launch
    device, processes = ranks_here(config, devices)
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
    nodes = launch.nodes or 1
    world = nodes * processes
    if config.parallel.name != "auto" and world == 1:
        problems.append(
            Problem(
                what="needs at least two ranks",
                where="parallel.name",
                got=f"{config.parallel.name} with 1 rank",
                allowed="launch.processes of 2 or more",
                do="launch.processes=2, or parallel=auto",
            )
        )
    if config.parallel.name.startswith("zero"):
        problems.extend(_zero_problems(config, device, devices))
    packs = batch_packs(config)
    if packs % world:
        problems.append(_remainder(config, packs, nodes, processes))
    return Layout(
        device=device,
        nodes=nodes,
        processes=processes,
        threads=launch.threads or max(1, devices.cores // processes),
        strategy=_strategy(config, world),
        batch_packs=packs,
        accumulation=max(1, packs // world),
    )


def _zero_problems(config: Config, device: str, devices: Devices) -> Iterator[Problem]:
    """Yield what this machine lacks for DeepSpeed, and what there is nowhere to move to."""
    parallel = config.parallel
    if not devices.deepspeed:
        yield Problem(
            what="needs DeepSpeed, which is not installed",
            where="parallel.name",
            got=parallel.name,
            allowed="auto, ddp, fsdp",
            do="pip install -c constraints.txt -e '.[deepspeed]', or parallel=fsdp",
        )
    offloaded = {"offload_optimizer": parallel.offload_optimizer, "offload_parameters": parallel.offload_parameters}
    for name, wanted in offloaded.items():
        if device == "cpu" and wanted:
            yield Problem(
                what="has nowhere to go: on CPUs everything is in main memory already",
                where=f"parallel.{name}",
                got="true with launch.device=cpu",
                allowed="false",
                do="remove it, or compute on GPUs",
            )


def _strategy(config: Config, world: int) -> StrategyName:
    """Return what the ranks do: as configured; where the choice is left open, DDP until memory says otherwise."""
    if world == 1:
        return "single"
    return "ddp" if config.parallel.name == "auto" else config.parallel.name


def batch_packs(config: Config) -> int:
    """Return the global batch in packs, whichever way it was given; 8 when it was not."""
    optim = config.optim
    if optim.batch_packs is not None:
        return optim.batch_packs
    if optim.batch_tokens is not None:
        return max(1, optim.batch_tokens // config.packing.tokens)
    return DEFAULT_BATCH_PACKS


def _remainder(config: Config, packs: int, nodes: int, processes: int) -> Problem:
    """Explain a global batch that does not divide among the ranks, with the numbers that would."""
    world = nodes * processes
    below, above = packs // world * world, -(-packs // world) * world
    fitting = [number for number in (below, above) if number]
    in_tokens = config.optim.batch_tokens is not None
    key, unit = ("batch_tokens", config.packing.tokens) if in_tokens else ("batch_packs", 1)
    fewer = [number for number in range(processes - 1, 0, -1) if packs % (nodes * number) == 0]
    return Problem(
        what="the global batch does not divide among the ranks",
        where=f"optim.{key}",
        got=f"{packs} packs for {world} ranks" + (f" ({nodes} machines)" if nodes > 1 else ""),
        allowed=f"a multiple of {world * unit}",
        do=" or ".join(f"optim.{key}={number * unit}" for number in fitting)
        + "".join(f", or launch.processes={number}" for number in fewer[:1]),
    )


def layer_problems(config: Config, shape: ModelShape | None) -> list[Problem]:
    """Return what is wrong with layer numbers; nothing where the number of layers is not known yet."""
    if shape is None:
        return []
    problems: list[Problem] = []
    if config.method.freeze_layers > shape.layers:
        problems.append(
            Problem(
                what="more layers than the model has",
                where="method.freeze_layers",
                got=str(config.method.freeze_layers),
                allowed=f"0 to {shape.layers}",
                do="lower it",
            )
        )
    if config.method.layers is not None and adapted_layers(config.method.layers, shape.layers) is None:
        problems.append(
            Problem(
                what="are no layers of this model",
                where="method.layers",
                got=config.method.layers,
                allowed=f"layers 0 to {shape.layers - 1}, for example '{shape.layers // 2}:'",
                do="choose from these, or null for all",
            )
        )
    return problems


def adapted_layers(text: str, count: int) -> range | None:
    """Return the layers that ``15:``, ``:8``, ``4:12`` or ``-10:`` name; None when one is outside, or there is none."""
    parts = [part.strip() for part in text.split(":")]
    if len(parts) != 2 or not all(re.fullmatch(r"(-?\d+)?", part) for part in parts):
        return None
    start, stop = (int(part) if part else default for part, default in zip(parts, (0, count), strict=True))
    start, stop = (number + count if number < 0 else number for number in (start, stop))
    return range(start, stop) if 0 <= start < stop <= count else None
