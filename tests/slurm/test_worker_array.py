"""A sweep of Optuna as a Slurm array, by the script of docs/tuning.md: a stopped task comes back, the budget is one."""

import csv
import os
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, until

from trainer.paths import CHECKOUT
from trainer_launch import slurm

TRIALS = 3
CHANGES = {
    "--array=1-8 --gres=gpu:1 --time=4:00:00": "--array=1-2 --gres=none --cpus-per-task=1 --mem=1000 --time=10",
    "+experiment=legal_lora sweep=legal_lora_bayes sweep.trials=100": (
        f"+experiment=smoke sweep=smoke sweep.trials={TRIALS} sweep.pruner=none optim.max_steps=40 launch.threads=1"
    ),
}


def script() -> str:
    """The script of the page, for a small sweep on nodes without GPUs."""
    page = (CHECKOUT / "docs" / "tuning.md").read_text("utf-8")
    text = page.partition("```bash\n")[2].partition("```")[0]
    for before, after in CHANGES.items():
        assert before in text
        text = text.replace(before, after)
    return text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_of_one_sweep_as_an_array(lab: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), lab.environment["PATH"]])
    monkeypatch.setitem(lab.environment, "PATH", path)
    (tmp_path / "workers.sbatch").write_text(script())
    job = int(lab.ask("sbatch", "--parsable", "workers.sbatch", cwd=tmp_path))
    sweep = tmp_path / "outputs" / "sweeps" / "smoke" / "smoke"

    def steps() -> int:
        figures = sorted((sweep / "trials").glob("*/metrics.jsonl"))
        return min((len(path.read_text().splitlines()) for path in figures), default=0) if len(figures) > 1 else 0

    until(lambda: steps() >= 3, "steps of two trials", 300)
    slurm.signal_steps(f"{job}_2", "USR1")
    until(lambda: not lab.ask("squeue", "-h", "-j", str(job), "-o", "%A", check=False), "all are over", 500)

    rows = list(csv.DictReader((sweep / "trials.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["complete"] * TRIALS
    logs = "".join(path.read_text() for path in tmp_path.glob("slurm-*.out"))
    assert logs.count("stopped; every trial is where it was") == 1
    assert logs.count("files: ") == 2  # both tasks have shown the results
