"""A run as the driver sees it, with stand-ins for the processes that compute."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from drive_fixtures import Driven, driven

from trainer.config import PackingConfig
from trainer.console import gigabytes
from trainer.drive.environment import commit_of, cpu_of, gpu_names, installed, is_dirty
from trainer.drive.folder import make_folder
from trainer.drive.lock import Holder, hold
from trainer.drive.overview import memory_text, waiting_text
from trainer.drive.prepared import ScheduleView, read_prepared, read_schedule
from trainer.drive.run import do_existing, do_new
from trainer.drive.space import bytes_needed, model_width, require_space, trained_parameters
from trainer.errors import ConfigError, RunError, TrainingFault
from trainer.paths import RunFolder

ALL = ["prepare rank 0", "baseline,train,evaluate,export rank 0", "verify rank 0", "card rank 0"]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driven:
    monkeypatch.chdir(tmp_path)  # ``-m stand_in_...`` is found in the current folder
    return driven(tmp_path)


def do(driver: Driven, verb: str, *overrides: str) -> int:
    config = driver.config(*overrides)
    return do_new(verb, config, cwd=driver.folder, command="python -m trainer TYPED", programs=driver.programs)


def do_again(driver: Driven, verb: str, run: RunFolder, *overrides: str) -> int:
    return do_existing(
        verb, run.root, overrides, cwd=driver.folder, command="python -m trainer TYPED", programs=driver.programs
    )


def run_of(driver: Driven) -> RunFolder:
    (root,) = (driver.folder / "outputs" / "smoke").iterdir()
    return RunFolder(root)


# -- a whole run ---------------------------------------------------------------------------------------------------


def test_a_run_does_every_stage_once_and_shows_the_result(driver: Driven, capsys: pytest.CaptureFixture[str]) -> None:
    assert do(driver, "run") == 0

    folder = run_of(driver)
    printed = capsys.readouterr().out
    words = [line.split() for line in printed.splitlines()]
    assert driver.journal() == ALL
    assert folder.done.read_text().startswith(folder.root.name)
    (scored,) = [line for line in words if line[:1] == ["exact_match"]]
    assert [word for word in scored if word in ("0.0000", "0.7500")] == ["0.0000", "0.7500"]
    assert ["loss", "3.5000", "0.5000"] in words
    assert ["train", "1:01", "steps", "4,", "loss", "0.25"] in words
    assert ["together", "7:07"] in words
    assert ["merged", "model", str(folder.merged), "(0.0", "kB)"] in words


@pytest.mark.parametrize("gone", ["arena", "base", "prepared.json"])
def test_what_has_gone_from_the_cache_is_prepared_again_when_it_is_needed(driver: Driven, gone: str) -> None:
    do(driver, "run")
    folder = run_of(driver)
    lost = folder.root / gone
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    if gone != "prepared.json":  # the closing table reads it
        do(driver, "run")
        assert driver.journal() == ALL, "a finished run needs neither"
    (folder.stages / "evaluate.json").unlink()
    do(driver, "run")
    assert driver.journal() == [*ALL, "prepare rank 0", "evaluate rank 0"]


def test_what_a_run_was_done_with_is_in_its_folder(driver: Driven) -> None:
    do(driver, "run")

    folder = run_of(driver)
    described = json.loads(folder.env_json.read_text())
    assert "experiment" not in folder.config_yaml.read_text()
    assert "name: smoke" in folder.config_yaml.read_text()
    assert json.loads(folder.plan_json.read_text())["identity"] == folder.root.name
    assert described["device"] == "cpu"
    assert described["packages"]["msgspec"] == msgspec.__version__
    assert "torchrun" not in described["packages"]


def test_where_nothing_is_exported_nothing_is_verified(driver: Driven, capsys: pytest.CaptureFixture[str]) -> None:
    assert do(driver, "run", "export=none") == 0

    assert driver.journal() == [line for line in ALL if "verify" not in line]
    assert "verify: nothing was exported" in capsys.readouterr().out
    assert run_of(driver).done.exists()


def test_the_same_command_again_starts_nothing(driver: Driven, capsys: pytest.CaptureFixture[str]) -> None:
    do(driver, "run")
    before = run_of(driver).done.stat().st_mtime_ns

    assert do(driver, "run") == 0

    assert driver.journal() == ALL
    assert run_of(driver).done.stat().st_mtime_ns == before
    assert f"everything was done before, with the same inputs: {run_of(driver).root}" in capsys.readouterr().out


def test_a_stage_whose_inputs_changed_is_done_again_with_what_hangs_on_it(driver: Driven) -> None:
    do(driver, "run")

    assert do(driver, "run", "eval.batch_tokens=512") == 0

    assert driver.journal()[4:] == ["baseline,evaluate rank 0", "card rank 0"]


def test_an_interrupted_run_goes_on_where_it_was(driver: Driven, capsys: pytest.CaptureFixture[str]) -> None:
    driver.program("stand_in_ranks", "sys.exit(75)")
    assert do(driver, "run") == 75
    assert "to continue, type:\n  python -m trainer TYPED" in capsys.readouterr().out
    assert not run_of(driver).done.exists()
    driver.program("stand_in_ranks", "")

    assert do(driver, "run") == 0

    assert driver.journal() == [*ALL[:2], *ALL[1:]]


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (
            "print('error: rank 1 is frozen or dead', flush=True); sys.exit(74)",
            "ended with exit code 74: rank 1 is frozen",
        ),
        ("import signal; os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL (out of memory, or killed by"),
    ],
)
def test_a_fault_from_outside_is_said_and_can_be_continued(
    driver: Driven, capsys: pytest.CaptureFixture[str], end: str, how: str
) -> None:
    driver.program("stand_in_ranks", end)
    assert do(driver, "run") == 75
    printed = capsys.readouterr()
    assert f"error: rank 0 {how}" in printed.err
    assert "what was saved is intact; to continue, type:\n  python -m trainer TYPED" in printed.out


def test_ctrl_c_reaches_the_ranks_and_75_comes_back(driver: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.program(
        "stand_in_ranks",
        "import signal\nsignal.signal(signal.SIGINT, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\nwhile True: signal.pause()",
    )
    heard: list[str] = []

    def hear(text: str = "") -> None:
        heard.append(text)
        if text == "ready":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("trainer.console.say", hear)

    assert do(driver, "run") == 75
    assert heard[-2:] == [
        "stopping in good order; Ctrl-C once more ends everything at once",
        "stopped in good order. Nothing is lost; to continue, type:\n  python -m trainer TYPED",
    ]


@pytest.mark.parametrize("code", [2, 76, 3])
def test_the_code_of_a_process_comes_back(driver: Driven, capsys: pytest.CaptureFixture[str], code: int) -> None:
    driver.program("stand_in_prepare", f"print('error: line 3 is not JSON'); sys.exit({code})")

    assert do(driver, "run") == code

    printed = capsys.readouterr()
    assert "error: line 3 is not JSON" in printed.out
    # What the user can mend has been said by the process itself; for the rest the cause and its log are named.
    log = run_of(driver).logs / "prepare.log"
    cause = f"error: prepare ended with exit code {code}: line 3 is not JSON (log: {log})\n"
    assert printed.err == ("" if code == 2 else cause)
    assert driver.journal() == ["prepare rank 0"]


def test_of_a_rank_that_is_not_shown_the_end_of_its_log_is(driver: Driven, capsys: pytest.CaptureFixture[str]) -> None:
    driver.program(
        "stand_in_ranks",
        "import signal\nif rank == '0': signal.pause()\nprint('error: the template cannot mask'); sys.exit(2)",
    )

    assert do(driver, "run", "launch.processes=2") == 2

    printed = capsys.readouterr()
    assert "  | error: the template cannot mask" in printed.out
    assert "error: rank 1 ended with exit code 2: the template cannot mask" in printed.err


def test_a_process_that_leaves_no_marker_is_a_defect(driver: Driven) -> None:
    driver.program("stand_in_prepare", "sys.exit(0)")

    with pytest.raises(TrainingFault, match="a process ended well without finishing its work") as caught:
        do(driver, "run")

    assert caught.value.problems[0].got == "no current marker of: prepare"


def test_the_files_to_start_by_hand_are_written_and_shown(driver: Driven, capsys: pytest.CaptureFixture[str]) -> None:
    do(driver, "run")

    assert (run_of(driver).launch / "accelerate.yaml").read_text().startswith("compute_environment")
    lines = run_of(driver).launch / "by_hand.txt"
    torchrun, accelerate = lines.read_text().splitlines()
    assert "-m torch.distributed.run" in torchrun
    assert "-m accelerate.commands.launch" in accelerate
    assert str(lines) in capsys.readouterr().out


# -- single verbs --------------------------------------------------------------------------------------------------


def test_plan_prints_what_would_be_done_and_stops(driver: Driven, capsys: pytest.CaptureFixture[str]) -> None:
    assert do(driver, "plan") == 0

    printed = capsys.readouterr()
    words = [" ".join(line.split()) for line in printed.out.splitlines()]
    assert driver.journal() == ["prepare rank 0"]
    assert "model builtin:tiny, 1,000 parameters" in words
    assert "dtype float32 (no bf16 instructions)" in words
    assert "packs 7 in an epoch, 95.0 % filled" in words
    assert "steps 4 (2.0 in an epoch)" in words
    assert "tokens per step 5,000" in words
    assert "memory of a rank unknown for this architecture" in words
    assert "train 3 3 1,234 99 60" in words
    assert "validation - - - - -" in words
    assert "prepare skipped: done 2026-01-01T00:00:00+00:00, nothing it depends on has changed" in words
    assert "train runs" in words
    assert printed.err.splitlines() == [
        "warning: 2 rows left out: no target",
        "warning: 1 documents were cut to the capacity",
    ]


def test_plan_of_a_finished_run_with_other_inputs(driver: Driven, capsys: pytest.CaptureFixture[str]) -> None:
    do(driver, "run")

    assert do(driver, "plan", "export.max_shard_gb=1") == 0

    again = "runs again: what it depends on has changed since 2026-01-01T00:00:00+00:00"
    words = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[0] for line in words if again in line] == ["export", "verify", "card"]


def test_a_stage_of_an_existing_run(driver: Driven, capsys: pytest.CaptureFixture[str]) -> None:
    do(driver, "train")
    run = run_of(driver)
    assert (
        f"left to do for the whole run: baseline, evaluate, export, verify, card (python -m trainer run {run.root})"
        in (capsys.readouterr().out)
    )

    assert [do_again(driver, verb, run) for verb in ("evaluate", "export", "verify", "run")] == [0, 0, 0, 0]

    assert driver.journal() == [
        "prepare rank 0",
        "train rank 0",
        "baseline,evaluate rank 0",
        "export rank 0",
        "verify rank 0",
        "card rank 0",
    ]
    assert run.done.exists()


def test_an_override_of_an_existing_run(driver: Driven) -> None:
    do(driver, "run")

    assert do_again(driver, "export", run_of(driver), "export.max_shard_gb=1") == 0

    assert driver.journal()[4:] == ["export rank 0"]
    assert not run_of(driver).done.exists()
    assert "max_shard_gb: 1.0" in run_of(driver).config_yaml.read_text()


def test_a_run_folder_that_was_moved_is_still_a_run(driver: Driven) -> None:
    do(driver, "run")
    moved = RunFolder(driver.folder / "kept")
    shutil.move(run_of(driver).root, moved.root)

    assert do_again(driver, "verify", moved) == 0
    assert do_again(driver, "run", moved) == 0

    assert driver.journal() == ALL


def test_a_group_cannot_be_chosen_again(driver: Driven) -> None:
    do(driver, "train")

    with pytest.raises(ConfigError, match="a run that exists has its config already") as caught:
        do_again(driver, "export", run_of(driver), "export=merged", "export.adapter=false")

    assert [problem.got for problem in caught.value.problems] == ["export=merged"]


@pytest.mark.parametrize(("verb", "needed"), [("evaluate", "train"), ("export", "train"), ("verify", "export")])
def test_what_a_stage_needs_is_named(driver: Driven, verb: str, needed: str) -> None:
    with pytest.raises(RunError, match=f"the stage '{needed}' comes first") as caught:
        do(driver, verb)

    assert caught.value.problems[0].got == "not finished"
    assert caught.value.problems[0].do == f"python -m trainer {needed} {run_of(driver).root}"
    assert driver.journal() == []


def test_an_export_of_other_inputs_is_not_verified(driver: Driven) -> None:
    do(driver, "run")

    with pytest.raises(RunError, match="the stage 'export' comes first") as caught:
        do(driver, "verify", "export.max_shard_gb=1")

    assert caught.value.problems[0].got == "finished 2026-01-01T00:00:00+00:00 with other inputs"


# -- the folder ----------------------------------------------------------------------------------------------------


def test_a_folder_of_another_run_is_refused_with_the_differences(driver: Driven) -> None:
    given = f"run.dir={driver.folder / 'mine'}"
    do(driver, "train", given)

    with pytest.raises(RunError, match="the run folder holds a run that trains differently") as caught:
        do(driver, "train", given, "run.seed=7", "optim.lr=0.5")

    problem = caught.value.problems[0]
    assert problem.where == str(driver.folder / "mine")
    assert "run.seed: 0 -> 7" in problem.got
    assert "optim.lr" in problem.got
    assert "method" not in problem.got
    assert driver.journal() == ["prepare rank 0", "train rank 0"]


def test_other_code_goes_on_and_says_so(driver: Driven, capsys: pytest.CaptureFixture[str]) -> None:
    given = f"run.dir={driver.folder / 'mine'}"
    do(driver, "prepare", given)
    plan = driver.folder / "mine" / "plan.json"
    stored = json.loads(plan.read_text())
    plan.write_text(json.dumps({**stored, "code_version": "0.0.1"}))

    assert do(driver, "train", given) == 0

    version = stored["code_version"]
    assert f"warning: this run was worked on by version 0.0.1; it goes on with {version}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(RunError, match="cannot write into the run folder") as caught:
        make_folder(RunFolder(tmp_path / "file" / "run"))

    assert caught.value.problems[0].got == "Not a directory"


def test_a_run_in_use_is_refused_and_its_holder_named(driver: Driven) -> None:
    do(driver, "prepare")
    run = run_of(driver)

    with hold(run.lock, "train"), pytest.raises(RunError, match="this run folder is in use") as caught:
        do_again(driver, "train", run)

    problem = caught.value.problems[0]
    assert problem.where == str(run.root)
    assert problem.got.startswith(f"'train' of process {os.getpid()} on ")


def test_a_lock_whose_holder_has_not_written_yet(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError) as caught, hold(path, "run"):
            pass

    assert caught.value.problems[0].got == "a process that has not written its name yet"


def test_a_lock_left_behind_locks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with hold(path, "run"):
        pass

    with hold(path, "evaluate"):
        assert msgspec.json.decode(path.read_bytes(), type=Holder).doing == "evaluate"


def test_a_rank_keeps_the_lock_of_a_driver_that_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with hold(path, "run") as handle:
        inherited = os.dup(handle)  # what a rank has: the same open file
    try:
        with pytest.raises(RunError, match="this run folder is in use"), hold(path, "run"):
            pass
    finally:
        os.close(inherited)

    with hold(path, "run"):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)

    with (
        pytest.raises(RunError, match="the file system of the run folder has no file locks") as caught,
        hold(tmp_path / "run.lock", "run"),
    ):
        pass

    assert caught.value.problems[0].got == "No locks available"


# -- space ---------------------------------------------------------------------------------------------------------


def test_what_will_be_written_is_added_up() -> None:
    need = bytes_needed(weight_bytes=1000, trainable=10, keep=2, trains=True, exports_adapter=True, exports_merged=True)

    assert (need.checkpoints, need.export, need.total) == (4 * 120, 1040, int(1520 * 1.05))


def test_what_is_written_already_needs_no_space() -> None:
    need = bytes_needed(
        weight_bytes=1000, trainable=10, keep=2, trains=False, exports_adapter=False, exports_merged=False
    )

    assert need.total == 0


@pytest.mark.parametrize(
    ("free", "message"),
    [(900_000_000, "no space for the export"), (1_500_000_000, "no space for the checkpoints and the export")],
)
def test_too_little_space_is_refused_with_both_numbers(tmp_path: Path, free: int, message: str) -> None:
    need = bytes_needed(
        weight_bytes=10**9, trainable=10**7, keep=2, trains=True, exports_adapter=False, exports_merged=True
    )

    with pytest.raises(RunError, match=message) as caught:
        require_space(tmp_path, need, free_bytes=lambda _: free)

    problem = caught.value.problems[0]
    assert (problem.what, problem.got) == (message, f"{gigabytes(free)} free")
    assert problem.allowed == "at least 1.6 GB: checkpoints 480.0 MB, export 1.0 GB"


def test_enough_space_is_enough(tmp_path: Path) -> None:
    need = bytes_needed(weight_bytes=100, trainable=0, keep=2, trains=True, exports_adapter=False, exports_merged=True)

    require_space(tmp_path, need, free_bytes=lambda _: need.total)


def test_no_rank_starts_without_space(driver: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))

    with pytest.raises(RunError, match="no space for the export"):
        do(driver, "run")

    assert driver.journal() == ["prepare rank 0"]


@pytest.mark.parametrize(("rank", "expected"), [(None, 1000), (8, 250), (800, 1000)])
def test_trained_parameters(rank: int | None, expected: int) -> None:
    assert trained_parameters(1000, rank=rank, width=64) == expected


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ('{"hidden_size": 576}', 576),
        ('{"n_embd": 768}', 768),
        ('{"d_model": 512}', 512),
        ('{"text_config": {"hidden_size": 640}}', 640),
        ("{}", 1024),
        ("not JSON", 1024),
    ],
)
def test_the_width_of_a_model(tmp_path: Path, text: str, width: int) -> None:
    (tmp_path / "config.json").write_text(text)

    assert model_width(tmp_path) == width


def test_what_is_lost_by_waiting_comes_with_what_helps() -> None:
    schedule = ScheduleView(packs=9, fill=0.9, steps=9, steps_per_epoch=3.0, tokens_per_step=900.0)
    tokens, time = PackingConfig(), PackingConfig(cost="time")
    assert waiting_text(0.12, schedule, tokens, 8) == (
        "ranks wait 12 % of the time for the slowest one, once per step, estimated from the model's shape; "
        "packing.cost=time makes packs that take equally long"
    )
    assert ", in every micro-batch, " in waiting_text(0.12, replace(schedule, sync="micro"), tokens, 8)
    assert waiting_text(0.001, schedule, tokens, 8).endswith("estimated from the model's shape")
    by_time = replace(schedule, by_time=True)
    assert waiting_text(0.001, by_time, time, 8).endswith("estimated from the model's shape")
    assert waiting_text(0.001, by_time, replace(time, cost_ratio=2e-5), 8).endswith("packing.cost_ratio=2e-05")
    long = "a document takes longer than a pack may, so packs are filled by tokens"
    assert waiting_text(0.12, schedule, time, 8).endswith(f"{long}, and those of a step dealt to the ranks by time")
    assert waiting_text(0.12, schedule, time, 1).endswith(
        f"{long}, and with one micro-batch a step there is nothing to deal"
    )


def test_bytes_for_people() -> None:
    assert [gigabytes(count) for count in (2_500_000_000, 1_000_000, 50)] == ["2.5 GB", "1.0 MB", "0.1 kB"]
    assert memory_text(None) == "unknown for this architecture"


# -- files of other processes --------------------------------------------------------------------------------------


def test_a_file_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.prepared_json.write_text('{"base": 3}')

    with pytest.raises(RunError, match="a file of the run is not what it should be") as damaged:
        read_prepared(folder)
    with pytest.raises(RunError, match="a file of the run is not what it should be") as missing:
        read_schedule(folder)

    assert damaged.value.problems[0].got == "Expected `object`, got `int` - at `$.base`"
    assert missing.value.problems[0].got == "no such file"
    again = f"remove {tmp_path}/stages/prepare.json and start the same command again: it writes the file anew"
    assert [fault.value.problems[0].do for fault in (damaged, missing)] == [again, again]


# -- the machine ---------------------------------------------------------------------------------------------------


def test_a_cpu_and_what_makes_it_fast(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "model name\t: Big CPU\nflags\t\t: fpu avx2 avx512_bf16\n\nmodel name\t: Other\nflags\t: amx_bf16\n"
    )

    assert cpu_of(cpuinfo) == ("Big CPU", ["avx512_bf16", "avx2"])
    assert cpu_of(tmp_path / "none") == ("", [])


def test_gpus_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_names() == []

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H100\n")
    tool.chmod(0o755)
    assert gpu_names() == ["NVIDIA H100"]


def test_the_code_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (commit_of(tmp_path), is_dirty(tmp_path)) == ("", False)

    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b")
    subprocess.run(
        "git init -q && touch file && git add file && git commit -qm one", shell=True, cwd=tmp_path, check=True
    )
    assert (len(commit_of(tmp_path)), is_dirty(tmp_path)) == (40, False)

    (tmp_path / "file").write_text("changed")
    assert is_dirty(tmp_path)


def test_only_installed_packages_are_listed() -> None:
    assert list(installed(("msgspec", "no-such-package"))) == ["msgspec"]
