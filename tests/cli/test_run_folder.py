"""One small run, for real: it does everything once, can be stopped and killed anywhere, and guards its folder."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from cli_fixtures import NOTHING_HEAVY, Ended, trainer, trainer_until
from launch_fixtures import Gone

from trainer.cost.book import BETWEEN
from trainer.cost.ledger import read_account
from trainer.drive.lock import hold
from trainer.markers import STAGES
from trainer.paths import RunFolder


class Once:
    """A folder in which the smoke experiment was run to its end."""

    def __init__(self, cwd: Path, cache: Path) -> None:
        self.cwd = cwd
        self.words = ["+experiment=smoke", "launch.device=cpu", f"run.cache={cache}"]
        self.ended = trainer(cwd, *self.words)
        (self.root,) = (cwd / "outputs" / "smoke").iterdir()
        self.folder = RunFolder(self.root)

    def again(self, *words: str) -> Ended:
        return trainer(self.cwd, *words, *self.words)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Once:
    return Once(tmp_path_factory.mktemp("once"), cache)


def steps(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.metrics_jsonl.read_text().splitlines()]


def spent_on(folder: RunFolder, stage: str) -> float:
    return sum(spell.seconds for spell in read_account(folder.cost).spells if spell.stage == stage)


def test_a_run_does_everything(once: Once) -> None:
    assert once.ended.code == 0, once.ended.out + once.ended.err
    assert once.ended.err.splitlines()[-1] == NOTHING_HEAVY
    assert sorted(path.stem for path in once.folder.stages.iterdir()) == sorted(STAGES)
    assert once.folder.done.read_text().split()[0] == once.root.name
    assert steps(once.folder) == list(range(1, len(steps(once.folder)) + 1))
    for part in ("Result", "Time", "Cost", "Where everything is", str(once.folder.merged), str(once.folder.card)):
        assert part in once.ended.out
    spent = {spell.stage for spell in read_account(once.folder.cost).spells if spell.core_seconds > 0}
    assert spent == {*STAGES, BETWEEN}
    assert "| CO2 equivalent | " in once.folder.card.read_text()


def test_the_same_command_again_finds_everything_done(once: Once) -> None:
    before = {path: path.stat().st_mtime_ns for path in once.root.rglob("*") if path != once.folder.lock}

    ended = once.again()

    assert ended.code == 0
    assert f"everything was done before, with the same inputs: {once.root}" in ended.words()
    assert ended.err.splitlines() == [NOTHING_HEAVY]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_plan_says_that_nothing_is_left_to_do(once: Once) -> None:
    ended = once.again("plan")

    assert ended.code == 0
    fates = [line for line in ended.words() if "nothing it depends on has changed" in line]
    assert [line.split()[0] for line in fates] == list(STAGES)
    assert any(line.startswith("memory of a rank about ") for line in ended.words())


def test_one_stage_of_a_run_that_exists(once: Once) -> None:
    marker = once.folder.stages / "evaluate.json"
    before, spent = marker.read_text(), spent_on(once.folder, "evaluate")
    marker.unlink()

    ended = trainer(once.cwd, "evaluate", str(once.root))

    assert ended.code == 0, ended.out + ended.err
    assert "to do: evaluate" in ended.words()
    assert json.loads(marker.read_text())["inputs"] == json.loads(before)["inputs"]
    assert spent_on(once.folder, "evaluate") > spent, "what is done again is spent again"


def test_a_folder_in_use_is_refused(once: Once) -> None:
    with hold(once.folder.lock, "train"):
        ended = once.again()

    assert (ended.code, ended.out) == (2, "")
    assert f"error: {once.root}: this run folder is in use" in ended.err
    assert f"'train' of process {os.getpid()} on " in ended.err
    assert ended.err.splitlines()[-1] == NOTHING_HEAVY


def test_a_folder_of_another_run_is_refused(once: Once) -> None:
    ended = once.again(f"run.dir={once.root}", "run.seed=5")

    assert ended.code == 2
    assert "the run folder holds a run that trains differently" in ended.err
    assert "run.seed: 0 -> 5" in ended.err


LONG = [
    "train",
    "+experiment=smoke",
    "launch.device=cpu",
    "optim.epochs=5000",
    "optim.max_steps=90000",
    "eval.every=5",
    "run.dir=run",
]


def long_words(cache: Path, processes: int) -> list[str]:
    return [*LONG, f"run.cache={cache}", f"launch.processes={processes}"]


class StopInTraining:
    """Sends one signal to the command once it trains."""

    def __init__(self, number: signal.Signals) -> None:
        self._number = number
        self._sent = False

    def __call__(self, line: str, process: subprocess.Popen[str]) -> None:
        if line.startswith("train ") and not self._sent:
            self._sent = True
            process.send_signal(self._number)


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_saves_and_the_same_command_goes_on(cache: Path, tmp_path: Path, processes: int) -> None:
    words = long_words(cache, processes)
    folder = RunFolder(tmp_path / "run")

    first = trainer_until(tmp_path, words, StopInTraining(signal.SIGINT))
    taken = steps(folder)
    second = trainer_until(tmp_path, words, StopInTraining(signal.SIGTERM))

    assert (first.code, second.code) == (75, 75), first.out + second.out
    assert "Traceback" not in first.out + second.out
    assert f"to continue, type:\n  python -m trainer {' '.join(words)}\n" in first.out
    assert taken == list(range(1, len(taken) + 1))
    assert steps(folder) == list(range(1, len(steps(folder)) + 1))
    assert len(steps(folder)) > len(taken) > 0


def test_a_killed_run_leaves_nobody_and_goes_on(cache: Path, tmp_path: Path) -> None:
    words = long_words(cache, 2)
    folder = RunFolder(tmp_path / "run")
    ranks: list[Gone] = []

    def kill(line: str, process: subprocess.Popen[str]) -> None:
        if line.startswith("step 10:"):  # the checkpoint of step 5 is published
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ranks.extend(Gone(int(pid)) for pid in children)
            process.kill()

    killed = trainer_until(tmp_path, words, kill)
    gone = [rank.wait() for rank in ranks]
    again = trainer_until(tmp_path, words, StopInTraining(signal.SIGINT))

    assert (killed.code, gone) == (-signal.SIGKILL, [True, True])
    assert again.code == 75, again.out
    assert steps(folder) == list(range(1, len(steps(folder)) + 1))
    assert len(steps(folder)) > 5
