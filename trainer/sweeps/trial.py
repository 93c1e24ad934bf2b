"""One trial: an ordinary run in a process of its own, followed through the figures that it writes.

The run knows nothing of the sweep. Its validations are read off ``metrics.jsonl``, as any other onlooker reads them; a
hopeless one gets SIGTERM and stops in good order. Whatever the process does, dying included, touches no other trial.
"""

import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer import console
from trainer.drive.job import lock_is_free
from trainer.errors import EXIT_DONE, EXIT_NEEDS_PERSON, EXIT_STOPPED, EXIT_USER
from trainer.markers import STAGES, read_marker
from trainer.paths import RunFolder
from trainer.records import read_records
from trainer.sweeps.figures import final_value, validations
from trainer.sweeps.study import Study
from trainer_launch.children import Child, start
from trainer_launch.verdict import last_words

LOOK_SECONDS = 0.25
LOOK_SHARE = 20.0
"""A trial's figures are looked at so often, and never for more than a twentieth of the time."""
Outcome = Literal["complete", "pruned", "failed", "stopped", "again"]
"""``stopped``: by the sweep itself; ``again``: it ended without being finished, and may be started again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one start of a trial ended; ``why`` in words, ``progressed``: it got further than the start before."""

    outcome: Outcome
    why: str = ""
    value: float | None = None
    progressed: bool = False


def run_trial(
    study: Study,
    number: int,
    folder: RunFolder,
    words: Sequence[str],
    *,
    metric: str,
    log: Path,
    variables: dict[str, str],
    claim: int,
    stop: threading.Event,
) -> Ended:
    """Start the run of a trial, or start it again in its folder, and follow it to its end.

    ``words``: what means this run; ``variables``: added to its environment; ``claim``: a descriptor that it keeps open;
    ``stop``: set when the sweep is to end.
    """
    if not lock_is_free(folder, stop):
        return Ended(outcome="stopped" if stop.is_set() else "again", why="another process holds its run folder")
    before = _progress(folder)
    ended = threading.Event()
    child = Child(
        name=f"trial {number}",
        arguments=(sys.executable, "-m", "trainer", "run", *words),
        variables=variables,
        log=log,
        shown=False,
    )
    # Tied to this thread, which lives as long as the trial: a worker that is killed takes its trial with it.
    running = start(child, on_line=lambda _: None, on_exit=ended.set, keep_open=(claim,))
    pruned = told = False
    pause = LOOK_SECONDS
    while not ended.wait(pause):
        began = time.monotonic()
        pruned = pruned or _report(study, number, folder, metric)
        pause = max(LOOK_SECONDS, LOOK_SHARE * (time.monotonic() - began))  # the record of a long run takes longer
        if (pruned or stop.is_set()) and not told:
            running.process.send_signal(signal.SIGTERM)
            told = True
    code = running.process.wait()
    if not pruned:
        _report(study, number, folder, metric)
    return judge(code, folder, metric, log, pruned=pruned, stopped=stop.is_set(), further=_progress(folder) > before)


def _report(study: Study, number: int, folder: RunFolder, metric: str) -> bool:
    """Tell the study of new validations, one by one; says whether the trial should end now."""
    known = len(study.reported(number))
    for iteration, value in enumerate(validations(folder, metric)[known:], start=known + 1):
        study.report(number, iteration, value)
        console.note(f"trial {number}: {metric} {value:.6g} at validation {iteration}")
        if study.should_prune(number):  # at every one, so that nothing depends on how often this is looked at
            return True
    return False


def _progress(folder: RunFolder) -> tuple[int, int]:
    """Finished stages, and steps on record: both only grow from one good start to the next."""
    stages = sum(read_marker(folder, stage) is not None for stage in STAGES)
    return stages, len(read_records(folder.metrics_jsonl))


def judge(code: int, folder: RunFolder, metric: str, log: Path, *, pruned: bool, stopped: bool, further: bool) -> Ended:
    """How the start of a trial ended, by its exit code and by what was asked of it.

    ``further``: it got further than the start before.
    """
    if code == EXIT_DONE:
        value = final_value(folder, metric)
        if value is None:
            return Ended(outcome="failed", why=f"the run ended well and has no finite {metric}")
        return Ended(outcome="complete", value=value)
    if pruned:
        return Ended(outcome="pruned")
    if stopped:
        return Ended(outcome="stopped")
    if code in (EXIT_USER, EXIT_NEEDS_PERSON):
        return Ended(outcome="failed", why=f"exit code {code}: {last_error(log)}")
    if code == EXIT_STOPPED:
        return Ended(outcome="again", why="stopped in good order by somebody else", progressed=further)
    if code < 0:
        return Ended(outcome="again", why=f"ended by {signal.Signals(-code).name}")
    return Ended(outcome="again", why=f"exit code {code}: {last_error(log)}")


def last_error(log: Path) -> str:
    """The last line of ``log`` that says what was wrong, else its last line."""
    with suppress(OSError):
        return last_words(log, 0) or f"see {log}"
    return f"see {log}"
