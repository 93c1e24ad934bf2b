"""launch=slurm from the command to the finished run, with agents that need no torch, on two nodes of a real Slurm."""

import re
from pathlib import Path

import pytest
from cli_fixtures import CANARIES, places_of
from drive_fixtures import Driven, driven
from slurm_cluster import Cluster, until
from slurm_stand_ins import Counted, with_agents

from trainer.drive.queue import job_lines, read_submission
from trainer.drive.run import do_existing, do_new
from trainer.drive.submit import submit_once
from trainer.errors import RunError
from trainer.paths import RunFolder
from trainer_launch.slurm import SlurmError

TIMED_OUT = "echo 'sbatch: error: Socket timed out on send/recv operation'"
LATER = "launch.options=['--begin=now+1hour']"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driven:
    monkeypatch.chdir(tmp_path)
    return driven(tmp_path)


def submit(programs: Driven, *overrides: str) -> int:
    config = with_agents(programs.config("optim.batch_packs=2", *overrides))
    return do_new("run", config, cwd=programs.folder, command="the same command")


def the_run(programs: Driven) -> RunFolder:
    (found,) = (programs.folder / "outputs" / "smoke").iterdir()
    return RunFolder(found)


def test_the_same_command_submits_once_and_a_finished_run_not_at_all(
    lab: Cluster, programs: Driven, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, secret in CANARIES.items():
        monkeypatch.setenv(name, secret)  # sbatch hands the environment on
    (programs.folder / "go").touch()
    assert submit(programs, "launch.wait=true") == 0
    out = capsys.readouterr().out
    folder, submission = the_run(programs), read_submission(the_run(programs))
    assert submission is not None
    assert f"submitted job {submission.job}" in out
    for line in (f"squeue -j {submission.job}", f"scancel {submission.job}"):
        assert line in out
    assert f"tail -F {folder.root}/logs/slurm.log" in out
    assert "2 rank(s) on cpu" in out  # launch.wait: the output of the job
    assert folder.done.exists()
    assert "baseline,train,evaluate,export rank 1" in programs.journal()
    assert submit(programs) == 0
    assert "everything was done before" in capsys.readouterr().out
    assert do_existing("run", folder.root, [], cwd=programs.folder, command="again") == 0
    assert len(lab.ask("squeue", "-h", "--states=all", f"--name={submission.name}").splitlines()) == 1
    assert job_lines(folder) == [f"Slurm job {submission.job}: COMPLETED"]
    assert [places_of(secret, programs.folder) for secret in CANARIES.values()] == [[]] * len(CANARIES)


def test_while_a_job_is_there_its_number_is_all_that_comes(
    lab: Cluster, programs: Driven, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(programs, LATER) == 0
    number = re.search(r"submitted job (\d+)", capsys.readouterr().out)
    assert number is not None
    written = the_run(programs).job_sbatch.stat().st_mtime_ns
    assert submit(programs, LATER) == 0
    out = capsys.readouterr().out
    assert f"has a job, so nothing was submitted: job {number[1]}: PENDING (BeginTime)" in out
    assert the_run(programs).job_sbatch.stat().st_mtime_ns == written
    assert job_lines(the_run(programs)) == [f"Slurm job {number[1]}: PENDING (BeginTime)"]
    lab.ask("scancel", number[1])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["launch.partition=nowhere"], "invalid partition specified: nowhere"),
        (["launch.time=soon"], "Invalid --time specification"),
    ],
)
def test_what_sbatch_refuses_leaves_nothing_behind(
    lab: Cluster, programs: Driven, overrides: list[str], said: str
) -> None:
    with pytest.raises(RunError) as refused:
        submit(programs, *overrides)
    assert refused.value.exit_code == 2
    assert said in refused.value.problems[0].got
    assert not (programs.folder / "outputs").exists()


def test_a_lost_reply_does_not_make_a_second_job(
    lab: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = Counted(tmp_path / "run")
    spec = counted.spec(total=1)
    counted.submit(spec)  # writes the script, and is an older job of this run
    lost = tmp_path / "bin" / "sbatch"
    lost.parent.mkdir()
    real = lab.ask("which", "sbatch")
    lost.write_text(f"""#!/bin/sh\n{real} "$@" >&2\n{TIMED_OUT} >&2\nexit 1\n""")
    lost.chmod(0o755)
    monkeypatch.setenv("PATH", f"{lost.parent}:{lab.environment['PATH']}")
    number = submit_once(counted.folder, spec.name, "run")
    assert number == max(lab.jobs())
    submission = read_submission(counted.folder)
    assert submission is not None
    assert submission.job == number
    assert "the reply of sbatch was lost; the job is there" in capsys.readouterr().err
    lost.write_text("#!/bin/sh\necho 'sbatch: error: Batch job submission failed: Access denied' >&2\nexit 1\n")
    with pytest.raises(SlurmError, match="Access denied"):
        submit_once(counted.folder, spec.name, "run")
    until(lab.is_quiet, "all jobs are over")
