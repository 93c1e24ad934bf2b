"""What the machine does while a run trains: a line per look in ``tracking/system.jsonl``, and their means by step."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from trainer.cost.gpu import GpuSample
from trainer.paths import without_links
from trainer.records import GrowingRecords

GIGA = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look. ``time``: Unix seconds. ``step``: the optimizer step that was being made (the last one + 1).

    ``cpu_percent``: of all cores of the machine, since the last look; ``memory_used``: bytes of main memory.
    """

    time: float
    step: int
    cpu_percent: float
    memory_used: int
    gpus: list[GpuSample]


def take_sample(step: int, gpus: Sequence[GpuSample]) -> Sample:
    """Look at CPUs and memory; ``gpus`` were looked at by the caller."""
    used = psutil.virtual_memory()
    return Sample(
        time=time.time(),
        step=step,
        cpu_percent=psutil.cpu_percent(),
        memory_used=used.total - used.available,
        gpus=list(gpus),
    )


def append_sample(path: Path, sample: Sample) -> None:
    """Add a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", opener=without_links) as handle:
        handle.write(msgspec.json.encode(sample) + b"\n")


class SystemRows:
    """The means of the samples of each step, as figures: ``system/gpu0/power_watts``.

    Energy is not averaged: ``system/gpu0/energy_joules`` is what the GPU used since the first sample of this run on it.
    """

    def __init__(self, path: Path) -> None:
        self._lines = GrowingRecords(path)
        self._waiting: list[Sample] = []
        self._first_energy: dict[str, float] = {}
        self._last_energy: dict[str, float] = {}

    def totals(self) -> dict[str, float]:
        """Over all samples: ``system/energy_joules`` of all GPUs, where they say it."""
        self.up_to(sys.maxsize)
        used = [self._last_energy[uuid] - first for uuid, first in self._first_energy.items()]
        return {"system/energy_joules": sum(used)} if used else {}

    def up_to(self, step: int) -> dict[str, float]:
        """The figures of all samples until ``step`` that were not given yet; empty: there are none."""
        for line in self._lines.new():
            sample = msgspec.convert(line, Sample)
            self._waiting.append(sample)
            for gpu in sample.gpus:
                if gpu.energy is not None:
                    self._first_energy.setdefault(gpu.uuid, gpu.energy)
                    self._last_energy[gpu.uuid] = gpu.energy
        taken = [sample for sample in self._waiting if sample.step <= step]
        self._waiting = [sample for sample in self._waiting if sample.step > step]
        return self._means(taken) if taken else {}

    def _means(self, samples: Sequence[Sample]) -> dict[str, float]:
        row = {
            "system/cpu_percent": _mean([sample.cpu_percent for sample in samples]),
            "system/memory_gb": _mean([sample.memory_used / GIGA for sample in samples]),
        }
        looks: dict[int, list[GpuSample]] = {}
        for gpu in (gpu for sample in samples for gpu in sample.gpus):
            looks.setdefault(gpu.index, []).append(gpu)
        for index, gpus in looks.items():
            names: dict[str, list[Any]] = {
                "utilisation_percent": [gpu.utilisation for gpu in gpus],
                "memory_gb": [None if gpu.memory_used is None else gpu.memory_used / GIGA for gpu in gpus],
                "power_watts": [gpu.power for gpu in gpus],
            }
            for name, values in names.items():
                said = [value for value in values if value is not None]
                if said:
                    row[f"system/gpu{index}/{name}"] = _mean(said)
            last = gpus[-1]
            if last.energy is not None:
                row[f"system/gpu{index}/energy_joules"] = last.energy - self._first_energy[last.uuid]
        return row


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
