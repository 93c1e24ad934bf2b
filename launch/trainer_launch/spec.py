"""What is to be started, decided before anything is: plain values that are checked once and never change."""

from dataclasses import dataclass
from pathlib import Path

ANY_PORT = 0


class LaunchError(ValueError):
    """A ``LaunchSpec`` that cannot be started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """The ranks of one machine.

    ``run_dir``: the run folder; ``module`` with ``arguments`` is what every rank runs with the interpreter ``python``.
    ``processes``: ranks on each machine; ``threads``: CPU threads of a rank. ``node_rank`` of ``nodes`` is this
    machine; ``master_addr`` and ``master_port`` are where rank 0 listens (port 0: any free one, one machine only).

    Raises:
        LaunchError: a number out of range, or no free choice of port with several machines.
    """

    run_dir: str
    arguments: tuple[str, ...]
    processes: int
    threads: int
    python: str
    module: str = "trainer.worker"
    nodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = ANY_PORT

    def __post_init__(self) -> None:
        for name, value in (("processes", self.processes), ("threads", self.threads), ("nodes", self.nodes)):
            if value < 1:
                raise LaunchError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.node_rank < self.nodes:
            raise LaunchError(f"node_rank must be from 0 to {self.nodes - 1}, got {self.node_rank}")
        if not 0 <= self.master_port < 65536:
            raise LaunchError(f"master_port must be from 0 to 65535, got {self.master_port}")
        if self.nodes > 1 and self.master_port == ANY_PORT:
            raise LaunchError("master_port must be given with several machines: all of them need the same one")

    @property
    def world_size(self) -> int:
        """Ranks on all machines."""
        return self.nodes * self.processes

    def rank(self, local_rank: int) -> int:
        """Number of this machine's ``local_rank`` among all ranks."""
        return self.node_rank * self.processes + local_rank

    def log(self, rank: int) -> Path:
        """The file with everything that ``rank`` printed."""
        return Path(self.run_dir) / "logs" / f"rank{rank}.log"
