"""Real training as a Slurm job small enough to be started again and again, and what it leaves."""

import re
import subprocess
import sys
from pathlib import Path

from slurm_cluster import Cluster

from trainer.fingerprint import file_digest
from trainer.paths import RunFolder

WORDS = ("+experiment=smoke", "model.dtype=float32", "launch.device=cpu", "launch.threads=1", "method.dropout=0.1")
"""What an undisturbed run on one machine has as well."""
JOB = (
    "launch=slurm",
    "launch.processes=1",
    "launch.mem=1500",
    "launch.prolog=['export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1']",
)


def trainer(lab: Cluster, cwd: Path, *words: str) -> str:
    """Run ``python -m trainer`` with these words, which has to end well; gives its output."""
    command = [sys.executable, "-m", "trainer", *words]
    done = subprocess.run(command, cwd=cwd, env=lab.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submitted(said: str) -> int | None:
    """The number of the job that ``trainer`` has submitted; None: there is one that is still ending."""
    found = re.search(r"submitted job (\d+)", said)
    return None if found is None else int(found[1])


def steps(folder: RunFolder) -> int:
    """Lines of the run's record."""
    return len(folder.metrics_jsonl.read_text().splitlines()) if folder.metrics_jsonl.exists() else 0


def weights_of(folder: RunFolder) -> str:
    """sha256 of the exported weights."""
    return file_digest(folder.merged / "model.safetensors")
