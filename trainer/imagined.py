"""GPUs that a plan may count on although this machine does not have them: ``launch.gpu_memory_gb=80``.

A laptop can then say what would be done on eight large GPUs. A run cannot be had that way: everything but the verb
``plan`` refuses a statement that contradicts the devices that are there.
"""

from dataclasses import replace

from trainer.config import Config
from trainer.errors import Problem
from trainer.layout import Devices, ranks_here


def contradictions(config: Config, devices: Devices) -> list[Problem]:
    """Return what ``launch.gpu_memory_gb`` says of GPUs and ``devices`` does not; nothing where less is counted on."""
    stated = config.launch.gpu_memory_gb
    if stated is None:
        return []
    if config.launch.device == "cpu":
        return [
            Problem(
                what="has no effect with launch.device=cpu",
                where="launch.gpu_memory_gb",
                got=f"{stated:g}",
                allowed="null",
                do="remove it",
            )
        ]
    wanted = config.launch.processes or max(devices.gpus, 1)
    more = devices.gpu_memory is not None and stated * 1e9 > devices.gpu_memory
    if wanted <= devices.gpus and not more:
        return []
    there = f"{devices.gpus} GPUs" + (f" of {devices.gpu_memory / 1e9:.1f} GB" if devices.gpu_memory else "")
    return [
        Problem(
            what="describes GPUs that this machine does not have",
            where="launch.gpu_memory_gb",
            got=f"{wanted} of {stated:g} GB",
            allowed=there if devices.gpus else "null: there is no GPU here",
            do="python -m trainer plan ... plans for them; for a run, remove it",
        )
    ]


def imagined(config: Config, devices: Devices) -> Devices | None:
    """Return the devices that ``config`` describes where they are not here; None where they are, or none are."""
    if config.launch.device == "cpu" or not contradictions(config, devices):
        return None
    stated = config.launch.gpu_memory_gb or 0.0
    wanted = config.launch.processes or max(devices.gpus, 1)
    # The machine of those GPUs is not this one either: nothing is known of its main memory.
    return replace(devices, gpus=wanted, gpu_memory=int(stated * 1e9), main_memory=None, compiles=True)


def counted_on(config: Config, devices: Devices) -> Devices:
    """Return ``devices`` with less memory of a GPU where ``config`` counts on less than there is."""
    stated = config.launch.gpu_memory_gb
    if stated is None or ranks_here(config, devices)[0] == "cpu":
        return devices
    return replace(devices, gpu_memory=int(stated * 1e9))
