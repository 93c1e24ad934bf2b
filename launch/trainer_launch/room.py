"""How much memory there is for ranks, found without CUDA and torch: of a GPU, and of this machine."""

import os
import shutil
import subprocess
from pathlib import Path

from trainer_launch.devices import SMI_SECONDS

MIB = 2**20
C_COMPILERS = ("cc", "gcc", "clang")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU that a process started now would see; None where nobody says (no ``nvidia-smi``)."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return smallest(answer.stdout, os.environ.get("CUDA_VISIBLE_DEVICES")) if answer.returncode == 0 else None  # noqa: TID251


def smallest(text: str, visible: str | None) -> int | None:
    """Bytes of the smallest visible GPU in lines of ``UUID, MiB``; ``visible`` as CUDA reads it (numbers or names).

    GPUs of which nvidia-smi does not say it (``[N/A]``) count as unknown: then None.
    """
    found: list[tuple[str, int | None]] = []
    for line in text.splitlines():
        name, _, size = (part.strip() for part in line.partition(","))
        found.append((name, int(size) * MIB if size.isdecimal() else None))
    if visible is not None:
        words = [word.strip() for word in visible.split(",")]
        chosen = [
            entry
            for number, entry in enumerate(found)
            if str(number) in words or any(word.startswith("GPU-") and entry[0].startswith(word) for word in words)
        ]
        found = chosen or found  # MIG slices have sizes of their own, which are not listed here
        if any(word.startswith("MIG-") for word in words):
            return None
    sizes = [size for _, size in found if size is not None]
    return min(sizes) if sizes and len(sizes) == len(found) else None


def main_memory() -> int:
    """Bytes of main memory that processes of this job may take: the machine's, or less where a cgroup says so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(limit for limit in map(cgroup_limit, CGROUP_LIMITS) if limit is not None)])


def cgroup_limit(file: Path) -> int | None:
    """Bytes that ``file`` allows; None where it is not there or says ``max``."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def has_c_compiler() -> bool:
    """Whether Triton would find a compiler for what it generates."""
    return any(shutil.which(name) for name in C_COMPILERS)
