"""Workers: each takes one trial after the other, a left one before a new one, until the budget is used up."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Literal

from trainer import console
from trainer.compose import quoted
from trainer.console import format_seconds
from trainer.markers import read_marker
from trainer.sweeps.folder import SweepFolder, deciding, read_settings, take_claim
from trainer.sweeps.space import SearchSpace
from trainer.sweeps.study import WHY, Study, Trial, overrides_of
from trainer.sweeps.trial import Ended, run_trial
from trainer_launch.signals import heeding

WAIT_SECONDS = 0.5
"""How long a worker waits for the first trial to have prepared what all of them need."""
HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
FAILURES = "failures"
"""Note of a trial: starts that failed, the one that is going on among them until it has ended otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What the workers of this process share. ``words``: of every trial, after ``python -m trainer run``."""

    space: SearchSpace
    study: Study
    folder: SweepFolder
    words: tuple[str, ...]
    retries: int
    stop: threading.Event


@dataclass(frozen=True, slots=True)
class Turn:
    """A trial whose claim this worker holds."""

    trial: Trial
    claim: int


def work(sweep: Sweep, variables: dict[str, str]) -> None:
    """Do trials until there is none left to begin or to continue. ``variables``: for their environment."""
    while not sweep.stop.is_set():
        turn = next_turn(sweep)
        if turn is None:
            return
        if turn == "wait":
            sweep.stop.wait(WAIT_SECONDS)
            continue
        try:
            do_turn(sweep, turn, variables)
        finally:
            os.close(turn.claim)


def next_turn(sweep: Sweep) -> Turn | Literal["wait"] | None:
    """Decide what this worker does next: a trial, ``"wait"``, or None for nothing."""
    with deciding(sweep.folder):
        trials = sweep.study.trials()
        running = [trial for trial in trials if trial.state == "running"]
        for trial in running:
            claim = take_claim(sweep.folder, trial.number)
            if claim is not None:
                return Turn(trial, claim)
        settings = read_settings(sweep.folder)
        budget = 0 if settings is None else settings.trials
        if sum(trial.state != "waiting" for trial in trials) >= budget:
            return None
        if running and not _is_prepared(sweep, trials):
            return "wait"
        trial = sweep.study.ask()
        claim = take_claim(sweep.folder, trial.number)
        return None if claim is None else Turn(trial, claim)


def _is_prepared(sweep: Sweep, trials: Sequence[Trial]) -> bool:
    """Whether some trial has brought data, model and baseline into the cache, where the others find them."""
    return any(read_marker(sweep.folder.run(trial.number), "baseline") is not None for trial in trials)


def do_turn(sweep: Sweep, turn: Turn, variables: dict[str, str]) -> None:
    """Start the trial, or start it again, and write down what came of it."""
    number, study = turn.trial.number, sweep.study
    failures = int(turn.trial.notes.get(FAILURES, 0))
    if failures > sweep.retries:
        return _fail(study, number, f"a worker ended with it {failures} times")
    if study.should_prune(number):
        study.finish(number, "pruned")
        return console.say(f"trial {number}: pruned")
    drawn = overrides_of(turn.trial.params, sweep.space)
    again = sweep.folder.run(number).plan_json.exists()
    console.say(f"trial {number}: {'goes on' if again else 'starts'} ({', '.join(drawn)})")
    # Counted before it starts: a worker that dies with its trial cannot count afterwards.
    study.note(number, FAILURES, failures + 1)
    ended = run_trial(
        study,
        number,
        sweep.folder.run(number),
        [*sweep.words, *drawn, f"run.dir={quoted(str(sweep.folder.run(number).root))}"],
        metric=sweep.space.metric.name,
        log=sweep.folder.log(number),
        variables=variables,
        claim=turn.claim,
        stop=sweep.stop,
    )
    _conclude(sweep, number, failures, ended)


def _conclude(sweep: Sweep, number: int, failures: int, ended: Ended) -> None:
    study, metric = sweep.study, sweep.space.metric.name
    if ended.outcome == "complete":
        study.finish(number, "complete", ended.value)
        console.say(f"trial {number}: {metric} {ended.value:.6g}, {_time(study, number)}")
    elif ended.outcome == "pruned":
        study.finish(number, "pruned")
        console.say(f"trial {number}: pruned after validation {len(study.reported(number))}, {_time(study, number)}")
    elif ended.outcome == "failed":
        _fail(study, number, ended.why)
    elif ended.outcome == "stopped" or ended.progressed:
        study.note(number, FAILURES, failures)
        console.say(f"trial {number}: {ended.why or 'stopped'}; it goes on where it was")
    elif failures + 1 > sweep.retries:
        _fail(study, number, ended.why)
    else:
        console.warn(f"trial {number}: {ended.why}; it is started again (failure {failures + 1} of {sweep.retries})")


def _fail(study: Study, number: int, why: str) -> None:
    study.note(number, WHY, why)
    study.finish(number, "failed")
    console.warn(f"trial {number}: failed: {why}")


def _time(study: Study, number: int) -> str:
    return format_seconds(study.trials()[number].seconds or 0.0)


def work_together(sweep: Sweep, shares: Sequence[dict[str, str]]) -> None:
    """One worker for each of ``shares`` (its variables), until all have ended.

    Raises:
        Exception: the first that ended a worker; the others were stopped.
    """
    faults: list[BaseException] = []

    def alone(variables: dict[str, str]) -> None:
        try:
            work(sweep, variables)
        except BaseException as fault:
            faults.append(fault)  # for the caller's thread
            sweep.stop.set()

    threads = [threading.Thread(target=partial(alone, share), name=f"worker {k}") for k, share in enumerate(shares)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Have SIGTERM, SIGINT, SIGUSR1 and SIGHUP set ``stop`` while the block runs.

    Nothing is raised: an exception at an arbitrary place of this thread could lose sight of trials that are saving.
    """

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if not stop.is_set():
            console.say(f"{signal.Signals(number).name}: every trial saves and ends")
        stop.set()

    with heeding(HEEDED, on_signal):
        yield
