"""What is made of a job that the controller has forgotten: with accounting, and without.

Stand-ins answer here; what they say was recorded from Slurm 22.05.8 with slurmdbd (tests/slurm/test_accounting.py asks
the real ones).
"""

from pathlib import Path

import pytest

from trainer.drive.follow import follow
from trainer.drive.job import carry_out, still_runs
from trainer.drive.progress import Start, write_starts
from trainer.drive.queue import Submission, job_lines, write_submission
from trainer.paths import RunFolder
from trainer_launch.jobs import Decision, Next, parse_accounting, parse_show
from trainer_launch.slurm import Allocation, SlurmError, Unknown, controlled, show

FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
NO_ACCOUNTING = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
ACCOUNTED = """2|CANCELLED by 0|0:0|trimtab /runs/cancelled
1|COMPLETED|0:0|trimtab /runs/requeued
3|CANCELLED by 0|0:0|trimtab /runs/pending
4|FAILED|3:0|trimtab /runs/failed
5|CANCELLED|0:0|
"""
SHOWN = (
    "JobId=1 JobName=wrap UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901759 Nice=0 Account=root "
    "QOS=normal JobState=FAILED Reason=NonZeroExitCode Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 "
    "ExitCode=3:0 RunTime=00:00:01 TimeLimit=365-00:00:00 TimeMin=N/A SubmitTime=2026-11-23T21:00:58 "
    "EligibleTime=2026-11-23T21:00:58 AccrueTime=2026-11-23T21:00:58 StartTime=2026-11-23T21:00:58 "
    "EndTime=2026-11-23T21:00:59 Deadline=N/A SuspendTime=None SecsPreSuspend=0 LastSchedEval=2026-11-23T21:00:58 "
    "Scheduler=Backfill Partition=main AllocNode:Sid=localhost:14069 ReqNodeList=(null) ExcNodeList=(null) "
    "NodeList=127.0.77.1 BatchHost=127.0.77.1 NumNodes=1 NumCPUs=1 NumTasks=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:* "
    "TRES=cpu=1,mem=100M,node=1,billing=1 Socks/Node=* NtasksPerN:B:S:C=0:0:*:* CoreSpec=* MinCPUsNode=1 "
    "MinMemoryNode=100M MinTmpDiskNode=0 Features=(null) DelayBoot=00:00:00 OverSubscribe=OK Contiguous=0 "
    "Licenses=(null) Network=(null) Command=(null) WorkDir=/tmp Comment=trimtab /a b|c  StdErr=/dev/null "
    "StdIn=/dev/null StdOut=/dev/null Power="
)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that is searched first; every call is a line of ``calls``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def says(tools: Path, name: str, body: str) -> None:
    (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tools}/calls\n{body}\n')
    (tools / name).chmod(0o755)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose job 4 is on record with one start that ended with 3."""
    folder = RunFolder(tmp_path / "run")
    write_submission(folder, Submission(job=4, name="run-0", submitted=0.0, log="", verb="run"))
    why = "failed with exit code 3; it would fail again"
    write_starts(folder, [Start(job=4, restarts=0, began="", progress="", ended=3, why=why)])
    return folder


def test_what_slurm_says_is_read() -> None:
    job = parse_show(SHOWN)
    assert job is not None
    assert (job.id, job.state, job.restarts, job.exit_code, job.signal) == (1, "FAILED", 0, 3, 0)
    read = [(job.id, job.state, job.reason, job.exit_code) for job in parse_accounting(ACCOUNTED)]
    assert read == [
        (1, "COMPLETED", "", 0),
        (2, "CANCELLED", "by 0", 0),
        (3, "CANCELLED", "by 0", 0),
        (4, "FAILED", "", 3),
        (5, "CANCELLED", "", 0),
    ]


def test_accounting_knows_what_the_controller_has_forgotten(tools: Path, run: RunFolder) -> None:
    says(tools, "scontrol", FORGOTTEN)
    says(tools, "sacct", "echo '4|FAILED|3:0|'")
    with pytest.raises(Unknown):
        controlled(4)
    assert job_lines(run) == ["Slurm job 4: FAILED"]
    assert follow(4, run) == 3


def test_without_accounting_the_runs_own_record_counts(tools: Path, run: RunFolder) -> None:
    says(tools, "scontrol", FORGOTTEN)
    says(tools, "sacct", NO_ACCOUNTING)
    assert job_lines(run) == [
        "Slurm job 4: unknown (the controller does not know job 4, and accounting says nothing of it)",
        "  its last start ended with 3: failed with exit code 3; it would fail again",
    ]
    assert follow(4, run) == 3


def test_a_job_of_which_nobody_knows_how_it_ended_can_be_submitted_again(
    tools: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    says(tools, "scontrol", FORGOTTEN)
    says(tools, "sacct", NO_ACCOUNTING)
    write_starts(
        run,
        [Start(job=4, restarts=0, began="", progress="", ended=75), Start(job=4, restarts=1, began="", progress="")],
    )
    assert len(job_lines(run)) == 1
    assert follow(4, run) == 75
    assert "the same command submits the run again" in capsys.readouterr().err


def test_what_accounting_takes_to_run_does_not_when_the_controller_does_not_know_it(tools: Path) -> None:
    says(tools, "scontrol", FORGOTTEN)
    says(tools, "sacct", "echo '4|RUNNING|0:0|'")
    with pytest.raises(Unknown, match="accounting has it as RUNNING still"):
        show(4)


def test_only_what_the_controller_has_is_requeued(tools: Path) -> None:
    """Accounting may have a job as running for ever that the controller has lost."""
    says(tools, "scontrol", FORGOTTEN)
    says(tools, "sacct", "echo '4|RUNNING|0:0|'")
    here = Allocation(job=4, restarts=0, nodes=1, node_list="n1", cpus=None, name="4")
    with pytest.raises(SlurmError):
        still_runs(here)
    assert carry_out(Decision(Next.REQUEUE, "", 75), here) == 75
    calls = (tools / "calls").read_text()
    assert "scontrol show job" in calls
    assert "requeue" not in calls
    assert "sacct" not in calls
