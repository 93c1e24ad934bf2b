"""The process beside a run, with the real W&B client and a server on this machine: each step arrives once, whatever."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tracking_fixtures import make_run, track, write_steps
from wandb_server import WandbServer

from trainer.drive.tracked import sync_runs
from trainer.errors import EXIT_DONE, EXIT_STOPPED
from trainer.tracker_state import OFFLINE, read_state
from trainer.tracking.send import begun

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """The stand-in, as this process and those that it starts find it."""
    with WandbServer() as running:
        for name, value in {**running.environment, "HOME": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        paths = [str(CHECKOUT), *(str(CHECKOUT / name) for name in ("kernels", "launch"))]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        monkeypatch.delenv("WANDB_MODE", raising=False)
        yield running


def test_a_stopped_run_goes_on_as_the_same_run_and_no_step_comes_twice(tmp_path: Path, server: WandbServer) -> None:
    folder, plan = make_run(tmp_path, "tracking=wandb", "tracking.project=p", "tracking.tags=[a]")
    write_steps(folder, 5)
    track(folder, plan, EXIT_STOPPED)
    (run,) = server.runs.values()
    assert (run.state, run.posted) == ("preempted", [1, 2, 3, 4, 5])
    write_steps(folder, 3)
    write_steps(folder, 8)
    track(folder, plan)
    assert list(server.runs) == [run.name] == [read_state(folder, "wandb").run]
    assert (run.state, run.posted) == ("finished", [1, 2, 3, 4, 5, 6, 7, 8])
    assert [row["train/loss"] for row in run.rows][2:] == [1 / step for step in range(3, 9)]
    assert str(run.rows[1]["train/loss"]).lower() == "nan"
    assert read_state(folder, "wandb").complete
    only_what_was_asked_for(server)


def only_what_was_asked_for(server: WandbServer) -> None:
    """No code, host, user, command line, package list, console output or figures of W&B's own."""
    (run,) = server.runs.values()
    assert sorted(run.files) == ["config.yaml", "wandb-summary.json"]
    assert (run.output, run.events, server.unknown, server.artifacts) == ([], [], [], {})
    assert (run.given["project"], run.given["tags"], run.given["program"]) == ("p", ["a"], "trainer")
    for private in ("host", "debug", "commit", "repo", "notes"):
        assert private not in run.given
    assert set(run.config["_wandb"]["value"]) == {"t", "m", "cli_version", "python_version"}
    for request in server.requests:
        assert request.headers.get("X-Wandb-User-Email", "") == ""
        assert request.headers.get("X-Wandb-Username", "") == ""


def test_a_server_that_refuses_changes_nothing_and_gets_all_of_it_later(tmp_path: Path, server: WandbServer) -> None:
    folder, plan = make_run(tmp_path, "tracking=wandb")
    write_steps(folder, 4)
    server.refuses = True
    track(folder, plan)
    state = read_state(folder, "wandb")
    assert not state.complete
    assert "401" in state.why
    assert sync_runs([folder.root]) == EXIT_STOPPED
    server.refuses = False
    assert sync_runs([folder.root]) == EXIT_DONE
    assert [(run.name, run.posted) for run in server.runs.values()] == [(state.run, [1, 2, 3, 4])]


def test_a_server_that_is_slow_gets_its_time_and_no_more(tmp_path: Path, server: WandbServer) -> None:
    folder, plan = make_run(tmp_path, "tracking=wandb", "tracking.finish_seconds=0.5")
    write_steps(folder, 4)
    server.delay = 600.0
    track(folder, plan)  # the limit of this test would end it
    assert not read_state(folder, "wandb").complete
    server.stop()
    server.delay = 0.0
    server.start()
    assert sync_runs([folder.root]) == EXIT_DONE
    (run,) = server.runs.values()
    assert run.posted == [1, 2, 3, 4]


def test_offline_runs_are_one_whole_run_for_either_way_to_send_them(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plan = make_run(tmp_path, "tracking=wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_steps(folder, 3)
    track(folder, plan, EXIT_STOPPED)
    write_steps(folder, 5)
    track(folder, plan)
    assert (server.requests, read_state(folder, "wandb").why) == ([], OFFLINE)
    (kept,) = (folder.tracking / "wandb").glob("offline-run-*")
    client = [sys.executable, "-m", "wandb", "sync", str(kept)]
    subprocess.run(client, check=True, capture_output=True, cwd=tmp_path)
    (run,) = server.runs.values()
    assert [row["_step"] for row in run.rows] == [1, 2, 3, 4, 5]
    assert sync_runs([folder.root]) == EXIT_DONE
    assert run.posted == [1, 2, 3, 4, 5]
    assert list((folder.tracking / "wandb").glob("*run-*")) == []


def test_a_run_of_an_agent_is_the_agents_and_gets_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = make_run(tmp_path, "tracking=wandb")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    own = begun(folder, "wandb").run
    assert begun(folder, "wandb").run == own
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    assert (begun(folder, "wandb").run, begun(folder, "tensorboard").run == "agents") == ("agents", False)
    monkeypatch.delenv("WANDB_RUN_ID")
    assert begun(folder, "wandb").run == "agents"
