"""How much memory there is, as nvidia-smi and cgroups say it."""

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from trainer_launch import room
from trainer_launch.room import cgroup_limit, gpu_memory, main_memory, smallest

LISTED = "GPU-aa, 81559\nGPU-bb, 24564\nGPU-cc, 40960\n"
MIB = 2**20


@pytest.mark.parametrize(
    ("visible", "mebibytes"),
    [
        (None, 24564),
        ("0", 81559),
        ("0, 2", 40960),
        ("GPU-a", 81559),
        ("GPU-cc,GPU-aa", 40960),
        ("MIG-1", None),
        ("0,MIG-1", None),
    ],
)
def test_the_smallest_visible_gpu_counts(visible: str | None, mebibytes: int | None) -> None:
    assert smallest(LISTED, visible) == (None if mebibytes is None else mebibytes * MIB)


def test_a_gpu_that_does_not_say_is_unknown() -> None:
    assert smallest("GPU-aa, 81559\nGPU-bb, [N/A]\n", None) is None
    assert smallest("", None) is None


def test_nvidia_smi_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([CompletedProcess([], 0, LISTED), CompletedProcess([], 9, LISTED), OSError("gone")])

    def ask(command: list[str], **_: Any) -> CompletedProcess[str]:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        assert command[0] == "nvidia-smi"
        return answer

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(room.shutil, "which", lambda name: name)
    monkeypatch.setattr(room.subprocess, "run", ask)
    assert [gpu_memory(), gpu_memory(), gpu_memory()] == [24564 * MIB, None, None]
    monkeypatch.setattr(room.shutil, "which", lambda name: None)
    assert gpu_memory() is None


def test_a_cgroup_may_allow_less_than_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    assert cgroup_limit(limit) is None
    limit.write_text("max\n")
    assert cgroup_limit(limit) is None
    limit.write_text("1000000\n")
    monkeypatch.setattr(room, "CGROUP_LIMITS", (limit,))
    assert main_memory() == 1_000_000
    limit.write_text(f"{10**18}\n")
    assert 10**8 < main_memory() < 10**18
