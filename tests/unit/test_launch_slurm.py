"""Slurm jobs as text and as values: what is written, what Slurm says, and what follows. No Slurm is needed."""

import dataclasses
import re
import shlex
import socket
import threading
import time
from pathlib import Path

import msgspec
import pytest
from plan_fixtures import planned

from trainer.compose import compose
from trainer.drive.deadline import seconds_left, stopping_in_time
from trainer.drive.follow import Tail
from trainer.drive.job import agent_words, end, free_port, lock_is_free
from trainer.drive.lock import hold
from trainer.drive.progress import Start, progress_of, read_starts, stalls, write_starts
from trainer.drive.queue import job_comment, job_lines, job_name
from trainer.drive.run import do_new
from trainer.drive.submit import batch_spec, devices_of_job, first_missing
from trainer.errors import RunError
from trainer.fingerprint import digest
from trainer.markers import Marker, write_marker
from trainer.paths import RunFolder, shipped_slurm
from trainer.plan import make_plan
from trainer.rules import check
from trainer.train.checkpoint.format import FORMAT, FileInfo, Manifest, checkpoint_path
from trainer.train.state import TrainState
from trainer_launch.batch_script import (
    BatchSpec,
    batch_script,
    gpus_in,
    limit_seconds,
    meeting_port,
    sbatch_options,
    step_words,
)
from trainer_launch.jobs import Job, Next, decide, end_code, parse_accounting, parse_queue, parse_show, same_run
from trainer_launch.slurm import Allocation, NoAnswer, SlurmError, persistently, show, submit

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
TEMPLATE = (shipped_slurm() / "job.sbatch").read_text()


def spec(**changed: object) -> BatchSpec:
    given: dict[str, object] = {
        "name": "legal_lora-0123456789",
        "comment": "trimtab /runs/legal_lora/0123456789",
        "log": "/runs/legal_lora/0123456789/logs/slurm.log",
        "folder": "/home/me",
        "words": ("/env/bin/python", "-m", "trainer.drive.job", "/runs/legal_lora/0123456789", "--verb", "run"),
        "nodes": 1,
        "grace": 120,
    }
    return BatchSpec(**{**given, **changed})  # type: ignore[arg-type]


EVERYTHING: dict[str, object] = {
    "comment": 'trimtab /runs/my "best" run #1',
    "log": "/runs/my run/100%/slurm.log",
    "folder": "/home/me/my project",
    "nodes": 4,
    "time": "1-12:00:00",
    "account": "law",
    "partition": "gpu,long",
    "qos": "high",
    "constraint": "a100|h100",
    "gres": "gpu:a100:4",
    "cpus": 32,
    "mem": "200G",
    "options": ("--exclusive", "--mail-type=END"),
    "prolog": ("module purge", 'module load "cuda/12.8"', "export NCCL_SOCKET_IFNAME=ib0"),
}


@pytest.mark.parametrize(("name", "this"), [("slurm_least", spec()), ("slurm_most", spec(**EVERYTHING))])
def test_scripts_are_those_on_record(name: str, this: BatchSpec) -> None:
    agent = ("apptainer", "exec", "torch.sif", "python", "-m", "trainer", "run", "/runs/my run")
    step = step_words(agent, nodes=this.nodes, cpus=this.cpus, options=("--mpi=none",) if this.gres else ())
    text = f"{batch_script(this, TEMPLATE)}# the step\n{shlex.join(step)}\n"
    path = GOLDEN / f"{name}.txt"
    assert text == path.read_text(), f"if this is meant, put the new text into {path}"


def test_a_template_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="needs"):
        batch_script(spec(), TEMPLATE.replace("@PROLOG@", ""))


def test_values_stay_one_word_of_their_line() -> None:
    (comment,) = [word for word in sbatch_options(spec(comment='a "b" \\ #c')) if word.startswith("--comment")]
    assert comment == '--comment="a \\"b\\" \\\\ #c"'


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        (None, 0),
        ("gpu", 1),
        ("gpu:4", 4),
        ("gpu:a100", 1),
        ("gpu:a100:2,nvme:1", 2),
        ("gpu:a:2,gpu:b:1", 3),
        ("mps:9", 0),
    ],
)
def test_gpus_are_counted(gres: str | None, gpus: int) -> None:
    assert gpus_in(gres) == gpus


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("4:00:00", 14400),
        ("2-12", 216000),
        ("1-0:30", 88200),
        ("0-0:0:5", 5),
        ("soon", None),
    ],
)
def test_time_limits_are_read(time: str, seconds: int | None) -> None:
    assert limit_seconds(time) == seconds


def test_ports_differ_between_neighbours_and_starts() -> None:
    ports = [meeting_port(job, start) for job in range(1000, 1100) for start in range(7)]
    assert len(set(ports)) == len(ports)
    assert all(15_000 <= meeting_port(job, 3) < 30_000 for job in (1, 67_108_863))


# -- what Slurm says -----------------------------------------------------------------------------------------------

SHOWN = (
    "JobId=7 JobName=x UserId=me(1) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 "
    "ExitCode=75:0 TimeLimit=00:10:00 StartTime=2026-01-02T00:00:00 EndTime=2026-01-02T00:10:00 "
    "Comment=trimtab /a JobState=LIE StdOut=/a"
)


def test_a_job_is_read() -> None:
    job = parse_show(SHOWN)
    assert job is not None
    assert (job.id, job.state, job.restarts, job.exit_code, job.signal) == (7, "RUNNING", 2, 75, 0)
    assert job.end == time.mktime((2026, 1, 2, 0, 10, 0, 0, 0, -1))
    unlimited = parse_show(SHOWN.replace("TimeLimit=00:10:00", "TimeLimit=UNLIMITED"))
    assert unlimited is not None
    assert unlimited.end is None
    assert parse_show("No jobs in the system") is None


def test_lists_of_jobs_are_read() -> None:
    queue = parse_queue("12|PENDING|Priority|trimtab /a|b\n9|COMPLETED|None|trimtab /c\nslurm_load_jobs error\n")
    assert [(job.id, job.state, job.comment) for job in queue] == [
        (9, "COMPLETED", "trimtab /c"),
        (12, "PENDING", "trimtab /a|b"),
    ]
    assert [job.id for job in same_run(queue, "trimtab /a|b")] == [12]
    (one,) = parse_accounting("12|CANCELLED by 1000|0:15|\n12.batch|CANCELLED|0:15|\n")
    assert (str(one), one.signal, end_code(one)) == ("job 12: CANCELLED (by 1000)", 15, 75)
    assert same_run([one], "trimtab /a") == [one]  # accounting without comments


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (Job(id=1, state="COMPLETED", exit_code=0), 0),
        (Job(id=1, state="FAILED", exit_code=2), 2),
        (Job(id=1, state="CANCELLED", exit_code=75), 75),
        (Job(id=1, state="TIMEOUT", exit_code=0, signal=15), 75),
        (Job(id=1, state="NODE_FAIL"), 75),
        (Job(id=1, state="CANCELLED", exit_code=0, signal=0), 75),
        (Job(id=1, state="OUT_OF_MEMORY", exit_code=0, signal=9), 137),
        (Job(id=1, state="DEADLINE"), 1),
    ],
)
def test_what_a_job_stands_for(job: Job, code: int) -> None:
    assert end_code(job) == code


RUNNING = Job(id=1, state="RUNNING", restarts=1)


@pytest.mark.parametrize(
    ("code", "job", "stalls", "follows", "ends"),
    [
        (0, RUNNING, 9, Next.NOTHING, 0),
        (75, RUNNING, 0, Next.REQUEUE, 75),
        (74, RUNNING, 2, Next.REQUEUE, 74),
        (143, RUNNING, 0, Next.REQUEUE, 143),
        (75, RUNNING, 3, Next.HOLD, 76),
        (76, RUNNING, 0, Next.HOLD, 76),
        (2, RUNNING, 0, Next.NOTHING, 2),
        (137, RUNNING, 0, Next.REQUEUE, 137),  # killed, for its memory perhaps: three times at most
        (137, RUNNING, 3, Next.HOLD, 76),
        (75, Job(id=1, state="COMPLETING", restarts=1), 0, Next.NOTHING, 75),  # scancel
        (75, Job(id=1, state="CANCELLED", restarts=1), 0, Next.NOTHING, 75),
        (76, Job(id=1, state="COMPLETING", restarts=1), 0, Next.NOTHING, 76),
        (75, Job(id=1, state="COMPLETING", restarts=2), 9, Next.NOTHING, 75),  # requeued by Slurm
        (75, Job(id=1, state="RUNNING", restarts=2), 0, Next.NOTHING, 75),  # a newer start runs, on other machines
        (75, None, 0, Next.NOTHING, 75),
    ],
)
def test_what_follows_on_a_start(code: int, job: Job | None, stalls: int, follows: Next, ends: int) -> None:
    decision = decide(code, job, restarts=1, stalls=stalls, max_stalls=3)
    assert (decision.next, decision.code) == (follows, ends)


def test_a_port_that_somebody_listens_at_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert port < free_port("127.0.0.1", port) < port + 100
        assert free_port("192.0.2.1", port) == port, "another machine is not asked"


# -- the commands, with stand-ins ----------------------------------------------------------------------------------


def tool(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_lost_reply_and_a_refusal_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path / "bin", "sbatch", "echo '12;cluster'", monkeypatch)
    assert submit(tmp_path / "job.sbatch") == 12
    tool(
        tmp_path / "bin",
        "sbatch",
        "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1",
        monkeypatch,
    )
    with pytest.raises(NoAnswer, match=r"^Socket timed out on send/recv operation$"):
        submit(tmp_path / "job.sbatch")
    tool(tmp_path / "bin", "sbatch", "echo 'sbatch: error: Invalid qos specification' >&2; exit 1", monkeypatch)
    with pytest.raises(SlurmError, match=r"^Invalid qos specification$") as refused:
        submit(tmp_path / "job.sbatch")
    assert not isinstance(refused.value, NoAnswer)


def test_a_job_that_the_controller_forgot_is_looked_up_in_accounting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(
        tmp_path / "bin", "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", monkeypatch
    )
    tool(tmp_path / "bin", "sacct", "echo '12|FAILED|2:0|'", monkeypatch)
    assert show(12) == Job(id=12, state="FAILED", exit_code=2, signal=0)


def test_only_silence_is_asked_again() -> None:
    answers: list[Exception] = [NoAnswer("silence"), SlurmError("no")]

    def ask() -> None:
        raise answers.pop(0)

    with pytest.raises(SlurmError, match="no"):
        persistently(ask, tries=3, pause=0.0)
    assert not answers


# -- the run -------------------------------------------------------------------------------------------------------

SLURM = ("launch=slurm", "launch.device=cpu")


def test_the_job_of_a_plan(tmp_path: Path) -> None:
    config = compose(
        [
            "model=tiny",
            "data.train=rows.jsonl",
            "launch=slurm",
            "launch.gres=gpu:2",
            "launch.nodes=2",
            "launch.time=60",
        ],
        config_dir=None,
        cwd=tmp_path,
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    plan = make_plan(config, devices=devices_of_job(config), cwd=tmp_path)
    assert (plan.device, plan.nodes, plan.processes, plan.world_size) == ("cuda", 2, 2, 4)
    folder = RunFolder(Path(plan.run_dir))
    made = batch_spec(plan, folder, ["true"], tmp_path)
    assert (made.name, made.comment) == (f"run-{plan.identity}", f"trimtab {plan.run_dir}")
    assert (made.name, made.comment) == (job_name(plan), job_comment(folder))
    assert (made.nodes, made.gres, made.time, made.grace) == (2, "gpu:2", "60", 120)


def test_an_agent_is_told_what_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path / "bin", "scontrol", 'echo "$3" | tr , "\\n"', monkeypatch)
    plan = planned(tmp_path, *SLURM, "launch.container=[apptainer,exec]", "launch.python=/opt/python")
    here = Allocation(job=12, restarts=1, nodes=2, node_list="n3,n4", cpus=None, name="12")
    words = agent_words(plan, "train", here)
    assert words[:6] == ("apptainer", "exec", "/opt/python", "-m", "trainer", "train")
    assert words[6:] == (plan.run_dir, "launch.address=n3:15085", "launch.device=cpu", "launch.processes=1")


@pytest.mark.parametrize(
    ("overrides", "where", "what"),
    [
        (["launch.time=60"], "launch.time", "has no effect with launch=local"),
        (["launch.wait=true"], "launch.wait", "has no effect with launch=local"),
        (["launch=slurm", "launch.hosts=[a,b]"], "launch.hosts", "has no effect with launch=slurm"),
        (["launch=slurm", r'launch.partition="a\nb"'], "launch.partition", "is no value for sbatch"),
        (["launch=slurm", "launch.options=[-n4]"], "launch.options", "is no option"),
        (["launch=slurm", "launch.options=['--time=60']"], "launch.options", "is set by the submission"),
        (["launch=slurm", "launch.srun=[bash]"], "launch.srun", "is no option"),
        (["launch=slurm", "launch.time=2"], "launch.grace", "is not before the end of the job"),
    ],
)
def test_keys_that_cannot_be_meant(tmp_path: Path, overrides: list[str], where: str, what: str) -> None:
    config = compose(["model=tiny", "data.train=rows.jsonl", *overrides], config_dir=None, cwd=tmp_path)
    if "\\n" in str(overrides):
        config.launch.partition = "a\nb"
    (problem,) = check(config)
    assert problem.where == where
    assert problem.what.startswith(what)


def test_without_slurm_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    config = compose(["model=tiny", "data.train=rows.jsonl", "launch=slurm"], config_dir=None, cwd=tmp_path)
    with pytest.raises(RunError) as refused:
        do_new("run", config, cwd=tmp_path, command="")
    assert refused.value.exit_code == 2
    assert "no sbatch" in refused.value.problems[0].got
    assert not (tmp_path / "outputs").exists()


def test_a_run_that_was_never_submitted_says_nothing_of_slurm(tmp_path: Path) -> None:
    assert job_lines(RunFolder(tmp_path)) == []


def test_the_highest_folder_that_is_missing(tmp_path: Path) -> None:
    assert first_missing(tmp_path / "a" / "b" / "c") == tmp_path / "a"
    assert first_missing(tmp_path) is None


# -- progress ------------------------------------------------------------------------------------------------------


def start(progress: str, restarts: int = 0, ended: int | None = None) -> Start:
    return Start(job=1, restarts=restarts, began="", progress=progress, ended=ended)


def test_starts_without_progress_are_counted_from_the_last(tmp_path: Path) -> None:
    assert stalls([start("a"), start("b"), start("b")], "b") == 2
    assert stalls([start("b"), start("a")], "b") == 0
    folder = RunFolder(tmp_path)
    before = progress_of(folder)
    write_marker(folder, Marker(stage="prepare", inputs="", seconds=0.0, finished="2026-01-01"))
    assert progress_of(folder) != before


def checkpoint(folder: RunFolder, step: int) -> Path:
    path = checkpoint_path(folder.checkpoints, step)
    path.mkdir(parents=True)
    (path / "rank0.json").write_bytes(b"{}")
    made = Manifest(
        format=FORMAT,
        step=step,
        identity="",
        base="",
        world_size=1,
        state=TrainState(step=step),
        shapes={},
        files={"rank0.json": FileInfo(2, "")},
    )
    encoded = msgspec.json.encode(dataclasses.replace(made, sha256=digest(made)))
    (path / "manifest.json").write_bytes(encoded)
    return path


def test_the_newest_whole_checkpoint_is_progress(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoint(folder, 2)
    first = progress_of(folder)
    assert "step-00000002" in first
    newer = checkpoint(folder, 4)
    assert "step-00000004" in progress_of(folder)
    (newer / "rank0.json").write_bytes(b"{")
    assert progress_of(folder) == first


def test_after_a_hold_the_count_begins_anew(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_starts(folder, [start("a", 0, 75), start("a", 1, 75), start("a", 2)])
    end(folder, start("a", 2, 76))
    assert stalls(read_starts(folder), "a") == 0
    assert [one.ended for one in read_starts(folder)] == [75, 75, 76]
    folder.starts_json.write_text("{")
    assert read_starts(folder) == []


def test_a_start_waits_for_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, signalled = RunFolder(tmp_path), threading.Event()
    assert lock_is_free(folder, signalled, seconds=0.0)
    with hold(folder.lock, "train"):
        assert not lock_is_free(folder, signalled, seconds=0.0)
        signalled.set()
        assert not lock_is_free(folder, signalled, seconds=1e9)
    assert "the run is still held by 'train' of process" in capsys.readouterr().err
    assert lock_is_free(folder, signalled, seconds=0.0)


# -- the end of time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "job_end", "left"),
    [
        (None, None, None),
        (60.0, None, 60.0),
        (None, 1000.0, 880.0),
        (60.0, 1000.0, 60.0),
        (None, 100.0, 50.0),
        (None, -5.0, 0.0),
    ],
)
def test_seconds_until_the_stop(limit: float | None, job_end: float | None, left: float | None) -> None:
    assert seconds_left(limit, job_end, 0.0, grace=120.0) == left


def test_the_end_of_time_stops_the_run_and_a_run_that_is_over_is_not_stopped() -> None:
    stopped = threading.Event()
    with stopping_in_time(0.0, grace=1.0, end_of_job=lambda: None, stop=stopped.set):
        assert stopped.wait(60)
    late, asked = threading.Event(), threading.Event()

    def never() -> None:
        asked.set()

    with stopping_in_time(1e6, grace=1.0, end_of_job=lambda: asked.set(), stop=late.set):
        assert asked.wait(60)
    assert not late.is_set()


def test_new_lines_of_a_log_come_once_and_whole(tmp_path: Path) -> None:
    log = tmp_path / "slurm.log"
    log.write_text("before\n")
    tail = Tail(log)
    with log.open("a") as handle:
        handle.write("one\ntw")
        handle.flush()
        assert tail.lines() == ["one"]
        handle.write("o\n")
        handle.flush()
    assert tail.lines() == ["two"]
    assert tail.lines() == []


def test_the_keys_of_a_slurm_job_have_no_part_in_its_identity(tmp_path: Path) -> None:
    one = planned(tmp_path, *SLURM, "launch.partition=a")
    two = planned(tmp_path, *SLURM, "launch.partition=b", "run.time_limit=5")
    assert one.identity == two.identity
    assert dataclasses.asdict(one) != dataclasses.asdict(two)
    assert re.fullmatch(r"[0-9a-f]{10}", one.identity)
