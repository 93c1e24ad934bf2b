"""What the GPUs of this machine are doing, as NVIDIA's management library (NVML) says it: no CUDA, no torch.

A reader beside the training can ask as often as it likes: nothing of the ranks is touched.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

MILLI = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One GPU at one moment; None where this GPU does not say (MIG slices, older ones).

    ``utilisation``: percent of the time in which a kernel ran. ``memory_used``, ``memory_total``: bytes. ``power``: W.
    ``energy``: J since the driver was loaded; the difference of two samples is what was used in between.
    """

    index: int
    uuid: str
    name: str
    utilisation: float | None
    memory_used: int | None
    memory_total: int | None
    power: float | None
    energy: float | None


def read_gpus(*, visible: str | None = None, library: Any = None) -> list[GpuSample]:
    """Ask every GPU of this machine; empty where there is no NVIDIA driver, or it does not answer.

    ``visible``: only those that a process with this ``CUDA_VISIBLE_DEVICES`` sees (numbers in the order of the PCI bus,
    or beginnings of UUIDs); None: all. ``library``: something with the functions of ``pynvml``, already initialised.
    """
    nvml = _library() if library is None else library
    if nvml is None:
        return []
    samples: list[GpuSample] = []
    for index in range(_ask(nvml, nvml.nvmlDeviceGetCount) or 0):
        handle = _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is not None:  # else it fell off the bus
            samples.append(_sample(nvml, index, handle))
    return samples if visible is None else seen_through(samples, visible)


def seen_through(samples: list[GpuSample], visible: str) -> list[GpuSample]:
    """Those of ``samples`` that ``visible`` names; a MIG slice counts as its GPU, which alone has figures: all stay."""
    words = [word.strip() for word in visible.split(",")]
    if any(word.startswith("MIG-") for word in words):
        return samples
    return [
        sample
        for sample in samples
        if str(sample.index) in words or any(word.startswith("GPU-") and sample.uuid.startswith(word) for word in words)
    ]


def _sample(nvml: Any, index: int, handle: Any) -> GpuSample:
    load, memory = (
        _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle),
        _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle),
    )
    milliwatts = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    millijoules = _ask(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    return GpuSample(
        index=index,
        uuid=_ask(nvml, nvml.nvmlDeviceGetUUID, handle) or "",
        name=_ask(nvml, nvml.nvmlDeviceGetName, handle) or "",
        utilisation=None if load is None else float(load.gpu),
        memory_used=None if memory is None else int(memory.used),
        memory_total=None if memory is None else int(memory.total),
        power=None if milliwatts is None else milliwatts * MILLI,
        energy=None if millijoules is None else millijoules * MILLI,
    )


def _ask(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` answers, or None where this GPU, driver or slice does not."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


@functools.cache
def _library() -> ModuleType | None:
    """NVML, initialised once in this process; None where the package or the driver is not there."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml
