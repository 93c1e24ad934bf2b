"""What becomes of jobs, under a real Slurm: a counter stands in for the training, so that this takes seconds."""

import dataclasses
from pathlib import Path

import pytest
from slurm_cluster import Cluster, until
from slurm_stand_ins import PER_SECOND, Counted

from trainer.drive.follow import follow
from trainer.drive.progress import read_starts
from trainer_launch import slurm

SECONDS = 35
LONG = 3600 * PER_SECOND


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    return Counted(tmp_path / "my run")


@pytest.fixture(scope="module")
def limited(running: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Counted, int]:
    """A job with a limit of a minute and work for longer than it gets; the last test looks at it."""
    run = Counted(tmp_path_factory.mktemp("limited") / "run")
    with running.commands():
        return run, run.submit(dataclasses.replace(run.spec(total=SECONDS * PER_SECOND, nodes=2), time="1"))


@pytest.fixture(autouse=True)
def beside(limited: tuple[Counted, int]) -> None:
    """Every test here begins after that job."""


def test_a_cancelled_job_stays_away(lab: Cluster, counted: Counted) -> None:
    job = counted.submit(counted.spec(total=LONG, nodes=2))
    until(lambda: len(counted.journal()) == 2, "both nodes count")
    lab.ask("scancel", str(job))
    lab.wait_for(job, "CANCELLED")
    assert {line.partition(": ")[0] for line in counted.journal()} == {"node 0 start 0", "node 1 start 0"}
    assert "because of SIGTERM" in counted.journal()[-1]
    assert "the job was ended from outside" in read_starts(counted.folder)[-1].why
    assert lab.field(job, "Restarts") == "0"


def test_a_job_that_gets_nowhere_is_held_for_a_person(lab: Cluster, counted: Counted) -> None:
    job = counted.submit(counted.spec(total=LONG, saves=False))
    for start in range(3):
        until(lambda start=start: f"node 0 start {start}: from 0" in counted.journal(), f"start {start}")
        slurm.signal_steps(job, "USR1")
    assert follow(job, counted.folder) == 76
    assert slurm.show(job).is_held
    assert [start.ended for start in read_starts(counted.folder)] == [75, 75, 76]
    lab.ask("scontrol", "release", str(job))
    until(lambda: "node 0 start 3: from 0" in counted.journal(), "released, it starts again")
    lab.ask("scancel", str(job))
    lab.wait_for(job, "CANCELLED")


def test_a_second_job_of_a_run_leaves_the_work_to_the_first(lab: Cluster, counted: Counted) -> None:
    first = counted.submit(counted.spec(total=LONG))
    until(lambda: bool(counted.journal()), "the first counts")
    second = counted.submit(counted.spec(total=LONG))
    lab.wait_for(second, "COMPLETED", "FAILED")
    assert f"this run has an older job, which does the work: job {first}: RUNNING" in counted.log()
    assert len(counted.journal()) == 1
    lab.ask("scancel", str(first))
    lab.wait_for(first, "CANCELLED")
    assert follow(first, counted.folder) == 75


def test_a_signal_to_the_batch_shell_alone_reaches_the_processes_of_the_job(lab: Cluster, counted: Counted) -> None:
    job = counted.submit(counted.spec(total=LONG))
    until(lambda: bool(counted.journal()), "it counts")
    lab.ask("scancel", "--batch", "--signal=USR1", str(job))
    until(lambda: lab.field(job, "Restarts") == "1", "it is requeued")
    assert "because of SIGUSR1" in counted.journal()[1]
    lab.ask("scancel", str(job))
    lab.wait_for(job, "CANCELLED")


def test_a_time_limit_is_no_loss(lab: Cluster, limited: tuple[Counted, int]) -> None:
    counted, job = limited
    assert lab.wait_for(job, "COMPLETED", "TIMEOUT", "FAILED", seconds=180) == "COMPLETED"
    restarts = int(lab.field(job, "Restarts"))
    assert restarts > 0
    here = [line for line in counted.journal() if line.startswith("node 0")]
    for start in range(restarts):  # Slurm may send the signal up to 60 s early, so the next start may be stopped too
        began, ended, goes_on = here[2 * start : 2 * start + 3]
        assert ended.endswith("because of SIGUSR1")
        assert int(ended.split()[6]) > int(began.split()[-1])
        assert goes_on == f"node 0 start {start + 1}: from {ended.split()[6]}"
    assert here[-1] == f"node 0 start {restarts}: ends at {SECONDS * PER_SECOND}"
    assert [start.ended for start in read_starts(counted.folder)] == [75] * restarts + [0]
