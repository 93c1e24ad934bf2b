"""A rank that is frozen in any stage is named, all stacks are written, and the run ends as one to be continued."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from cli_fixtures import trainer, trainer_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORDS = [
    "+experiment=smoke",
    "launch.device=cpu",
    "launch.processes=2",
    "launch.threads=1",
    "run.dir=run",
    "run.cache=cache",
]


def rank_of(pid: str) -> str:
    """RANK of a process; "" where it has none."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((value[5:].decode() for value in variables if value.startswith(b"RANK=")), "")


class Freeze:
    """Stops rank 1 at the first line that begins so."""

    def __init__(self, at: str) -> None:
        self.at, self.frozen = at, 0

    def __call__(self, line: str, process: subprocess.Popen[str]) -> None:
        if line.startswith(self.at) and not self.frozen:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            (self.frozen,) = [int(pid) for pid in children if rank_of(pid) == "1"]
            os.kill(self.frozen, signal.SIGSTOP)


@pytest.mark.parametrize(
    "at",
    ["attention: ", "zero_shot: measuring", "tuned: measuring", "tuned: loss"],
    ids=["loading", "baseline", "evaluate", "export"],
)
def test_a_rank_frozen_outside_of_training_is_named(tmp_path: Path, at: str) -> None:
    freeze = Freeze(at)
    ended = trainer_until(tmp_path, [*WORDS, "guard.hang_timeout=20"], freeze)
    assert freeze.frozen, ended.out
    assert ended.code == 75, ended.out
    assert "Traceback (most recent call last)" not in ended.out
    # Its last phase is that of its last sign, which may be two seconds old: everything is quick here.
    said = rf"rank 1 \(process {freeze.frozen} on \S+\) has given no sign of life for \d+ s, last in '"
    assert re.search(said, ended.out), ended.out
    for rank in (0, 1):
        assert "most recent call first" in (tmp_path / "run" / "logs" / f"rank{rank}.log").read_text(), (
            f"stacks of rank {rank}"
        )
    again = trainer(tmp_path, *WORDS)
    assert again.code == 0, again.out + again.err
