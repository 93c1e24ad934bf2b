"""A save that takes longer than Slurm gives it: the job is killed in it, and goes on from the checkpoint before."""

import dataclasses
import sys
from pathlib import Path

import pytest
from slurm_cluster import CHECKOUT, Cluster, until
from slurm_stand_ins import Counted
from train_fixtures import Run, make_data, read_metrics, train_run, with_data

from trainer.distributed.ranks import start_ranks
from trainer.drive.progress import read_starts
from trainer.train.checkpoint.format import published, verify
from trainer_launch.batch_script import step_words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from train_fixtures import Run, train_run
from trainer.distributed.ranks import start_ranks

folder = Path(sys.argv[1])
start = os.environ.get("SLURM_RESTART_COUNT", "0")


def forever(*_):
    (folder / "saving").touch()
    while True:
        signal.pause()


def wait_for_the_signal(record):
    if start == "0" and record.step == 6:
        os.fsync = forever
        (folder / "ready").touch()
        signal.pause()


run = Run(folder=str(folder), dropout=0.1, max_steps=12, asynchronous={asynchronous!r})
train_run(run, start_ranks(device="cpu", world_size=1, threads=1), on_record=wait_for_the_signal)
"""


@pytest.mark.parametrize("asynchronous", [False, True], ids=["the training waits", "behind the training"])
def test_a_save_that_is_longer_than_the_grace(lab: Cluster, tmp_path: Path, asynchronous: bool) -> None:
    data = make_data(tmp_path / "data")
    straight = with_data(tmp_path / "straight", data)
    train_run(Run(folder=str(straight), dropout=0.1, max_steps=12), start_ranks(device="cpu", world_size=1))
    run = Counted(tmp_path / "run")
    root = with_data(run.folder.root, data)
    program = root / "program.py"
    paths = [str(CHECKOUT / name) for name in ("", "kernels", "launch", "tests/unit")]
    program.write_text(PROGRAM.format(paths=paths, asynchronous=asynchronous))
    spec = run.spec(total=1)
    agent = step_words([sys.executable, str(program), str(root)], nodes=1)
    words = (*spec.words[: spec.words.index("--") + 1], *agent)
    job = run.submit(dataclasses.replace(spec, words=words, partition="low", mem="1000", options=("--exclusive",)))
    until((root / "ready").exists, f"it trains: {run.log()}", 180)
    hurry = ("--parsable", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "true")
    urgent = int(lab.ask("sbatch", *hurry))
    lab.wait_for(urgent, "COMPLETED", seconds=120)
    assert (root / "saving").exists(), "it was killed in its save"
    assert lab.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=240) == "COMPLETED", run.log()
    assert lab.field(job, "Restarts") == "1"
    assert read_starts(run.folder)[-1].ended == 0
    assert [line["step"] for line in read_metrics(root)] == list(range(1, 13))
    ends = [verify(published(folder / "checkpoints")[0]) for folder in (straight, root)]
    assert ends[0].files == ends[1].files
