"""Trials of W&B sweeps as their tasks see them: what is on record, what goes on, and how a task ends."""

import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from cli_fixtures import ENVIRONMENT

from trainer.compose import compose
from trainer.drive.agent import Task, free_task, judge, read_sweep
from trainer.drive.lock import hold
from trainer.drive.trial import (
    SWEEPS,
    Trial,
    begin_trial,
    end_trial,
    note_folder,
    note_stop,
    placed,
    read_trial,
    write_trial,
)
from trainer.errors import UserError
from trainer.paths import RunFolder
from trainer_launch import slurm
from trainer_launch.agents import (
    ALONE,
    agent_environment,
    assignment,
    has_no_agent,
    run_and_pass_on,
    trial_environment,
)

TOLD = {"WANDB_SWEEP_ID": "sw1", "WANDB_RUN_ID": "r1", "WANDB_PROJECT": "demo", "HOME": "/home/me"}
TRIAL = Trial(sweep="sw1", run="r1", variables={}, words=["+experiment=smoke"], folder="/runs/r1")


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process that W&B's agent has started; gives where its record is."""
    monkeypatch.chdir(tmp_path)
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    return tmp_path / SWEEPS / "sw1" / "trials" / "r1.json"


def task_of(tmp_path: Path, trial: Trial | None) -> Task:
    task = Task(tmp_path / "task")
    task.starts.launch.mkdir(parents=True)
    if trial is not None:
        write_trial(task.trial_json, trial)
    return task


# -- what a trial leaves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing", [{"WANDB_RUN_ID": ""}, {"WANDB_SWEEP_ID": ""}, {"WANDB_RUN_ID": "../../etc"}, {"WANDB_SWEEP_ID": "a/b"}]
)
def test_only_an_agent_makes_a_trial(missing: dict[str, str]) -> None:
    found = assignment(TOLD)
    assert found is not None
    assert (found.sweep, found.run) == ("sw1", "r1")
    assert found.variables == {name: value for name, value in TOLD.items() if name != "HOME"}
    assert assignment(TOLD | missing) is None


def test_a_trial_has_a_folder_of_its_own_and_is_on_record(told: Path, tmp_path: Path) -> None:
    config = placed(compose(["+experiment=smoke", "run.root=here"], config_dir=None, cwd=tmp_path))
    assert config.run.dir == "here/sweeps/wandb/sw1/r1"
    given = placed(compose(["+experiment=smoke", "run.dir=mine"], config_dir=None, cwd=tmp_path))
    assert given.run.dir == "mine"
    begin_trial(["+experiment=smoke", "optim.lr=0.1"])
    note_folder(RunFolder(tmp_path / "run"))
    assert end_trial(2) == 2
    left = read_trial(told)
    assert left is not None
    assert (left.sweep, left.run, left.words, left.code) == ("sw1", "r1", ["+experiment=smoke", "optim.lr=0.1"], 2)
    assert (left.folder, left.variables["WANDB_PROJECT"], left.is_over) == (str(tmp_path / "run"), "demo", False)
    begin_trial(["run", "it"])  # the next start of it
    again = read_trial(told)
    assert again is not None
    assert (again.folder, again.code) == (left.folder, None)


def test_a_plain_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    begin_trial(["+experiment=smoke"])
    note_folder(RunFolder(tmp_path))
    note_stop("SIGTERM")
    assert end_trial(75) == 75
    assert not (tmp_path / "outputs").exists()
    config = compose(["+experiment=smoke"], config_dir=None, cwd=tmp_path)
    assert placed(config) == config


@pytest.mark.parametrize(("stop", "code"), [("SIGTERM", -signal.SIGTERM), ("", 75)])
def test_an_agent_does_not_count_a_stopped_trial_among_the_failures(told: Path, stop: str, code: int) -> None:
    """It takes every positive exit code for one, and gives up after some."""
    program = (
        "import sys; from trainer.drive.trial import *; "
        f"begin_trial(['x']); note_stop({stop!r}); sys.exit(end_trial(75))"
    )
    environment = {**ENVIRONMENT, **TOLD}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    left = read_trial(told)
    assert left is not None
    assert (ended.returncode, left.code, left.stopped_by) == (code, 75, stop)


# -- what a task makes of it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trial", "code", "signalled", "ends"),
    [
        (None, 0, False, 0),  # the sweep has no more
        (None, 0, True, 75),
        (None, 138, True, 75),
        (None, 138, False, 75),  # SIGUSR1 before it listened
        (None, 1, False, 1),  # no server, no key
        (replace(TRIAL, code=0), 0, False, 0),
        (replace(TRIAL, code=0), 0, True, 0),
        (replace(TRIAL, code=2), 0, False, 2),
        (replace(TRIAL, code=76), 0, False, 76),
        (replace(TRIAL, code=75, stopped_by="SIGTERM"), 0, True, 75),  # preempted
        (replace(TRIAL, code=75, stopped_by="SIGUSR1"), 0, False, 75),  # its time was over
        (replace(TRIAL, code=75), 0, False, 75),  # a rank was killed
        (TRIAL, 0, False, 137),  # it was killed
        (TRIAL, 0, True, 75),
    ],
)
def test_a_task_ends_as_its_trial(tmp_path: Path, trial: Trial | None, code: int, signalled: bool, ends: int) -> None:
    assert judge(task_of(tmp_path, trial), code, signalled=signalled) == ends


def test_a_trial_that_the_sweep_has_stopped_does_not_go_on(tmp_path: Path) -> None:
    task = task_of(tmp_path, replace(TRIAL, code=75, stopped_by="SIGTERM"))
    assert judge(task, 0, signalled=False) == 0
    left = read_trial(task.trial_json)
    assert left is not None
    assert left.is_over


def test_by_hand_a_stopped_trial_goes_on_and_a_failed_one_does_not(tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = free_task(tmp_path, stack)
        second = free_task(tmp_path, stack)  # somebody works on the first
        assert (first.root.name, second.root.name) == ("by_hand-1", "by_hand-2")
        write_trial(first.trial_json, replace(TRIAL, code=1))
        write_trial(second.trial_json, replace(TRIAL, code=75))
    with ExitStack() as stack:
        assert free_task(tmp_path, stack).root.name == "by_hand-2"
    write_trial(second.trial_json, replace(TRIAL, code=75, over=True))
    with ExitStack() as stack:
        assert free_task(tmp_path, stack).root.name == "by_hand-3"


@pytest.mark.parametrize("words", [[], ["a/b/c/d"], ["demo/sw1", "optim.lr=1"], ["a/b/"], ["optim.lr=1"], ["--count"]])
def test_an_agent_takes_one_sweep(words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        read_sweep(words)
    assert "python -m trainer agent ENTITY/PROJECT/ID" in str(refused.value)


def test_sweeps_are_named_as_wandb_prints_them() -> None:
    assert [read_sweep([name]) for name in ("me/demo/sw1", "demo/sw1", "sw1")] == ["me/demo/sw1", "demo/sw1", "sw1"]


# -- processes -----------------------------------------------------------------------------------------------------


def test_an_agent_finds_this_python_and_no_earlier_trial(
    told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = agent_environment(tmp_path / "trial.json")
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert environment["TRIMTAB_TRIAL"] == str(tmp_path / "trial.json")
    assert "WANDB_RUN_ID" not in environment
    assert not has_no_agent()
    alone = trial_environment(tmp_path / "trial.json", {"WANDB_SWEEP_ID": "sw1", "WANDB_RUN_ID": "r1"})
    assert (alone["WANDB_RUN_ID"], has_no_agent(alone)) == ("r1", True)
    monkeypatch.setenv(ALONE, "1")
    assert ALONE not in agent_environment(tmp_path / "trial.json")  # an agent that a trial starts is one again


@pytest.mark.parametrize(("forward", "code"), [(True, 7), (False, 0)])
def test_signals_are_passed_on_by_hand_and_not_in_a_step(forward: bool, code: int) -> None:
    """There, Slurm sends them to all processes; one that got them three times would be killed by the agent."""
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"
        f"signal.sigtimedwait([signal.SIGTERM], {30 if forward else 1})\n"
    )
    assert run_and_pass_on([sys.executable, "-c", program], ENVIRONMENT, forward=forward) == (code, True)


def test_a_task_of_an_array_is_not_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the tasks has the number of the whole array."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    here = slurm.allocation()
    assert here is not None
    assert here.name == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    here = slurm.allocation()
    assert here is not None
    assert (here.job, here.name) == (12, "12_3")


def test_a_task_that_somebody_works_on_is_taken(tmp_path: Path) -> None:
    task = task_of(tmp_path, TRIAL)
    with hold(task.starts.lock, "agent"), ExitStack() as stack:
        assert free_task(tmp_path, stack).root.name == "by_hand-1"
