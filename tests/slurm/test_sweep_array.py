"""A W&B sweep as a Slurm array: the real agent and trainer, a server on the loopback, and a task that is stopped."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster, until
from wandb_server import WandbServer

from trainer.drive.progress import read_starts
from trainer.drive.trial import SWEEPS, Trial, read_trial
from trainer.paths import RunFolder, shipped_slurm
from trainer_launch import slurm

STEPS = 24
SETTINGS = (
    "+experiment=smoke",
    "export=none",
    "tracking=wandb",
    f"optim.max_steps={STEPS}",
    "eval.every=12",
    "launch.threads=1",
)


@dataclass(frozen=True)
class Array:
    """An array whose tasks are trials, and what they left."""

    job: int
    tasks: Path
    server: WandbServer

    def trial(self, task: int) -> Trial:
        left = read_trial(self.tasks / f"{self.job}_{task}" / "trial.json")
        assert left is not None, f"task {task} has no trial"
        return left

    def steps(self, task: int) -> int:
        left = read_trial(self.tasks / f"{self.job}_{task}" / "trial.json")
        figures = RunFolder(Path(left.folder)).metrics_jsonl if left is not None and left.folder else None
        return len(figures.read_text().splitlines()) if figures is not None and figures.exists() else 0

    def ended(self, task: int) -> list[int | None]:
        return [start.ended for start in read_starts(RunFolder(self.tasks / f"{self.job}_{task}"))]


def submit(lab: Cluster, server: WandbServer, cwd: Path, trials: int, monkeypatch: pytest.MonkeyPatch) -> Array:
    """The script that is shipped, on nodes without GPUs, for a sweep of so many learning rates."""
    command = ["${env}", "python", "-m", "trainer", *SETTINGS, "${args_no_hyphens}"]
    rates = [round(0.001 * number, 6) for number in range(1, trials + 1)]
    space = {"method": "grid", "parameters": {"optim.lr": {"values": rates}}, "command": command}
    made = server.answer("UpsertSweep", {"config": yaml.safe_dump(space), "projectName": "demo"})
    sweep = made["upsertSweep"]["sweep"]["name"]
    here = str(Path(sys.executable).parent)  # what `source .venv/bin/activate` does
    for name, value in {**server.environment, "PATH": os.pathsep.join([here, lab.environment["PATH"]])}.items():
        monkeypatch.setitem(lab.environment, name, value)
    words = [f"--array=1-{trials}%2", "--gres=none", "--cpus-per-task=1", "--mem=1000", "--time=10"]
    script = str(shipped_slurm() / "sweep.sbatch")
    number = lab.ask("sbatch", "--parsable", *words, script, f"loopback/demo/{sweep}", cwd=cwd)
    return Array(int(number), cwd / SWEEPS / sweep / "tasks", server)


def goes_through(lab: Cluster, array: Array, trials: int) -> None:
    """Stop the last task in the middle of its trial, and look at what all of them left.

    The last one, because it has the number of the whole array: requeued by that, all would start again.
    """
    until(lambda: array.steps(trials) >= 3, "three steps of the last task", 300)
    slurm.signal_steps(f"{array.job}_{trials}", "USR1")
    until(lambda: not lab.ask("squeue", "-h", "-j", str(array.job), "-o", "%A", check=False), "all are over", 400)
    stopped = array.trial(trials)
    (sweep,) = array.server.sweeps.values()
    assert sorted(sweep.runs) == sorted(array.trial(task).run for task in range(1, trials + 1))
    assert [array.ended(task) for task in range(1, trials + 1)] == [[0]] * (trials - 1) + [[75, 0]]
    assert [array.steps(task) for task in range(1, trials + 1)] == [STEPS] * trials
    assert Path(stopped.folder).name == stopped.run
    for task in range(1, trials + 1):
        arrived = array.server.runs[array.trial(task).run]
        assert arrived.state == "finished"
        assert [row["_step"] for row in arrived.rows if "train/loss" in row] == list(range(1, STEPS + 1))
    log = (array.tasks.parents[4] / f"sweep-{array.job}_{trials}.log").read_text()
    assert f"the trial goes on: W&B run {stopped.run}" in log
    assert "continuing after step" in log


@pytest.mark.campaign
def test_a_stopped_task_goes_on_with_its_own_trial(
    lab: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WandbServer() as server:
        goes_through(lab, submit(lab, server, tmp_path, 2, monkeypatch), 2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_four_agents(lab: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with WandbServer() as server:
        goes_through(lab, submit(lab, server, tmp_path, 4, monkeypatch), 4)
