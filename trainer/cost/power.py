"""What devices say of the energy they used: NVIDIA's driver of a GPU, Linux (RAPL) of a processor's sockets.

Both count joules since some moment, so that only differences mean anything. Where a device does not say, the answer is
None and never a guess: estimates are made in one place, ``sums.py``, and marked.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from trainer.cost.ledger import Meter

POWERCAP = Path("/sys/class/powercap")
MICRO = 1e-6


class GpuReading(Protocol):
    """Of one GPU: J since its driver was loaded, and W now; None where it does not say."""

    @property
    def uuid(self) -> str:
        """As NVIDIA's tools write it: ``GPU-`` and 32 hex digits."""
        ...

    @property
    def energy(self) -> float | None:
        """J."""
        ...

    @property
    def power(self) -> float | None:
        """W."""
        ...


class GpuMeter:
    """Energy of one GPU between two questions, others' work on it included.

    Args:
        uuid: of the GPU, with or without ``GPU-``.
        read: all GPUs of this machine, now.
    """

    def __init__(self, uuid: str, read: Callable[[], Sequence[GpuReading]]) -> None:
        self._uuid, self._read = uuid.removeprefix("GPU-"), read
        self._last = self._now()

    def used(self, seconds: float) -> tuple[float | None, Meter]:
        """J since the last question, ``seconds`` ago, and by which meter.

        A GPU without a counter of joules (older than Volta) has its power read at both ends instead.
        """
        before, self._last = self._last, self._now()
        if before is None or self._last is None:
            return None, ""
        if before.energy is not None and self._last.energy is not None and self._last.energy >= before.energy:
            return self._last.energy - before.energy, "counter"
        if before.power is not None and self._last.power is not None:
            return (before.power + self._last.power) / 2 * seconds, "power"
        return None, ""

    def _now(self) -> GpuReading | None:
        return next((gpu for gpu in self._read() if gpu.uuid.removeprefix("GPU-") == self._uuid), None)


class Sockets:
    """Energy of all processor sockets of this machine between two questions, others' work included.

    Linux lets only root read it unless an administrator decided otherwise (CVE-2020-8694).
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        found = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if _text(zone / "name").startswith("package")]
        self._zones = {zone: _number(zone / "max_energy_range_uj") for zone in found}
        self._last = {zone: _number(zone / "energy_uj") for zone in found}

    @property
    def are_readable(self) -> bool:
        """Whether every socket says what it uses."""
        return bool(self._last) and all(value is not None for value in self._last.values())

    def used(self) -> float | None:
        """J since the last question; None where a socket does not say."""
        total = 0.0
        for zone, before in self._last.items():
            now = self._last[zone] = _number(zone / "energy_uj")
            if now is None or before is None:
                return None
            total += now - before if now >= before else now - before + (self._zones[zone] or 0.0)  # it began anew
        return total * MICRO if self._last else None


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    text = _text(path)
    return float(text) if text.isdecimal() else None
