"""Sweeps of W&B from the search space to the last trial: the real client and agent, a server on the loopback."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from cli_fixtures import ENVIRONMENT
from wandb_server import KEY, WandbServer

from trainer.drive.trial import SWEEPS, Trial, read_trial
from trainer.markers import read_marker
from trainer.paths import RunFolder, shipped_conf

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


def ended(process: subprocess.Popen[str], at_first_step: Callable[[], None] | None = None) -> tuple[int, str]:
    """Its exit code and its words; ``at_first_step`` is called once, when a trial has made its first step."""
    said: list[str] = []
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if at_first_step is not None and line.startswith("train 1/"):
                at_first_step()
                at_first_step = None
    assert at_first_step is None, "".join(said)
    return process.returncode, "".join(said)


def done(server: WandbServer, cwd: Path, *words: str) -> tuple[int, str]:
    return ended(start(server, cwd, *words))


def trial(cwd: Path, run: str) -> Trial | None:
    return next((read_trial(path) for path in (cwd / SWEEPS).glob(f"*/trials/{run}.json")), None)


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
    killed: list[str] = []

    def kill() -> None:
        driver = next(one for one in psutil.Process(agents[0].pid).children() if "trainer" in one.cmdline())
        killed.append(driver.environ()["WANDB_RUN_ID"])
        driver.kill()

    with ThreadPoolExecutor(1) as beside:
        other = beside.submit(ended, agents[1])
        outputs = [ended(agents[0], kill), other.result()]
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert len(sweep.runs) == TRIALS
    assert server.wait_for(lambda it: it.runs[killed[0]].exit_code is not None)  # its tracker outlives the driver
    for run in sweep.runs:
        left, arrived = trial(tmp_path, run), server.runs[run]
        assert left is not None
        assert (left.code, arrived.state) == ((None, "failed") if run in killed else (0, "finished")), run
        if run not in killed:
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
    """The first is stopped by hand and goes on to its end; the second is stopped by the sweep (hyperband).

    The third is stopped by hand, and by the sweep when it has no agent any more.
    """
    body = yaml.safe_load((shipped_conf() / "sweep" / "smoke.yaml").read_text())
    body |= {"method": "grid", "run_cap": 3, "parameters": {"optim.max_steps": {"values": [20, 400, 4000]}}}
    (tmp_path / "lengths.yaml").write_text(yaml.safe_dump({**body, "early_terminate": None}))
    code, said = done(server, tmp_path, "trainer", "sweep", "sweep=lengths.yaml", "sweep.engine=wandb", *FAST)
    assert code == 0, said
    ((name, sweep),) = server.sweeps.items()
    agent = ("trainer", "agent", f"loopback/trimtab/{name}")
    first = start(server, tmp_path, *agent)
    code, said = ended(first, lambda: first.send_signal(signal.SIGTERM))
    assert code == 75, said
    code, said = done(server, tmp_path, *agent)
    (run,) = sweep.runs
    assert code == 0, said
    assert f"the trial goes on: W&B run {run}" in said
    assert "continuing after step" in said
    arrived = server.runs[run]
    assert arrived.state == "finished"
    assert not arrived.preempting
    assert [row["_step"] for row in arrived.rows if "train/loss" in row] == list(range(1, 21))
    code, said = ended(start(server, tmp_path, *agent), lambda: server.stopping.add(sweep.runs[1]))
    assert code == 0, said
    assert f"the sweep has stopped this trial: W&B run {sweep.runs[1]}" in said
    third = start(server, tmp_path, *agent)
    code, said = ended(third, lambda: third.send_signal(signal.SIGTERM))
    assert code == 75, said
    server.stopped.add(sweep.runs[2])
    code, said = done(server, tmp_path, *agent)
    assert code == 0, said
    assert f"the trial goes on: W&B run {sweep.runs[2]}" in said
    assert f"the sweep has stopped this trial: W&B run {sweep.runs[2]}" in said
    code, said = done(server, tmp_path, *agent)
    assert (code, len(sweep.runs)) == (0, 3), said
    assert "the sweep gave no trial" in said
