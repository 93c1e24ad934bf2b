"""A training job under a real Slurm, killed at random moments in every way there is, until so many kills are done.

A kill is survived when the run goes on from a checkpoint: by itself, or, where Slurm has no job left (it was cancelled,
or its batch step was killed), with the same command. The end is survived when the exported weights have the sha256 of
those of an undisturbed run on one machine. Kills are drawn from a seed that is printed; what a process is doing when
one comes is up to the machine, so a second campaign with that seed hits other moments.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from slurm_cluster import Cluster, until
from slurm_training import JOB, WORDS, steps, submitted, trainer, weights_of

from trainer.drive.progress import read_starts
from trainer.paths import RunFolder
from trainer.train.checkpoint.format import published

STEPS_PER_KILL = 16
"""The run is this much longer for every kill, so that it does not end before the last one."""
LONG_STEPS = ("optim.batch_packs=8", "eval.every=24", "checkpoint.every=4")
LONGEST_START = 15.0
"""Seconds after which a start that is killed blindly is killed at the latest."""
PATIENCE = 300.0
"""Seconds in which the run has to go on after a kill."""
OVER = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
NODE_EVERY = 10
"""A whole node goes once in so many kills: Slurm takes half a minute to notice."""


@dataclass(frozen=True, slots=True)
class Point:
    """One kill, or the end, and what is wrong; empty: it was survived."""

    what: str
    problem: str


class Campaign:
    """The job of one run, which is submitted again whenever it is over."""

    def __init__(self, lab: Cluster, cwd: Path, *, kills: int, seed: int, nodes: int) -> None:
        self.lab, self.cwd, self.nodes = lab, cwd, nodes
        self.chance = random.Random(seed)
        self.run = RunFolder(cwd / "killed")
        self.words = (*WORDS, f"optim.max_steps={STEPS_PER_KILL * kills}", *LONG_STEPS)
        self.job = 0
        self.typed = 0
        self._ways: list[Callable[[], str]] = [self._rank, self._agent, self._batch, self._cancel, self._requeue]

    def submit(self) -> None:
        """The command of the run, typed once more; and again where its last job is still ending."""
        own = (f"launch.nodes={self.nodes}", "launch.max_stalls=1000", f"run.dir={self.run.root}")

        def is_submitted() -> bool:
            job = submitted(trainer(self.lab, self.cwd, *self.words, *JOB, *own))
            self.job, self.typed = job or self.job, self.typed + 1
            return job is not None

        until(is_submitted, "a new job is submitted", PATIENCE)

    def strike(self, number: int) -> Point:
        """Wait for a random moment of this start, kill, and wait for the next start."""
        name = f"kill {number + 1}"
        began = steps(self.run)
        goal = began + self.chance.randint(1, 8) if number % 2 else 0
        after = self.chance.uniform(0.0, 1.0 if number % 2 else LONGEST_START)
        try:
            until(lambda: (self._has_begun() and steps(self.run) >= goal) or self._is_over(), name, PATIENCE)
            time.sleep(after)
            if self._is_over():
                return self._came_too_late(name)
            restarts, at, saved = self.lab.field(self.job, "Restarts"), steps(self.run), self._saved()
            way = self._node if number % NODE_EVERY == NODE_EVERY - 1 else self.chance.choice(self._ways)
            name = f"{name} after step {at}: {way()}"
            self._goes_on(restarts)
        except AssertionError as fault:
            return Point(name, f"{fault}; {self._last_words()}")
        kept = self._saved()
        return Point(name, "" if kept >= saved else f"step {saved} was published, and step {kept} is the newest now")

    def _has_begun(self) -> bool:
        """Whether the present start runs: processes of the one before it may still be ending."""
        starts, restarts = read_starts(self.run), int(self.lab.field(self.job, "Restarts"))
        return bool(starts) and (starts[-1].job, starts[-1].restarts) == (self.job, restarts)

    def _is_over(self) -> bool:
        return self._state() in OVER

    def _came_too_late(self, name: str) -> Point:
        """The job has ended without having been killed."""
        state, said = self._state(), self._last_words()
        if state != "COMPLETED":
            self.submit()
        return Point(name, f"the job was {state} before it; {said}")

    def _saved(self) -> int:
        """The step of the newest checkpoint."""
        found = published(self.run.checkpoints)
        return int(found[0].name.removeprefix("step-")) if found else 0

    def finish(self) -> Point:
        """Let the run end, and compare its weights with those of an undisturbed one."""
        try:
            until(lambda: self._state() == "COMPLETED", "the run is finished", 2 * PATIENCE)
        except AssertionError as fault:
            return Point("the end", f"{fault}; {self._last_words()}")
        straight = RunFolder(self.cwd / "straight")
        trainer(self.lab, self.cwd, *self.words, f"launch.processes={self.nodes}", f"run.dir={straight.root}")
        want, got = weights_of(straight), weights_of(self.run)
        return Point(f"the end: sha256 {got[:16]}", "" if want == got else f"not {want[:16]} of the undisturbed run")

    def _goes_on(self, restarts: str) -> None:
        until(
            lambda: self._is_over() or self.lab.field(self.job, "Restarts") != restarts,
            "this start has ended",
            PATIENCE,
        )
        if self._is_over():
            self.submit()

    def _state(self) -> str:
        return self.lab.field(self.job, "JobState")

    def _last_words(self) -> str:
        log = self.run.logs / "slurm.log"
        return " / ".join(log.read_text().splitlines()[-3:]) if log.exists() else "no log"

    # -- ways of killing

    def _processes(self, word: str) -> list[psutil.Process]:
        """Those of ours; srun has the words of them all in its command, and a helper that nobody misses."""
        found = [(one, _command(one)) for one in self.lab.processes(str(self.run.root))]
        ours = [(one, words) for one, words in found if words and "python" in Path(words[0]).name]
        return [one for one, words in ours if any(word in part for part in words)]

    def _kill(self, what: str, word: str) -> str:
        """One of the processes with ``word`` in their command; before there is one, any process of the job."""
        found = self._processes(word)
        if not found:
            what, found = f"what there is before {what}", self._processes("")
        if not found:
            return self._requeue()
        try:
            self.chance.choice(found).kill()
        except psutil.NoSuchProcess:
            return self._requeue()
        return f"SIGKILL of {what}"

    def _rank(self) -> str:
        return self._kill("a rank", "trainer.worker")

    def _agent(self) -> str:
        return self._kill("an agent", "--node-rank")

    def _batch(self) -> str:
        return self._kill("the batch step", "trainer.drive.job")

    def _cancel(self) -> str:
        self.lab.ask("scancel", "--signal=KILL", str(self.job), check=False)
        return "scancel --signal=KILL"

    def _requeue(self) -> str:
        self.lab.ask("scontrol", "requeue", str(self.job), check=False)
        return "scontrol requeue"

    def _node(self) -> str:
        listed = self.lab.ask("scontrol", "show", "hostnames", self.lab.field(self.job, "NodeList"), check=False)
        nodes = [node for node in listed.split() if node in self.lab.daemons]
        if not nodes:
            return self._requeue()
        node, restarts = self.chance.choice(nodes), self.lab.field(self.job, "Restarts")
        self.lab.lose_power(node)
        until(
            lambda: self._is_over() or self.lab.field(self.job, "Restarts") != restarts,
            "the loss of a node is noticed",
            PATIENCE,
        )
        self.lab.start_node(node)
        return "a node with all its processes"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def run_campaign(
    lab: Cluster, folder: Path, *, kills: int, seed: int, nodes: int, tell: Callable[[str], None] = lambda _: None
) -> list[Point]:
    """Train with so many kills and compare the end; the run and its undisturbed twin lie in ``folder``."""
    tell(f"{kills} kills, seed {seed}")
    campaign = Campaign(lab, folder, kills=kills, seed=seed, nodes=nodes)
    campaign.submit()
    points: list[Point] = []
    for number in range(kills):
        points.append(campaign.strike(number))
        tell(f"{points[-1].what}{': ' if points[-1].problem else ''}{points[-1].problem}")
    points.append(campaign.finish())
    tell(f"{points[-1].what}: the command was typed {campaign.typed} times{points[-1].problem}")
    return points
