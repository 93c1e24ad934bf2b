"""The command line as a user starts it: another process, its exit code and its words."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
SECONDS = 500

WITNESS = """
import runpy, sys
code = 0
try:
    runpy.run_module("trainer", run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code
heavy = {"torch", "transformers", "datasets", "accelerate", "peft", "numba", "trainer_kernels"}
print("imported:", sorted(heavy & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""
"""``python -m trainer`` that says at its end which of the slow packages it has imported."""

NOTHING_HEAVY = "imported: []"


# The checkout need not be installed; what the tests were started with stays.
PATHS = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]  # noqa: TID251
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, PATHS))}  # noqa: TID251


@dataclass(frozen=True)
class Ended:
    """What a command left."""

    code: int
    out: str
    err: str

    def words(self) -> list[str]:
        """The lines of the output with single spaces."""
        return [" ".join(line.split()) for line in self.out.splitlines()]


def trainer(cwd: Path, *words: str) -> Ended:
    """``python -m trainer WORDS`` in ``cwd``; ``err`` ends with what it imported."""
    done = subprocess.run(
        [sys.executable, "-c", WITNESS, *words],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def trainer_until(cwd: Path, words: list[str], act: Callable[[str, subprocess.Popen[str]], None]) -> Ended:
    """The same, with ``act`` called for every line of its output as it comes."""
    with subprocess.Popen(
        [sys.executable, "-c", WITNESS, *words],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            act(line, process)
        return Ended(process.wait(), "".join(lines), "")


CANARIES = {
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanaryCanary0001",
    "WANDB_API_KEY": "0ca4a41e50ca4a41e50ca4a41e50ca4a41e50002",
    "AWS_SECRET_ACCESS_KEY": "CanaryCanary/CanaryCanary+Canary00000003",
    "MY_DATABASE_PASSWORD": "canary-canary-0004",
}
"""Secrets of an environment."""


def places_of(secret: str, folder: Path) -> list[str]:
    """Files below ``folder`` that hold ``secret``, in their bytes or their name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if secret.encode() in path.read_bytes() or secret in path.name]
