"""Small programs that stand in for ranks, and ways to wait for them without sleeping."""

import os
import select
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer_launch.children import Child
from trainer_launch.spec import LaunchSpec

PRELUDE = '''
import os, signal, subprocess, sys
from pathlib import Path

rank = int(os.environ["RANK"])
folder = Path(sys.argv[1])


def say(text):
    """One write: in a signal's handler, print may find itself half-way through the same buffer, and fails."""
    os.write(1, f"{text}\\n".encode())


def forever():
    while True:
        signal.pause()


def meet():
    """Rank 1 is here and ready; rank 0 waits for it. A FIFO's two ends wait for each other."""
    with open(folder / "meet", "r" if rank == 0 else "w") as end:
        end.read() if rank == 0 else end.write("here")


def wait_for_the_end_of_the_other():
    """Returns when the other rank, which holds the writing end, is gone."""
    with open(folder / "meet", "r") as end:
        end.read()
'''


@dataclass(frozen=True)
class StandIn:
    """A folder with a module ``stand_in`` in it, for ranks started in that folder."""

    folder: Path

    def spec(self, *, processes: int = 2, port: int = 29555, nodes: int = 1, node_rank: int = 0) -> LaunchSpec:
        return LaunchSpec(
            run_dir=str(self.folder),
            module="stand_in",
            arguments=(str(self.folder),),
            processes=processes,
            threads=1,
            python=sys.executable,
            master_port=port,
            nodes=nodes,
            node_rank=node_rank,
        )

    def child(self, rank: int, *, shown: bool = False, variables: Mapping[str, str] | None = None) -> Child:
        return Child(
            name=f"rank {rank}",
            arguments=(sys.executable, "-m", "stand_in", str(self.folder)),
            variables={"RANK": str(rank), **(variables or {})},
            log=self.folder / "logs" / f"rank{rank}.log",
            shown=shown,
        )

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / f"rank{rank}.log").read_text()


def stand_in(folder: Path, body: str) -> StandIn:
    """Write the program ``body`` (with ``PRELUDE`` before it) into ``folder``."""
    (folder / "stand_in.py").write_text(PRELUDE + body)
    os.mkfifo(folder / "meet")
    return StandIn(folder)


class Gone:
    """Waits until a process that need not be ours has ended: ``wait`` is False when it has not after ``seconds``."""

    def __init__(self, pid: int) -> None:
        self._handle = os.pidfd_open(pid)

    def wait(self, seconds: float = 60) -> bool:
        try:
            return bool(select.select([self._handle], [], [], seconds)[0])
        finally:
            os.close(self._handle)
