"""``-m a=1,2`` with another verb than ``run``, or with runs that are jobs: each in turn, as if it were typed alone.

What trains here is a grid of the sweep (``command.py``), with a journal, workers and retries. A ``plan`` of each
combination, or the submission of each as a Slurm job of its own, has nothing to search. One that fails does not stop
the others; one that is stopped (75) ends the row, because whoever stopped it meant all of it.
"""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer import console
from trainer.config import Config
from trainer.drive.prepared import read_scores
from trainer.drive.run import devices_here
from trainer.errors import EXIT_DONE, EXIT_STOPPED, TrimtabError
from trainer.paths import RunFolder
from trainer.plan import make_plan
from trainer.records import curve_of, read_records


def do_each(each: Sequence[Sequence[str]], configs: Sequence[Config], do: Callable[[int], int], *, cwd: Path) -> int:
    """Do the runs of ``each`` with ``do(number from 0)``; gives the first exit code that is not 0.

    ``configs``: of the same runs, for the table.
    """
    codes: list[int] = []
    for number, overrides in enumerate(each):
        console.say(f"[{number + 1} of {len(each)}] {shlex.join(overrides)}")
        codes.append(_code(do, number))
        if codes[-1] == EXIT_STOPPED:
            break
    varied = [[word for word in overrides if any(word not in other for other in each)] for overrides in each]
    rows = [
        [" ".join(words), _state(code), *_figures(config, cwd)]
        for words, code, config in zip(varied, codes, configs, strict=False)
    ]
    console.table(["run", "exit code", "lowest validation loss", "test loss", "folder"], rows, title="Runs")
    return next((code for code in codes if code != EXIT_DONE), EXIT_DONE)


def _code(do: Callable[[int], int], number: int) -> int:
    try:
        return do(number)
    except TrimtabError as fault:
        if fault.exit_code == EXIT_STOPPED:
            raise
        console.error(fault)
        return fault.exit_code


def _state(code: int) -> str:
    return "done" if code == EXIT_DONE else str(code)


def _figures(config: Config, cwd: Path) -> list[str]:
    """Lowest validation loss, test loss and folder of a run; dashes where there is nothing yet."""
    try:
        folder = RunFolder(Path(make_plan(config, devices=devices_here(config), cwd=cwd).run_dir))
        curve, scores = curve_of(read_records(folder.metrics_jsonl), "val_loss"), read_scores(folder, "tuned")
    except TrimtabError:
        return ["-", "-", "-"]
    lowest = "-" if curve is None else f"{min(curve.values):.4f}"
    tested = "-" if scores is None or scores.loss is None else f"{scores.loss:.4f}"
    return [lowest, tested, str(folder.root)]
