"""Who does which trial, how often, and what is written down of it; with stand-ins for the runs themselves."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import RunError
from trainer.markers import Marker, write_marker
from trainer.paths import RunFolder, write_atomic
from trainer.sweeps import worker
from trainer.sweeps.distributions import Parameter
from trainer.sweeps.folder import Settings, SweepFolder, open_folder, take_claim
from trainer.sweeps.space import Hyperband, Metric, SearchSpace
from trainer.sweeps.study import Study, ranked
from trainer.sweeps.trial import Ended, judge
from trainer.sweeps.worker import Sweep, next_turn, work, work_together

SPACE = SearchSpace(
    name="mine",
    file="mine.yaml",
    method="bayes",
    metric=Metric(name="val_loss"),
    parameters=(
        Parameter(name="optim.lr", distribution="log_uniform_values", min=1e-4, max=1e-2),
        Parameter(name="method.rank", distribution="categorical", values=(2, 4)),
        Parameter(name="run.seed", distribution="constant", values=(7,)),
    ),
    hyperband=Hyperband(min_iter=1, eta=2),
)
GRID = SearchSpace(
    name="grid",
    file="mine.yaml",
    method="grid",
    metric=Metric(name="val_accuracy", goal="maximize"),
    parameters=(
        Parameter(name="optim.lr", distribution="categorical", values=(1e-4, 1e-3)),
        Parameter(name="method.targets", distribution="categorical", values=(["q"], ["q", "v"])),
    ),
)


def settings(trials: int, **changed: Any) -> Settings:
    usual: dict[str, Any] = {"name": "mine", "metric": "val_loss", "goal": "minimize", "method": "bayes"}
    usual |= {"pruner": "none", "seed": 0, "words": ["+experiment=smoke"], "space": {}, "identity": "0123456789"}
    return Settings(trials=trials, **(usual | changed))


def sweep_in(root: Path, trials: int, *, space: SearchSpace = SPACE, retries: int = 1, pruner: str = "none") -> Sweep:
    """A sweep as one process has it; twice in the same folder: two machines."""
    folder = SweepFolder(root)
    open_folder(folder, settings(trials))
    study = Study(folder.journal, space, seed=0, pruner=pruner, trials=trials)
    return Sweep(
        space=space, study=study, folder=folder, words=("+experiment=smoke",), retries=retries, stop=threading.Event()
    )


Script = Callable[[int, Sequence[str]], Ended]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], list[tuple[int, Sequence[str]]]]:
    """Replaces the process of a trial by ``script``; returns the list of what was started."""

    def use(script: Script) -> list[tuple[int, Sequence[str]]]:
        done: list[tuple[int, Sequence[str]]] = []

        def run_trial(study: Study, number: int, folder: RunFolder, words: Sequence[str], **_: Any) -> Ended:
            done.append((number, words))
            write_atomic(folder.plan_json, "{}")
            marker = Marker(stage="baseline", inputs="", seconds=0.0, finished="")
            write_marker(folder, marker)
            return script(number, words)

        monkeypatch.setattr(worker, "run_trial", run_trial)
        return done

    return use


def states(sweep: Sweep) -> list[str]:
    return [trial.state for trial in sweep.study.trials()]


def good(number: int, _: Sequence[str]) -> Ended:
    return Ended(outcome="complete", value=float(number))


def test_a_budget_is_kept_by_all_workers_together(tmp_path: Path, starts: Callable[[Script], list[Any]]) -> None:
    done = starts(good)
    sweep = sweep_in(tmp_path / "s", 7)

    work_together(sweep, [{}, {}, {}])

    assert states(sweep) == ["complete"] * 7
    assert sorted(number for number, _ in done) == list(range(7))
    work_together(sweep_in(tmp_path / "s", 7), [{}])
    assert len(done) == 7, "the same command again has nothing to do"
    work_together(sweep_in(tmp_path / "s", 9), [{}])
    assert len(done) == 9, "with more trials it goes on"


def test_a_trial_is_a_plain_command_line(tmp_path: Path, starts: Callable[[Script], list[Any]]) -> None:
    done = starts(good)
    work(sweep_in(tmp_path / "s", 1), {})

    ((_, words),) = done
    lr, rank = words[1], words[2]
    assert words[0] == "+experiment=smoke"
    assert 1e-4 <= float(lr.removeprefix("optim.lr=")) <= 1e-2
    assert rank in ("method.rank=2", "method.rank=4")
    assert words[3:] == ["run.seed=7", f"run.dir='{tmp_path}/s/trials/0000'"]


def test_what_is_drawn_depends_on_the_trial_and_not_on_the_process(
    tmp_path: Path, starts: Callable[[Script], list[Any]]
) -> None:
    starts(good)
    one, first, second = sweep_in(tmp_path / "one", 4), sweep_in(tmp_path / "two", 2), None
    work(one, {})
    work(first, {})
    second = sweep_in(tmp_path / "two", 4)
    work(second, {})
    assert [trial.params for trial in one.study.trials()] == [trial.params for trial in second.study.trials()]
    drawn = sorted(trial.params["optim.lr"] for trial in one.study.trials())
    assert drawn[-1] / drawn[0] > 4, "draws of neighbouring trials are spread over the range"


def test_a_grid_has_every_combination_once(tmp_path: Path, starts: Callable[[Script], list[Any]]) -> None:
    done = starts(good)
    sweep = sweep_in(tmp_path / "s", 4, space=GRID)

    work_together(sweep, [{}, {}])

    assert sorted((number, *words[1:3]) for number, words in done) == [
        (0, "optim.lr=0.0001", "method.targets=['q']"),
        (1, "optim.lr=0.0001", "method.targets=['q', 'v']"),
        (2, "optim.lr=0.001", "method.targets=['q']"),
        (3, "optim.lr=0.001", "method.targets=['q', 'v']"),
    ]
    assert [trial.number for trial in ranked(sweep.study.trials(), "maximize")] == [3, 2, 1, 0]


@pytest.mark.parametrize(("retries", "count"), [(0, 1), (2, 3)])
def test_a_trial_that_dies_is_started_again_so_often(
    tmp_path: Path, starts: Callable[[Script], list[Any]], retries: int, count: int
) -> None:
    done = starts(lambda n, _: Ended(outcome="again", why="ended by SIGKILL") if n == 0 else good(n, []))
    sweep = sweep_in(tmp_path / "s", 2, retries=retries)

    work(sweep, {})

    assert [number for number, _ in done] == [0] * count + [1]
    assert states(sweep) == ["failed", "complete"]
    assert sweep.study.trials()[0].notes["why"] == "ended by SIGKILL"


def test_a_preempted_trial_that_gets_further_is_no_failure(
    tmp_path: Path, starts: Callable[[Script], list[Any]]
) -> None:
    ends = [Ended(outcome="again", why="stopped", progressed=True)] * 4 + [Ended(outcome="complete", value=1.0)]
    done = starts(lambda n, _: ends.pop(0))
    sweep = sweep_in(tmp_path / "s", 1, retries=0)

    work(sweep, {})

    assert len(done) == 5
    assert states(sweep) == ["complete"]


def test_a_config_that_is_refused_is_not_tried_again(
    tmp_path: Path, starts: Callable[[Script], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    done = starts(lambda n, _: Ended(outcome="failed", why="exit code 2: bad"))
    sweep = sweep_in(tmp_path / "s", 1, retries=5)

    work(sweep, {})

    assert (len(done), states(sweep)) == (1, ["failed"])
    assert "trial 0: failed: exit code 2: bad" in capsys.readouterr().err


def test_the_trial_of_a_dead_worker_is_taken_over(tmp_path: Path, starts: Callable[[Script], list[Any]]) -> None:
    done = starts(good)
    dead, other = sweep_in(tmp_path / "s", 1), sweep_in(tmp_path / "s", 1)
    turn = next_turn(dead)
    assert isinstance(turn, worker.Turn)
    assert next_turn(other) is None, "its claim is held"
    os.close(turn.claim)  # what the kernel does for a dead process

    work(other, {})

    assert [number for number, _ in done] == [0]
    assert states(other) == ["complete"]


def test_others_wait_until_the_first_trial_has_prepared(tmp_path: Path) -> None:
    first, other = sweep_in(tmp_path / "s", 3), sweep_in(tmp_path / "s", 3)
    turn = next_turn(first)
    assert isinstance(turn, worker.Turn)
    assert next_turn(other) == "wait"
    write_marker(first.folder.run(0), Marker(stage="baseline", inputs="", seconds=0.0, finished=""))
    second = next_turn(other)
    assert isinstance(second, worker.Turn)
    assert second.trial.number == 1
    for held in (turn, second):
        os.close(held.claim)


def test_a_stopped_sweep_leaves_its_trials_to_the_next(tmp_path: Path, starts: Callable[[Script], list[Any]]) -> None:
    sweep = sweep_in(tmp_path / "s", 2, retries=0)

    def stops(number: int, _: Sequence[str]) -> Ended:
        sweep.stop.set()
        return Ended(outcome="stopped")

    starts(stops)
    work(sweep, {})
    assert states(sweep) == ["running"]
    done = starts(good)
    again = sweep_in(tmp_path / "s", 2, retries=0)
    work(again, {})
    assert [number for number, _ in done] == [0, 1]
    assert states(again) == ["complete", "complete"]


def test_a_fault_of_one_worker_stops_the_others_and_is_raised(
    tmp_path: Path, starts: Callable[[Script], list[Any]]
) -> None:
    def fails(number: int, _: Sequence[str]) -> Ended:
        raise OSError(28, "No space left on device")

    starts(fails)
    sweep = sweep_in(tmp_path / "s", 9)
    with pytest.raises(OSError, match="No space"):
        work_together(sweep, [{}, {}])
    assert sweep.stop.is_set()


def test_bad_trials_are_pruned_as_the_file_says(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path / "s", 3, pruner="hyperband")
    verdicts: list[bool] = []
    for number, value in enumerate((1.0, 2.0, 0.5)):
        sweep.study.ask()
        sweep.study.report(number, 1, value)
        sweep.study.report(number, 1, 99.0)  # a validation that is known already
        verdicts.append(sweep.study.should_prune(number))
        sweep.study.finish(number, "pruned" if verdicts[-1] else "complete", None if verdicts[-1] else value)
    assert verdicts == [False, True, False]
    assert [trial.reported for trial in sweep.study.trials()] == [{1: 1.0}, {1: 2.0}, {1: 0.5}]


# -- processes -----------------------------------------------------------------------------------------------------

STAND_IN = """
import json, os, signal, sys
from pathlib import Path

run = Path(next(word for word in sys.argv if word.startswith("run.dir=")).partition("=")[2].strip("'"))
run.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
{body}
"""
WAITS = """
(run / "metrics.jsonl").write_text('{"step": 1, "val_loss": 5.0}\\n{"step": 2, "val_loss": 0.1}\\n')
signal.pause()
"""
DIES_ONCE = """
if not (run / "died").exists():
    (run / "died").touch()
    os.kill(os.getpid(), signal.SIGKILL)
(run / "stages").mkdir()
marker = {"stage": "train", "inputs": "", "seconds": 0.0, "finished": "", "summary": {"best_loss": 0.5}}
(run / "stages" / "train.json").write_text(json.dumps(marker))
"""


@pytest.fixture
def runs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``python -m trainer`` of trials is a small program: a module of the current folder comes first."""
    monkeypatch.chdir(tmp_path)

    def write(body: str) -> None:
        (tmp_path / "trainer.py").write_text(STAND_IN.replace("{body}", body))

    return write


def test_a_hopeless_trial_is_told_to_stop(tmp_path: Path, runs_are: Callable[[str], None]) -> None:
    runs_are(WAITS)
    sweep = sweep_in(tmp_path / "s", 2, pruner="hyperband")
    sweep.study.ask()
    sweep.study.report(0, 1, 1.0)
    assert not sweep.study.should_prune(0)
    sweep.study.finish(0, "complete", 1.0)

    work(sweep, {})

    assert states(sweep) == ["complete", "pruned"]
    assert sweep.study.trials()[1].reported == {1: 5.0}, "judged by the first validation, however many there are"


def test_a_trial_that_is_killed_is_started_again_in_its_folder(
    tmp_path: Path, runs_are: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    runs_are(DIES_ONCE)
    sweep = sweep_in(tmp_path / "s", 1)

    work(sweep, {})

    (trial,) = sweep.study.trials()
    assert (trial.state, trial.value) == ("complete", 0.5)
    assert "trial 0: ended by SIGKILL; it is started again (failure 1 of 1)" in capsys.readouterr().err
    assert sweep.folder.log(0).read_text().count("=== ") == 2


# -- the folder ----------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "s")
    open_folder(folder, settings(4))
    with pytest.raises(RunError) as caught:
        open_folder(folder, settings(4, seed=1, words=["+experiment=legal_lora"]))
    (problem,) = caught.value.problems
    assert "seed: 0 -> 1" in problem.got
    assert "words: ['+experiment=smoke'] -> ['+experiment=legal_lora']" in problem.got


def test_only_more_trials_are_taken_over(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "s")
    assert open_folder(folder, settings(4)).trials == 4
    assert open_folder(folder, settings(6)).trials == 6
    assert open_folder(folder, settings(5)).trials == 6


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.log").write_text("2026-01-01 disk full\n")
    with pytest.raises(RunError, match="journal of something else"):
        open_folder(SweepFolder(tmp_path), settings(4))


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    open_folder(folder, settings(4))
    folder.journal.write_text('{"no": "operation"}\n')
    with pytest.raises(RunError, match="the journal of the sweep cannot be used"):
        Study(folder.journal, SPACE, seed=0, pruner="none")


def test_a_claim_is_held_by_one_and_free_when_it_ends(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    open_folder(folder, settings(4))
    mine = take_claim(folder, 0)
    assert mine is not None
    assert take_claim(folder, 0) is None
    os.close(mine)
    again = take_claim(folder, 0)
    assert again is not None
    os.close(again)


# -- how a start ended ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "pruned", "stopped", "outcome"),
    [
        (75, False, False, "again"),
        (75, True, False, "pruned"),
        (75, False, True, "stopped"),
        (-9, False, False, "again"),
        (-15, False, True, "stopped"),
        (1, False, False, "again"),
        (2, False, False, "failed"),
        (2, False, True, "stopped"),
        (76, False, False, "failed"),
        (0, False, False, "failed"),
    ],
)
def test_exit_codes(tmp_path: Path, code: int, pruned: bool, stopped: bool, outcome: str) -> None:
    log = tmp_path / "log"
    log.write_text("error: the first\nlast line\n")
    run = RunFolder(tmp_path / "run")
    ended = judge(code, run, "val_loss", log, pruned=pruned, stopped=stopped, further=False)
    assert ended.outcome == outcome
    if code in (1, 2) and not stopped:
        assert ended.why == f"exit code {code}: the first"
    if code == 0:
        assert ended.why == "the run ended well and has no finite val_loss"


@pytest.mark.parametrize("pruned", [False, True])
def test_a_run_that_was_faster_than_its_end_counts(tmp_path: Path, pruned: bool) -> None:
    run = RunFolder(tmp_path / "run")
    write_marker(run, Marker(stage="train", inputs="", seconds=0.0, finished="", summary={"best_loss": 0.25}))
    ended = judge(0, run, "val_loss", tmp_path / "log", pruned=pruned, stopped=False, further=True)
    assert (ended.outcome, ended.value) == ("complete", 0.25)
