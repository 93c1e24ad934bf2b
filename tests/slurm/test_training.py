"""Real training as a Slurm job on two nodes, stopped and killed on its way: the weights are those of an undisturbed
run."""

from pathlib import Path

import pytest
from slurm_campaign import run_campaign
from slurm_cluster import Cluster, until
from slurm_training import JOB, WORDS, steps, submitted, trainer, weights_of

from trainer.paths import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SHORT = ("optim.max_steps=60", "optim.batch_packs=2")


def test_a_run_that_is_stopped_twice_ends_with_the_same_weights(lab: Cluster, tmp_path: Path) -> None:
    straight, stopped = RunFolder(tmp_path / "straight"), RunFolder(tmp_path / "stopped")
    trainer(lab, tmp_path, *WORDS, *SHORT, "launch.processes=2", f"run.dir={straight.root}")
    job = submitted(trainer(lab, tmp_path, *WORDS, *SHORT, *JOB, "launch.nodes=2", f"run.dir={stopped.root}"))
    assert job is not None
    until(lambda: steps(stopped) >= 10, "ten steps", 300)
    lab.ask("scancel", "--signal=USR1", str(job))
    until(lambda: lab.field(job, "Restarts") == "1", "it is requeued", 120)
    began = steps(stopped)
    until(lambda: steps(stopped) >= began + 10, "ten more", 300)
    lab.ask("scontrol", "requeue", str(job))
    assert lab.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=400) == "COMPLETED"
    assert lab.field(job, "Restarts") == "2"
    assert (stopped.logs / "slurm.log").read_text().count("continuing after step") == 2
    assert weights_of(straight) == weights_of(stopped)
    assert "everything was done before" in trainer(
        lab, tmp_path, *WORDS, *SHORT, *JOB, "launch.nodes=2", f"run.dir={stopped.root}"
    )


def test_a_run_that_is_killed_at_random_ends_with_the_same_weights(lab: Cluster, tmp_path: Path) -> None:
    """Eight kills; ``make faults`` does fifty."""
    points = run_campaign(lab, tmp_path, kills=8, seed=1, nodes=2)
    assert [point for point in points if point.problem] == []
    assert len(points) == 9
