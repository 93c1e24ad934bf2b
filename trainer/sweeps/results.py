"""What a sweep leaves: a table, plots, and the best trial as an experiment that can be run as it stands."""

import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import yaml

from trainer import console
from trainer.compose import compose
from trainer.config import Config
from trainer.console import format_seconds
from trainer.paths import write_atomic
from trainer.sweeps.folder import SweepFolder
from trainer.sweeps.pictures import draw_importances, draw_parallel
from trainer.sweeps.space import SearchSpace, trial_base
from trainer.sweeps.study import WHY, Study, Trial, overrides_of, ranked

NOT_OF_A_RECIPE = ("dir", "root", "name", "cache")
"""Keys of ``run`` that say where, and belong in no experiment."""
SHOWN = 30
"""Trials in the table on the terminal; ``trials.csv`` has all."""


def write_results(
    folder: SweepFolder,
    study: Study,
    space: SearchSpace,
    overrides: Sequence[str],
    *,
    config_dir: Path | None,
    cwd: Path,
) -> Trial | None:
    """Write table, plots and the best experiment; returns the best trial, None while there is none."""
    trials = study.trials()
    importances = study.importances()
    best = next(iter(ranked(trials, space.metric.goal)), None)
    write_atomic(folder.trials_csv, trials_csv(trials, space, folder))
    write_atomic(folder.report_html, report_page(study, space, trials))
    draw_importances(folder.importance_png, importances, space.metric.name)
    draw_parallel(folder.parallel_png, trials, space)
    if best is not None:
        text = best_experiment(best, space, overrides, config_dir=config_dir, cwd=cwd)
        write_atomic(folder.best_yaml, text)
    return best


def show_results(folder: SweepFolder, study: Study, space: SearchSpace, best: Trial | None) -> None:
    """Print the trials, best first, the importances, and how to run the best."""
    trials = study.trials()
    names = [parameter.name for parameter in space.parameters if not parameter.constant]
    order = ranked(trials, space.metric.goal)
    order += [trial for trial in trials if trial not in order]
    rows = [_row(trial, names, folder) for trial in order[:SHOWN]]
    console.table(["trial", "state", space.metric.name, *names, "time", "run"], rows, title="Trials")
    if len(order) > SHOWN:
        console.note(f"{len(order) - SHOWN} more are in {folder.trials_csv}")
    counts = {
        state: sum(trial.state == state for trial in trials) for state in ("complete", "pruned", "failed", "running")
    }
    console.say(f"{len(trials)} trials: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count))
    if counts["running"]:
        console.note("the running ones belong to other workers; the same command shows them when they have ended")
    importances = study.importances()
    if importances:
        shares = [[name, f"{100 * share:.0f} %"] for name, share in importances.items()]
        console.table(["parameter", "importance"], shares)
    places = [folder.trials_csv, folder.report_html, folder.importance_png, folder.parallel_png]
    console.note("files: " + ", ".join(str(path) for path in places if path.exists()))
    if best is None:
        console.say("no trial has ended with a figure: there is no best one")
        return
    console.say(f"best: trial {best.number}, {space.metric.name} {best.value:.6g}; to run it with everything, type:")
    console.say(f"  python -m trainer +experiment=best --config-dir {folder.conf}")


def _row(trial: Trial, names: Sequence[str], folder: SweepFolder) -> list[str]:
    value = "-" if trial.value is None else f"{trial.value:.6g}"
    time = "-" if trial.seconds is None else format_seconds(trial.seconds)
    params = [_short(trial.params.get(name)) for name in names]
    return [str(trial.number), trial.state, value, *params, time, str(folder.run(trial.number).root)]


def _short(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def trials_csv(trials: Sequence[Trial], space: SearchSpace, folder: SweepFolder) -> str:
    """One line per trial, by number; ``why`` says what went wrong with a failed one."""
    names = [parameter.name for parameter in space.parameters if not parameter.constant]
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(["trial", "state", space.metric.name, *names, "seconds", "run", "why"])
    for trial in trials:
        seconds = "" if trial.seconds is None else f"{trial.seconds:.1f}"
        params = [trial.params.get(name, "") for name in names]
        value = "" if trial.value is None else trial.value
        run, why = folder.run(trial.number).root, trial.notes.get(WHY, "")
        table.writerow([trial.number, trial.state, value, *params, seconds, run, why])
    return written.getvalue()


def report_page(study: Study, space: SearchSpace, trials: Sequence[Trial]) -> str:
    """The plots of Optuna in one file that needs no network; plotly itself is in it."""
    done = [trial for trial in trials if trial.state == "complete"]
    body = "\n".join(study.figures()) if done else "<p>No trial has ended with a figure yet.</p>"
    title = html.escape(f"Sweep {space.name}: {space.metric.goal} {space.metric.name}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body{font-family:sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}</style></head>\n"
        f"<body><h1>{title}</h1>\n<p>{len(trials)} trials, {len(done)} complete.</p>\n{body}\n</body></html>\n"
    )


def best_experiment(
    best: Trial, space: SearchSpace, overrides: Sequence[str], *, config_dir: Path | None, cwd: Path
) -> str:
    """The best trial as an experiment: what the sweep's experiment is, and what differs from it.

    Without what only trials need (``export=none`` of the sweep's command): the best is to be exported.
    """
    words = [word for word in trial_base(space, overrides) if word not in space.overrides or word in overrides]
    experiments = [word for word in words if word.lstrip("+").startswith("experiment=")]
    below = _plain(compose(experiments, config_dir=config_dir, cwd=cwd))
    here = _plain(compose([*words, *overrides_of(best.params, space)], config_dir=config_dir, cwd=cwd))
    body = {
        section: changed
        for section, keys in here.items()
        if (changed := {key: value for key, value in keys.items() if _says(section, key, value, below)})
    }
    names = [word.partition("=")[2] for word in experiments]
    head = f"# Trial {best.number} of the sweep {space.name}: {space.metric.name} {best.value:.6g}.\n"
    defaults = {"defaults": [*(f"/experiment/{name}" for name in names), "_self_"]}
    written = yaml.safe_dump(defaults | body, sort_keys=False, allow_unicode=True, width=120)
    return f"# @package _global_\n{head}{written}"


def _says(section: str, key: str, value: object, below: Mapping[str, Mapping[str, Any]]) -> bool:
    return value != below[section][key] and not (section == "run" and key in NOT_OF_A_RECIPE)


def _plain(config: Config) -> dict[str, dict[str, Any]]:
    return cast("dict[str, dict[str, Any]]", msgspec.to_builtins(config))
