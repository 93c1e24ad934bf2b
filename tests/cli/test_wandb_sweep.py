"""Sweeps of W&B from the search space to the last trial: the real client and agent, a server on the loopback."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from cli_fixtures import ENVIRONMENT, SECONDS
from wandb_server import KEY, WandbServer

from trainer.drive.trial import SWEEPS, Trial, read_trial
from trainer.markers import read_marker
from trainer.paths import RunFolder

FAST = ("launch.threads=1", "run.root=runs")
TRIALS = 6
pytestmark = pytest.mark.campaign


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as running:
        yield running


def environment(server: WandbServer) -> dict[str, str]:
    """No key and no address but those of ``server``; ``python`` is the one that runs this test."""
    path = os.pathsep.join([str(Path(sys.executable).parent), ENVIRONMENT["PATH"]])
    return {**ENVIRONMENT, **server.environment, "PATH": path}


def start(server: WandbServer, cwd: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env=environment(server),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=SECONDS)
    return process.returncode, said


def done(server: WandbServer, cwd: Path, *words: str) -> tuple[int, str]:
    return ended(start(server, cwd, *words))


def trial(cwd: Path, run: str) -> Trial | None:
    return next((read_trial(path) for path in (cwd / SWEEPS).glob(f"*/trials/{run}.json")), None)


def has_steps(server: WandbServer, run: str, count: int) -> bool:
    return len([row for row in server.runs[run].rows if "train/loss" in row]) >= count


def folders(cwd: Path) -> Callable[[str], RunFolder]:
    return lambda run: RunFolder(next((cwd / "runs" / "sweeps" / "wandb").glob(f"*/{run}")))


def test_six_trials_of_which_one_is_killed(server: WandbServer, tmp_path: Path) -> None:
    """The space that is shipped, two agents; a trial that is killed is the loss of that trial and of nothing else."""
    words = ("+experiment=smoke", "sweep=smoke", "sweep.engine=wandb", f"sweep.trials={TRIALS}", *FAST)
    code, said = done(server, tmp_path, "trainer", "sweep", *words)
    assert code == 0, said
    ((name, sweep),) = server.sweeps.items()
    assert f"wandb agent loopback/trimtab/{name}" in said
    assert f"{server.url}/loopback/trimtab/sweeps/{name}" in said
    agents = [start(server, tmp_path, "wandb", "agent", f"loopback/trimtab/{name}") for _ in range(2)]
    server.wait_for(lambda it: any(has_steps(it, run, 1) for run in sweep.runs), seconds=SECONDS)
    killed = next(run for run in sweep.runs if has_steps(server, run, 1))
    holder = json.loads(folders(tmp_path)(killed).lock.read_text())
    psutil.Process(holder["pid"]).kill()
    outputs = [ended(agent) for agent in agents]
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert len(sweep.runs) == TRIALS
    for run in sweep.runs:
        left, arrived = trial(tmp_path, run), server.runs[run]
        assert left is not None
        assert (left.code, arrived.state) == ((None, "failed") if run == killed else (0, "finished")), run
        if run != killed:
            marker = read_marker(folders(tmp_path)(run), "train")
            assert marker is not None
            assert arrived.summary["val_loss"] == marker.summary["best_loss"]
            assert any("val_loss" in row for row in arrived.rows)  # what hyperband looks at
            assert "test_accuracy" in arrived.summary
    assert server.unknown == []
    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in content for content in everything)
    assert not any(KEY in said for _, said in outputs)


def test_a_trial_goes_on_under_its_run_and_one_that_the_sweep_stops_is_over(
    server: WandbServer, tmp_path: Path
) -> None:
    """The first is stopped by hand and goes on to its end; the second is stopped by the sweep (hyperband)."""
    words = ("+experiment=smoke", "sweep=smoke", "sweep.engine=wandb", "sweep.trials=2", *FAST, "optim.max_steps=40")
    code, said = done(server, tmp_path, "trainer", "sweep", *words)
    assert code == 0, said
    ((name, sweep),) = server.sweeps.items()
    agent = ("trainer", "agent", f"loopback/trimtab/{name}")
    first = start(server, tmp_path, *agent)
    server.wait_for(lambda it: any(has_steps(it, run, 2) for run in sweep.runs), seconds=SECONDS)
    first.send_signal(signal.SIGTERM)
    code, said = ended(first)
    assert code == 75, said
    code, said = done(server, tmp_path, *agent)
    (run,) = sweep.runs
    assert code == 0, said
    assert f"the trial goes on: W&B run {run}" in said
    assert "continuing after step" in said
    arrived = server.runs[run]
    assert arrived.state == "finished"
    assert [row["_step"] for row in arrived.rows if "train/loss" in row] == list(range(1, 41))
    second = start(server, tmp_path, *agent)
    server.wait_for(lambda it: len(sweep.runs) == 2 and has_steps(it, sweep.runs[1], 2), seconds=SECONDS)
    server.stopping.add(sweep.runs[1])
    code, said = ended(second)
    assert code == 0, said
    assert f"the sweep has stopped this trial: W&B run {sweep.runs[1]}" in said
    left = trial(tmp_path, sweep.runs[1])
    assert left is None  # it is the task's
    code, said = done(server, tmp_path, *agent)
    assert (code, len(sweep.runs)) == (0, 2)
    assert "the sweep gave no trial" in said
