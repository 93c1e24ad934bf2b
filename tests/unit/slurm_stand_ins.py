"""Programs that stand in for training in Slurm jobs: one that counts and saves its count, and agents without torch.

Run as a file, this is the agent: what ``launch.container`` puts before the words of the real one. It is the real driver
with the stand-in programs of ``drive_fixtures``.
"""

import sys
from dataclasses import replace
from pathlib import Path

from drive_fixtures import driven
from slurm_cluster import CHECKOUT

from trainer.config import Config
from trainer.console import run_and_report
from trainer.drive.queue import COMMENT, Submission, write_submission
from trainer.drive.run import do_existing
from trainer.paths import RunFolder, shipped_slurm
from trainer_launch import slurm
from trainer_launch.batch_script import BatchSpec, batch_script, step_words

COUNTER = """
import os, signal, sys, time
from contextlib import nullcontext
from pathlib import Path
sys.path[:0] = [{checkout!r}]
from trainer.drive.lock import hold
from trainer.markers import Marker, write_marker
from trainer.paths import RunFolder

folder, total, saves = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), sys.argv[3] == "saves"
node, restart = os.environ["SLURM_NODEID"], os.environ.get("SLURM_RESTART_COUNT", "0")
stop = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: stop.append(number))
count_file = folder.root / "count"
count = int(count_file.read_text()) if count_file.exists() else 0


def journal(text):
    with (folder.root / "journal").open("a") as handle:
        handle.write(f"node {{node}} start {{restart}}: {{text}}\\n")


def save():
    if node == "0" and saves:
        count_file.with_suffix(".new").write_text(str(count))
        count_file.with_suffix(".new").replace(count_file)
        write_marker(folder, Marker(stage="prepare", inputs="", seconds=0.0, finished=str(count)))


with hold(folder.lock, "count") if node == "0" else nullcontext():
    journal(f"from {{count}}")
    while count < total and not stop:
        time.sleep(0.05)
        count += 1
        if count % 20 == 0:
            save()
    save()
journal(f"ends at {{count}}" + (f" because of {{signal.Signals(stop[0]).name}}" if stop else ""))
sys.exit(0 if count >= total else 75)
"""
PER_SECOND = 20
"""What the counter counts."""


class Counted:
    """A run folder in which the counter works."""

    def __init__(self, root: Path) -> None:
        self.folder = RunFolder(root)
        self.folder.logs.mkdir(parents=True)
        self.folder.launch.mkdir()
        self._program = root / "counter.py"
        self._program.write_text(COUNTER.format(checkout=str(CHECKOUT)))

    def spec(self, *, total: int, nodes: int = 1, saves: bool = True) -> BatchSpec:
        """A job that counts to ``total`` on every node."""
        agent = [sys.executable, str(self._program), str(self.folder.root), str(total), "saves" if saves else "idles"]
        job = [sys.executable, "-m", "trainer.drive.job", str(self.folder.root), "--"]
        return BatchSpec(
            name="counted-0123456789",
            comment=f"{COMMENT}{self.folder.root}",
            log=str(self.folder.logs / "slurm.log"),
            folder=str(self.folder.root),
            words=(*job, *step_words(agent, nodes=nodes)),
            nodes=nodes,
            grace=50,
            mem="100",
        )

    def submit(self, spec: BatchSpec) -> int:
        """Submit it as ``trainer.drive.submit`` does."""
        template = (shipped_slurm() / "job.sbatch").read_text()
        self.folder.job_sbatch.write_text(batch_script(spec, template))
        number = slurm.submit(self.folder.job_sbatch)
        noted = Submission(job=number, name=spec.name, submitted=0.0, log=spec.log, verb="run")
        write_submission(self.folder, noted)
        return number

    def journal(self) -> list[str]:
        journal = self.folder.root / "journal"
        return journal.read_text().splitlines() if journal.exists() else []

    def log(self) -> str:
        log = self.folder.logs / "slurm.log"
        return log.read_text() if log.exists() else ""


def with_agents(config: Config) -> Config:
    """``config`` as a Slurm job of two nodes with agents that need no torch."""
    agents = [sys.executable, __file__]
    launch = replace(config.launch, name="slurm", nodes=2, mem="100", container=agents)
    return replace(config, launch=launch)


def _agent() -> int:
    verb, run, *overrides = sys.argv[4:-2]
    return do_existing(
        verb,
        Path(run),
        overrides,
        cwd=Path.cwd(),
        command="the same command",
        node_rank=int(sys.argv[-1]),
        programs=driven(Path.cwd()).programs,
    )


if __name__ == "__main__":
    sys.exit(run_and_report(_agent))
