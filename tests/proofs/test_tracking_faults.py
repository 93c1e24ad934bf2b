"""Whole runs from the command line with a tracker that refuses, is slow, or sees the run stopped and started again."""

import json
import signal
import subprocess
from pathlib import Path
from unittest.mock import patch

import cli_fixtures
import pytest
from cli_fixtures import Ended, trainer, trainer_until
from wandb_server import WandbServer

from trainer.errors import EXIT_DONE, EXIT_STOPPED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STEPS = 40
SMOKE = [
    "train",
    "+experiment=smoke",
    "launch.device=cpu",
    f"optim.max_steps={STEPS}",
    "run.dir=run",
    "run.cache=cache",
]
TRACKED = [*SMOKE, "tracking=wandb", "tracking.finish_seconds=5"]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def command(server: WandbServer, home: Path, *words: str) -> Ended:
    home.mkdir(exist_ok=True)
    with patch.dict(cli_fixtures.ENVIRONMENT, server.environment):
        return trainer(home, *words)


@pytest.mark.parametrize("trouble", ["refuses", "slow"])
def test_a_server_that_refuses_or_is_slow_does_nothing_to_a_run(tmp_path: Path, trouble: str) -> None:
    with WandbServer() as server:
        assert command(server, tmp_path / "plain", *SMOKE).code == EXIT_DONE
        server.refuses, server.delay = trouble == "refuses", 20.0 if trouble == "slow" else 0.0
        ended = command(server, tmp_path / "tracked", *TRACKED)
        assert ended.code == EXIT_DONE, ended.out + ended.err
        assert "wandb has not got everything" in ended.err
        assert losses(tmp_path / "tracked" / "run") == losses(tmp_path / "plain" / "run")
        server.stop()
        server.refuses, server.delay = False, 0.0
        server.start()
        assert command(server, tmp_path / "tracked", "sync", "run").code == EXIT_DONE
    (run,) = server.runs.values()
    assert [row["_step"] for row in run.rows] == list(range(1, STEPS + 1))
    assert len(run.posted) == STEPS


def test_a_run_that_was_stopped_goes_on_as_the_same_run(tmp_path: Path) -> None:
    told: list[str] = []

    def stop(line: str, process: subprocess.Popen[str]) -> None:
        if line.startswith("train ") and not told:
            told.append(line)
            process.send_signal(signal.SIGTERM)

    with WandbServer() as server, patch.dict(cli_fixtures.ENVIRONMENT, server.environment):
        ended = trainer_until(tmp_path, TRACKED, stop)
        assert ended.code == EXIT_STOPPED, ended.out
        (run,) = server.runs.values()
        assert (run.state, run.posted) == ("preempted", list(range(1, len(run.posted) + 1)))
        assert 0 < len(run.posted) < STEPS
        assert trainer(tmp_path, *TRACKED).code == EXIT_DONE
    assert list(server.runs) == [run.name]
    assert (run.state, run.posted) == ("finished", list(range(1, STEPS + 1)))
