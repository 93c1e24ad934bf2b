"""A node whose network is cut while its processes live on: two generations of one run, on one file system.

The run's lock does not hold between them, as on file systems without locks across machines: its file is replaced. What
is left is the fence: the older generation can neither publish nor append, before the network heals and after.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import CHECKOUT, Cluster, cluster, until, why_not
from slurm_networks import networks, why_no_networks
from slurm_stand_ins import Counted
from train_fixtures import Run, make_data, read_metrics, train_run, with_data

from trainer.distributed.ranks import start_ranks
from trainer.train.checkpoint.format import published, verify
from trainer_launch.batch_script import step_words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROGRAM = """
import os, sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from train_fixtures import Run, train_run
from trainer.console import run_and_report
from trainer.distributed.ranks import start_ranks
from trainer.drive.lock import hold
from trainer.paths import RunFolder

folder = Path(sys.argv[1])
start = os.environ.get("SLURM_RESTART_COUNT", "0")


def wait_until_the_other_is_done(record):
    if start == "0" and record.step == 6:
        (folder / "ready").touch()
        while not (folder / "go on").exists():
            time.sleep(0.05)


def body():
    with hold(RunFolder(folder).lock, "train"):
        ranks = start_ranks(device="cpu", world_size=1, threads=1)
        train_run(run, ranks, on_record=wait_until_the_other_is_done)


run = Run(folder=str(folder), dropout=0.1, max_steps=12)
code = run_and_report(body)
(folder / f"ended {{start}}").write_text(str(code))
sys.exit(code)
"""


@pytest.fixture
def apart() -> Iterator[Cluster]:
    """Two nodes with networks of their own."""
    reason = why_not() or why_no_networks()
    if reason:
        pytest.skip(reason)
    with networks(2) as cables, cluster(networks=cables) as made, made.commands():
        yield made


def written(root: Path) -> dict[str, bytes]:
    """What a generation publishes and appends to."""
    kept = [root / "metrics.jsonl", *sorted((root / "checkpoints").rglob("*"))]
    return {str(path): path.read_bytes() for path in kept if path.is_file()}


def test_a_partition_that_heals(apart: Cluster, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    straight = with_data(tmp_path / "straight", data)
    train_run(Run(folder=str(straight), dropout=0.1, max_steps=12), start_ranks(device="cpu", world_size=1))
    run = Counted(tmp_path / "run")
    root = with_data(run.folder.root, data)
    program = root / "program.py"
    program.write_text(PROGRAM.format(paths=[str(CHECKOUT / name) for name in ("", "kernels", "launch", "tests/unit")]))
    spec = run.spec(total=1)
    agent = step_words([sys.executable, str(program), str(root)], nodes=1)
    words = (*spec.words[: spec.words.index("--") + 1], *agent)
    job = run.submit(dataclasses.replace(spec, words=words, mem="1000"))
    until((root / "ready").exists, f"it trains: {run.log()}", 180)
    node, cables = apart.field(job, "NodeList"), apart.networks
    assert cables is not None
    (old,) = [one for one in apart.processes("program.py") if one.cmdline()[1] == str(program)]

    cables.cut(node)
    run.folder.lock.unlink()
    assert apart.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=300) == "COMPLETED", run.log()
    assert apart.field(job, "Restarts") == "1"
    assert apart.field(job, "NodeList") != node
    assert old.is_running(), "the first start is still alive"
    done = written(root)
    assert [line["step"] for line in read_metrics(root)] == list(range(1, 13))

    (root / "go on").touch()
    until((root / "ended 0").exists, "the first start goes on and finds itself overtaken", 120)
    assert (root / "ended 0").read_text() == "2"
    assert "another process has taken over this run; nothing more of this one is written" in run.log()
    assert written(root) == done

    cables.heal(node)
    until(
        lambda: apart.ask("sinfo", "-h", "-N", "-t", "idle", "-p", "main", "-o", "%N").count(".") == 6, "both idle", 120
    )
    assert apart.field(job, "JobState") == "COMPLETED"
    assert written(root) == done
    ends = [verify(published(folder / "checkpoints")[0]) for folder in (straight, root)]
    assert ends[0].files == ends[1].files
