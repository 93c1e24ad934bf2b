"""What GPUs do, as NVML says it: a stand-in for the library answers, because a test machine has no driver."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from trainer.cost.gpu import GpuSample, read_gpus

GIB = 2**30


class NVMLError(Exception):
    """What the library raises."""


@dataclass
class StandIn:
    """The functions of ``pynvml`` that are asked, for GPUs GPU-0.., of which ``mute`` questions have no answer."""

    count: int = 2
    lost: int | None = None
    mute: set[str] = field(default_factory=set)
    NVMLError: type[Exception] = NVMLError

    def nvmlDeviceGetCount(self) -> int:
        return self._say("count", self.count)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == self.lost:
            raise NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}f00d"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return self._say("utilisation", SimpleNamespace(gpu=90 + handle, memory=40))

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return self._say("memory", SimpleNamespace(used=3 * GIB, free=77 * GIB, total=80 * GIB))

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self._say("power", 350_500)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self._say("energy", 12_000_250)

    def _say(self, question: str, answer: Any) -> Any:
        if question in self.mute:
            raise NVMLError("Not Supported")
        return answer


def test_a_sample_is_in_percent_bytes_watts_and_joules() -> None:
    assert read_gpus(library=StandIn(count=1)) == [
        GpuSample(
            index=0,
            uuid="GPU-0f00d",
            name="NVIDIA H100 80GB HBM3",
            utilisation=90.0,
            memory_used=3 * GIB,
            memory_total=80 * GIB,
            power=pytest.approx(350.5),  # pyright: ignore[reportArgumentType]
            energy=pytest.approx(12000.25),  # pyright: ignore[reportArgumentType]
        )
    ]


def test_what_a_gpu_does_not_say_is_none_and_the_rest_is_there() -> None:
    (sample,) = read_gpus(library=StandIn(count=1, mute={"energy", "utilisation"}))
    assert (sample.energy, sample.utilisation, sample.power) == (None, None, pytest.approx(350.5))


def test_a_gpu_that_fell_off_the_bus_is_left_out() -> None:
    assert [sample.index for sample in read_gpus(library=StandIn(count=3, lost=1))] == [0, 2]


@pytest.mark.parametrize(
    ("visible", "indices"),
    [(None, [0, 1, 2]), ("2, 0", [0, 2]), ("GPU-1f", [1]), ("", []), ("MIG-7", [0, 1, 2])],
)
def test_only_those_of_the_run_are_looked_at(visible: str | None, indices: list[int]) -> None:
    assert [sample.index for sample in read_gpus(visible=visible, library=StandIn(count=3))] == indices


def test_a_driver_that_does_not_answer_is_no_gpu() -> None:
    assert read_gpus(library=StandIn(mute={"count"})) == []


def test_the_stand_in_has_the_names_of_the_library() -> None:
    asked = [name for name in vars(StandIn) if name.startswith("nvml")]
    assert len(asked) == 8
    assert [name for name in asked if not callable(getattr(pynvml, name, None))] == []
