"""A tracker that goes away in the middle of a run changes nothing of the run, and gets the rest later, once."""

import json
import threading
from pathlib import Path
from unittest.mock import patch

import cli_fixtures
import pytest
from cli_fixtures import Ended, trainer
from wandb_server import KEY, WandbServer

from trainer.fingerprint import file_digest

STEPS = 60
"""So many that the server is gone long before the last one."""
SMOKE = ["+experiment=smoke", "launch.device=cpu", f"optim.max_steps={STEPS}", "eval.every=20", "run.cache=cache"]
CANARY = "hf_CanaryCanaryCanaryCanaryCanary0001"
SAME = ("step", "loss", "lr", "grad_norm", "tokens", "targets", "val_loss")


def figures(run: Path) -> list[dict[str, object]]:
    """What does not depend on the clock, of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in SAME if name in line} for line in lines]


def exported(run: Path) -> dict[str, str]:
    """The exported weights."""
    files = sorted((run / "export").rglob("*.safetensors"))
    assert files
    return {str(path.relative_to(run)): file_digest(path) for path in files}


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run without a tracker; its cache is used by the others."""
    home = tmp_path_factory.mktemp("runs")
    ended = trainer(home, *SMOKE, "run.dir=untracked")
    assert ended.code == 0, ended.out + ended.err
    return home / "untracked"


def tracked(server: WandbServer, home: Path, *words: str) -> Ended:
    """The command line with the stand-in as W&B's server, and a secret in the environment."""
    with patch.dict(cli_fixtures.ENVIRONMENT, {**server.environment, "HF_TOKEN": CANARY}):
        return trainer(home, *words)


@pytest.mark.campaign
def test_a_server_killed_in_mid_run_does_nothing_to_the_run_and_gets_each_step_once(untracked: Path) -> None:
    home, words = untracked.parent, [*SMOKE, "run.dir=tracked", "tracking=[wandb,tensorboard]"]
    with WandbServer() as server:
        killer = threading.Thread(
            target=lambda: server.wait_for(has_a_row, seconds=cli_fixtures.SECONDS) and server.stop()
        )
        killer.start()
        ended = tracked(server, home, *words, "tracking.finish_seconds=2")
        killer.join()
        assert ended.code == 0, ended.out + ended.err
        assert "wandb has not got everything" in ended.err
        assert figures(home / "tracked") == figures(untracked)
        assert exported(home / "tracked") == exported(untracked)
        server.start()
        synced = tracked(server, home, "sync", "tracked")
    assert synced.code == 0, synced.out + synced.err
    (run,) = server.runs.values()
    assert [row["_step"] for row in run.rows] == run.posted == list(range(1, STEPS + 1))
    assert [row["train/loss"] for row in run.rows] == [step["loss"] for step in figures(untracked)]
    assert (run.state, server.unknown, server.artifacts) == ("finished", [], {})
    no_secret(server, home / "tracked")


def has_a_row(server: WandbServer) -> bool:
    return any(run.history for run in server.runs.values())


def no_secret(server: WandbServer, run: Path) -> None:
    """The secrets are in no file of the run and in no request, but the key in the header that it is for."""
    files = [path for path in run.rglob("*") if path.is_file()]
    sent = b"".join(f"{one.path} {one.headers}".encode() + one.body for one in server.requests)
    assert any(server.authorizations)
    for secret in (CANARY, KEY):
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []
        assert secret.encode() not in sent
