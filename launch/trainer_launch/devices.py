"""How many GPUs the ranks will see, found without CUDA and torch: a login node must answer at once."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

SMI_SECONDS = 20


def visible_gpus() -> int:
    """GPUs that a process started now would see: those of the driver, narrowed by ``CUDA_VISIBLE_DEVICES``."""
    present = present_gpus()
    return narrowed(present, os.environ.get("CUDA_VISIBLE_DEVICES"))  # noqa: TID251


def narrowed(present: int, visible: str | None) -> int:
    """``present`` GPUs seen through ``visible``, as CUDA reads it.

    Unset: all. Otherwise a list of numbers or of names (``GPU-..``, ``MIG-..``) that ends at the first number that no
    GPU has.
    """
    if visible is None or present == 0:
        return present
    count = 0
    for item in visible.split(","):
        word = item.strip()
        if not word.startswith(("GPU-", "MIG-")) and not (word.isdecimal() and int(word) < present):
            break
        count += 1
    return count


def present_gpus() -> int:
    """GPUs that the NVIDIA driver shows here: ``nvidia-smi -L``, or where it is not installed, ``/proc``."""
    if shutil.which("nvidia-smi") is None:
        listed = Path("/proc/driver/nvidia/gpus")
        return len(list(listed.iterdir())) if listed.is_dir() else 0
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return count_listed(answer.stdout) if answer.returncode == 0 else 0


def count_listed(text: str) -> int:
    """GPUs in the output of ``nvidia-smi -L``; the MIG slices below a GPU are indented and not counted."""
    return sum(line.startswith("GPU ") for line in text.splitlines())


def share_of_gpus(places: Iterable[int]) -> dict[str, str]:
    """The variables that show a process only some of the GPUs that this one sees: those at ``places``, from 0."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # noqa: TID251
    return {"CUDA_VISIBLE_DEVICES": share(visible, places)}


def share(visible: str | None, places: Iterable[int]) -> str:
    """``CUDA_VISIBLE_DEVICES`` for ``places`` among the ``visible`` ones; None: all, by their numbers."""
    if visible is None:
        return ",".join(str(place) for place in places)
    words = [word.strip() for word in visible.split(",")]
    return ",".join(words[place] for place in places)
