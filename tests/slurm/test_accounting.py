"""Jobs that the controller has forgotten: what is said of them with a real slurmdbd, and without any accounting.

What a run makes of the answers is tested without Slurm, in tests/unit/test_slurm_states.py.
"""

import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm_accounting import FORGETS, accounted, why_no_accounting
from slurm_cluster import Cluster, cluster, until, why_not
from slurm_stand_ins import PER_SECOND, Counted

from trainer.drive.follow import follow
from trainer.drive.queue import job_lines, read_submission
from trainer_launch import slurm
from trainer_launch.jobs import same_run
from trainer_launch.slurm import Unknown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LONG = 3600 * PER_SECOND
SHORT = 2 * PER_SECOND


@dataclass(frozen=True)
class Past:
    """Jobs that are over and that the controller does not know any more, by what became of them."""

    lab: Cluster
    runs: dict[str, Counted]
    began: float

    def job(self, name: str) -> int:
        submission = read_submission(self.runs[name].folder)
        assert submission is not None
        return submission.job


def past(lab: Cluster, root: Path) -> Past:
    """One of each kind, and the minute in which the controller forgets them."""
    runs = {name: Counted(root / name) for name in ("requeued", "cancelled", "pending", "failed")}
    made = Past(lab, runs, time.time())
    spec = runs["failed"].spec(total=SHORT)
    words = (*spec.words[: spec.words.index("--") + 1], "bash", "-c", "exit 3")
    with lab.commands():
        requeued = runs["requeued"].submit(runs["requeued"].spec(total=6 * PER_SECOND))
        until(lambda: bool(runs["requeued"].journal()), "it counts")
        slurm.signal_steps(requeued, "USR1")
        cancelled = runs["cancelled"].submit(runs["cancelled"].spec(total=LONG))
        until(lambda: bool(runs["cancelled"].journal()), "the one to be cancelled counts")
        later = dataclasses.replace(runs["pending"].spec(total=SHORT), options=("--begin=now+1hour",))
        for job in (cancelled, runs["pending"].submit(later)):
            lab.ask("scancel", str(job))
        runs["failed"].submit(dataclasses.replace(spec, words=words))
        until(lambda: not lab.jobs(), "all are over, and forgotten", 180)
    return made


@pytest.fixture(scope="module")
def with_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Past]:
    reason = why_no_accounting()
    if reason:
        pytest.skip(reason)
    with accounted() as lab:
        yield past(lab, tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Past]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    none = f"AccountingStorageType=accounting_storage/none\n{FORGETS}"
    with cluster(nodes=2, accounting=none) as lab:
        yield past(lab, tmp_path_factory.mktemp("forgotten"))


@pytest.fixture
def kept(with_accounting: Past) -> Iterator[Past]:
    """With accounting that keeps comments; the commands of Slurm are pointed there."""
    with with_accounting.lab.commands():
        yield with_accounting


@pytest.fixture
def forgotten(without: Past) -> Iterator[Past]:
    """Without accounting."""
    with without.lab.commands():
        yield without


ENDS = {
    "requeued": ("COMPLETED", 0),
    "cancelled": ("CANCELLED", 75),
    "pending": ("CANCELLED", 75),
    "failed": ("FAILED", 3),
}


@pytest.mark.parametrize("name", ENDS)
def test_accounting_tells_how_a_job_ended_that_the_controller_has_forgotten(kept: Past, name: str) -> None:
    job, (state, code) = kept.job(name), ENDS[name]
    with pytest.raises(Unknown):
        slurm.controlled(job)
    assert slurm.show(job).state == state
    by = f" (by {os.getuid()})" if state == "CANCELLED" else ""
    assert job_lines(kept.runs[name].folder) == [f"Slurm job {job}: {state}{by}"]
    assert follow(job, kept.runs[name].folder) == code


@pytest.mark.parametrize("name", ENDS)
def test_without_accounting_the_run_itself_knows_how_its_last_start_ended(forgotten: Past, name: str) -> None:
    job, (_, code) = forgotten.job(name), ENDS[name]
    with pytest.raises(Unknown, match="accounting says nothing"):
        slurm.show(job)
    assert follow(job, forgotten.runs[name].folder) == code
    first, *more = job_lines(forgotten.runs[name].folder)
    assert first.startswith(f"Slurm job {job}: unknown (the controller does not know job {job}")
    assert not more if name == "pending" else more[0].startswith(f"  its last start ended with {code}: ")


def test_a_job_whose_reply_was_lost_is_found_when_it_is_over_and_forgotten(kept: Past) -> None:
    name, run = kept.runs["failed"].spec(total=1).name, kept.runs["failed"]
    found = same_run(slurm.recorded(name, kept.began), run.spec(total=1).comment)
    assert [(job.id, job.state, job.exit_code) for job in found] == [(kept.job("failed"), "FAILED", 3)]


def test_a_job_that_the_controller_lost_is_not_waited_for(kept: Past, tmp_path: Path) -> None:
    """The controller comes back without its files: it does not know the job, and accounting is told that it is over."""
    run = Counted(tmp_path / "run")
    name, job = run.spec(total=LONG).name, run.submit(run.spec(total=LONG))
    until(lambda: bool(run.journal()), "it counts")

    def is_recorded() -> bool:
        return any((one.id, one.state) == (job, "RUNNING") for one in slurm.recorded(name, kept.began))

    until(is_recorded, "accounting knows that it runs")
    kept.lab.kill("slurmctld")
    for path in (kept.lab.folder / "state").glob("job_state*"):
        path.unlink()
    kept.lab.start_controller()
    until(lambda: kept.lab.ask("scontrol", "ping", check=False).endswith("UP"), "the controller answers")
    with pytest.raises(Unknown):
        slurm.controlled(job)
    assert follow(job, run.folder) == 75
    assert job_lines(run.folder) == [f"Slurm job {job}: CANCELLED"], "by nobody"
