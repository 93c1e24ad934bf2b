"""The process beside a run, with the real W&B client and a server on this machine: each step arrives once, whatever."""

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tracking_fixtures import make_run, track, write_steps
from wandb_operations import Artifact
from wandb_server import KEY, WandbServer

from trainer.drive.tracked import Beside, sync_runs
from trainer.errors import EXIT_DONE, EXIT_STOPPED
from trainer.markers import Marker, write_marker
from trainer.paths import RunFolder, write_atomic
from trainer.tracker_state import OFFLINE, read_state
from trainer.tracking.send import begun
from trainer_launch.agents import ALONE

CHECKOUT = Path(__file__).parents[2]
CANARY = "hf_CanaryCanaryCanaryCanaryCanary0001"
MANIFEST = "wandb_manifest.json"


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


@pytest.fixture
def sigterm() -> Iterator[threading.Event]:
    """Set when this process gets SIGTERM."""
    got = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: got.set())
    yield got
    signal.signal(signal.SIGTERM, before)


@pytest.mark.campaign  # the client looks every 15 s whether it is to stop
@pytest.mark.parametrize("alone", [True, False])
def test_a_trial_without_an_agent_is_asked_to_stop_as_an_agent_would(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, sigterm: threading.Event, alone: bool
) -> None:
    """With one, or without a sweep, nobody is: not the run, and not the process that sends its figures."""
    for name, value in {"WANDB_SWEEP_ID": "sw1", "WANDB_RUN_ID": "r1", ALONE: "1" if alone else ""}.items():
        monkeypatch.setenv(name, value)
    folder, plan = make_run(tmp_path, "tracking=wandb")
    write_steps(folder, 3)
    server.stopped.add("r1")
    beside = Beside(folder, plan)
    beside.start()
    try:
        asked = "asks for the end of this trial" if alone else "asks for the end of this run"
        assert came(folder.tracking_log, asked)
        assert sigterm.wait(10.0 if alone else 0.0) == alone
        write_steps(folder, 5)
        beside.ends_with(EXIT_STOPPED)
    finally:
        beside.finish()
    run = server.runs["r1"]
    assert (run.state, run.preempting, run.posted) == ("failed", False, [1, 2, 3, 4, 5])
    assert folder.tracking_log.read_text().count("a new run") == 1


def came(log: Path, words: str, *, seconds: float = 60.0) -> bool:
    """Wait until ``words`` stand in ``log``."""
    end = time.monotonic() + seconds
    while words not in log.read_text() and time.monotonic() < end:
        threading.Event().wait(0.05)
    return words in log.read_text()


@pytest.mark.parametrize("alone", [True, False])
def test_the_word_to_stop_reaches_the_driver_of_a_trial_without_an_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sigterm: threading.Event, alone: bool
) -> None:
    for name, value in {"WANDB_SWEEP_ID": "sw1", "WANDB_RUN_ID": "r1", ALONE: "1" if alone else ""}.items():
        monkeypatch.setenv(name, value)
    folder, plan = make_run(tmp_path, "tracking=wandb")
    says_stop = tmp_path / "python"  # in the place of python -m trainer.tracking RUN [--stop-to FD]
    program = "import os, sys; print(sys.argv[4:5], flush=True); [os.write(int(n), b'stop\\n') for n in sys.argv[5:]]"
    says_stop.write_text(f"#!{sys.executable}\n{program}; sys.stdin.read()\n")
    says_stop.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(says_stop))
    beside = Beside(folder, plan)
    beside.start()
    stopped = sigterm.wait(30.0 if alone else 0.0)
    beside.finish()
    assert (stopped, folder.tracking_log.read_text().strip()) == (alone, "['--stop-to']" if alone else "[]")


def test_texts_and_weights_are_versions_of_artifacts_and_hold_no_secret(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    folder, plan = make_run(tmp_path, "tracking=wandb", "tracking.upload=[text,weights]", "tracking.name=mine")
    write_steps(folder, 3)
    write_export(folder, b"first weights")
    write_predictions(folder, f"my key is {CANARY}")
    track(folder, plan)
    assert read_state(folder, "wandb").complete
    model, table = sorted(server.artifacts.values(), key=lambda one: one.kind, reverse=True)
    assert (model.name, model.kind, set(model.aliases), model.committed) == ("mine", "model", {"best", "latest"}, True)
    assert (table.name, table.kind, table.committed) == ("mine-tuned", "evaluation", True)
    assert digests(model) == {path.name: md5(path.read_bytes()) for path in folder.adapter.iterdir()}
    assert {name: md5(content) for name, content in model.files.items() if name != MANIFEST} == digests(model)
    told = json.loads(table.files["predictions.table.json"])
    assert told["columns"] == ["id", "answer", "text", "correct"]
    assert told["data"] == [["row-1", "MIT", "my key is [redacted]", "False"]]

    write_export(folder, b"better weights")  # trained further: another version of the same artifact, and no other table
    write_steps(folder, 5)
    track(folder, plan)
    first, again = (one for one in server.artifacts.values() if one.kind == "model")
    assert (again.name, set(again.aliases), again.committed) == ("mine", {"best", "latest"}, True)
    assert digests(again)["config.json"] == digests(first)["config.json"]
    assert digests(again)["adapter.safetensors"] == md5(b"better weights") != digests(first)["adapter.safetensors"]
    assert again.files.get("adapter.safetensors") == b"better weights"
    assert (len(server.artifacts), server.unknown) == (3, [])
    for request in server.requests:
        for secret in (CANARY, KEY):
            assert secret.encode() not in request.body + f"{request.path} {request.headers}".encode()


def write_export(folder: RunFolder, weights: bytes) -> None:
    """An adapter of two files, and the word that it is finished."""
    write_atomic(folder.adapter / "adapter.safetensors", weights)
    write_atomic(folder.adapter / "config.json", "{}")
    write_marker(folder, Marker(stage="export", inputs="", seconds=1.0, finished="2026-01-01T00:00:00+00:00"))


def write_predictions(folder: RunFolder, text: str) -> None:
    """One answer of the tuned model."""
    row = {"id": "row-1", "answer": "MIT", "text": text, "correct": False}
    write_atomic(folder.evaluation / "tuned.predictions.jsonl", json.dumps(row) + "\n")


def digests(artifact: Artifact) -> dict[str, str]:
    """What the manifest of ``artifact`` says of its files."""
    contents = json.loads(artifact.files[MANIFEST])["contents"]
    return {name: entry["digest"] for name, entry in contents.items()}


def md5(content: bytes) -> str:
    """The digest that W&B has of a file."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
