"""Real training as a Slurm job on two nodes, stopped twice on its way: the weights are those of an undisturbed run."""

import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, until

from trainer.fingerprint import file_digest
from trainer.paths import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

WORDS = ("+experiment=smoke", "optim.max_steps=60", "launch.device=cpu", "launch.threads=1", "optim.batch_packs=2")
JOB = (
    "launch=slurm",
    "launch.nodes=2",
    "launch.processes=1",
    "launch.mem=1500",
    "launch.prolog=['export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1']",
)


def trainer(lab: Cluster, cwd: Path, *words: str) -> str:
    command = [sys.executable, "-m", "trainer", *words]
    done = subprocess.run(command, cwd=cwd, env=lab.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steps(folder: RunFolder) -> int:
    return len(folder.metrics_jsonl.read_text().splitlines()) if folder.metrics_jsonl.exists() else 0


def test_a_run_that_is_stopped_twice_ends_with_the_same_weights(lab: Cluster, tmp_path: Path) -> None:
    straight, stopped = RunFolder(tmp_path / "straight"), RunFolder(tmp_path / "stopped")
    trainer(lab, tmp_path, *WORDS, "launch.processes=2", f"run.dir={straight.root}")
    said = trainer(lab, tmp_path, *WORDS, *JOB, f"run.dir={stopped.root}")
    job = int(said.partition("submitted job ")[2].partition(":")[0])
    until(lambda: steps(stopped) >= 10, "ten steps", 300)
    lab.ask("scancel", "--signal=USR1", str(job))
    until(lambda: lab.field(job, "Restarts") == "1", "it is requeued", 120)
    began = steps(stopped)
    until(lambda: steps(stopped) >= began + 10, "ten more", 300)
    lab.ask("scontrol", "requeue", str(job))
    assert lab.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=400) == "COMPLETED"
    assert lab.field(job, "Restarts") == "2"
    assert (stopped.logs / "slurm.log").read_text().count("continuing after step") == 2
    weights = [file_digest(folder.merged / "model.safetensors") for folder in (straight, stopped)]
    assert weights[0] == weights[1]
    assert "everything was done before" in trainer(lab, tmp_path, *WORDS, *JOB, f"run.dir={stopped.root}")
