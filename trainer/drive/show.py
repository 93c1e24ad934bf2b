"""``python -m trainer show RUN ...``: how a run stands, or how several differ, from the files that it left.

Nothing is computed, locked or changed, so a run can be looked at while it trains, on a login node too. Checkpoints are
compared with their manifests, by names and sizes; ``--verify`` reads every byte of them, as a resume does.
"""

import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import msgspec

from trainer import console
from trainer.console import gigabytes
from trainer.drive.lock import holder_of
from trainer.drive.overview import comparison, time_rows
from trainer.drive.prepared import read_scores
from trainer.drive.queue import job_lines
from trainer.markers import STAGES, read_marker
from trainer.paths import RunFolder
from trainer.plan import RunPlan, flat_identity, load_plan
from trainer.records import Curve, as_number, curve_of, read_records
from trainer.train.checkpoint.format import DamagedCheckpoint, published, read_manifest, verify

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60
"""Columns of a curve."""
DIGITS = 4


def show_runs(runs: Sequence[Path], *, contents: bool = False) -> None:
    """Print one run in full, or several side by side. ``contents``: read every byte of the checkpoints.

    Raises:
        RunError: a plan or a record of steps cannot be understood.
    """
    folders = [RunFolder(run.resolve()) for run in runs]
    if len(folders) == 1:
        show_run(folders[0], contents=contents)
    else:
        show_side_by_side(folders)


def show_run(folder: RunFolder, *, contents: bool = False) -> None:
    """State, stages, curves, throughput, scores and checkpoints of one run."""
    plan, records = _plan(folder), read_records(folder.metrics_jsonl)
    console.say(f"run {plan.name}/{plan.identity} in {folder.root}: {state_of(folder, records)}")
    for line in job_lines(folder):
        console.say(line)
    console.table(["stage", "time", ""], stage_rows(folder), title="Stages")
    if records:
        console.table(["", ""], [list(row) for row in training_rows(records)], title="Training")
    rows = comparison(folder)
    if rows:
        console.table(["on the test split", "before", "after"], rows, title="Result")
    rows = checkpoint_rows(folder, plan, contents=contents)
    if rows:
        console.table(["checkpoint", "kind", "size", "written (UTC)", "state"], rows, title="Checkpoints")
        if not contents:
            console.note(f"hashes: python -m trainer show --verify {folder.root}")


def show_side_by_side(folders: Sequence[RunFolder]) -> None:
    """What differs in the configs of several runs, their curves and their figures, a column each."""
    plans = [_plan(folder) for folder in folders]
    records = [read_records(folder.metrics_jsonl) for folder in folders]
    names = ["", *(f"{plan.name}/{plan.identity}" for plan in plans)]
    differing = config_rows(plans)
    console.table(names, differing or [["nothing differs", *("" for _ in plans)]], title="What differs")
    console.table(names, figure_rows(folders, records), title="Figures")
    for plan, lines in zip(plans, records, strict=True):
        curve = curve_of(lines, "val_loss") or curve_of(lines, "loss")
        if curve is not None:
            console.say(f"{sparkline(curve.values)}  {span(curve)}  {plan.name}/{plan.identity}")


def _plan(folder: RunFolder) -> RunPlan:
    return load_plan(folder.plan_json.read_bytes())


def state_of(folder: RunFolder, records: Sequence[Mapping[str, object]]) -> str:
    """``done``, ``running``, or how far it got."""
    holder = holder_of(folder.lock)
    if holder is not None:
        return f"running: {holder}"
    if folder.done.exists():
        return "done"
    finished = [stage for stage in STAGES if read_marker(folder, stage) is not None]
    trained = f", {records[-1]['step']} steps trained" if records and "train" not in finished else ""
    return f"not running; finished stages: {', '.join(finished) or 'none'}{trained}"


def stage_rows(folder: RunFolder) -> list[list[str]]:
    """Every stage: its time and figures, or that it was not done; the sum last."""
    done = {row[0]: row for row in time_rows(folder)}
    rows = [done.get(stage, [stage, "-", "not done"]) for stage in STAGES]
    return [*rows, done["together"]]


def training_rows(records: Sequence[Mapping[str, object]]) -> list[tuple[str, str]]:
    """Curves as bars, and the figures of the steps."""
    rows: list[tuple[str, str]] = []
    for name in ("loss", "val_loss", *_other_validation_figures(records), "grad_norm", "lr"):
        curve = curve_of(records, name)
        if curve is not None:
            rows.append((name, f"{sparkline(curve.values)}  {span(curve)}"))
    speeds = curve_of(records, "tokens_per_second")
    last = records[-1]
    if speeds is not None:
        rows.append(
            ("tokens per second", f"{statistics.median(speeds.values):,.0f} (median of {len(speeds.steps)} steps)")
        )
    rows.append(("steps, epochs, tokens", f"{last['step']}, {as_number(last.get('epoch')):.2f}, {last['tokens']:,}"))
    rows.append(("peak memory", f"{as_number(last.get('memory_gb')):.2f} GB on rank 0"))
    rows.append(("time of a step", time_shares(records)))
    return rows


def _other_validation_figures(records: Sequence[Mapping[str, object]]) -> list[str]:
    names = dict.fromkeys(name for record in records for name in record if name.startswith("val_"))
    return [name for name in names if name != "val_loss"]


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """``values`` as at most ``width`` bars, each the mean of its share of them, from the lowest to the highest."""
    count = min(width, len(values))
    edges = [place * len(values) // count for place in range(count + 1)]
    means = [statistics.fmean(values[start:stop]) for start, stop in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return BARS[0] * count
    return "".join(BARS[min(len(BARS) - 1, int((mean - low) / (high - low) * len(BARS)))] for mean in means)


def span(curve: Curve) -> str:
    """First and last value, and between which two it was."""
    first, last, low, high = curve.values[0], curve.values[-1], min(curve.values), max(curve.values)
    return f"{first:.{DIGITS}g} -> {last:.{DIGITS}g}, between {low:.{DIGITS}g} and {high:.{DIGITS}g}"


def time_shares(records: Sequence[Mapping[str, object]]) -> str:
    """Median seconds of a step, and where they go; validation counts where it happened."""
    parts: dict[str, float] = {}
    for record in records:
        seconds = record.get("seconds")
        for name, value in msgspec.convert(seconds, dict[str, float]).items() if seconds is not None else ():
            parts[name] = parts.get(name, 0.0) + value
    whole = sum(parts.values())
    if not whole:
        return "-"
    shares = ", ".join(f"{name} {100 * value / whole:.1f} %" for name, value in parts.items())
    return f"{whole / len(records):.3g} s on average: {shares}"


def checkpoint_rows(folder: RunFolder, plan: RunPlan, *, contents: bool) -> list[list[str]]:
    """Every published checkpoint, newest first: why it is kept, its size, its age, whether it is what was written."""
    paths = published(folder.checkpoints)
    best = _best_step(folder)
    every = plan.config.checkpoint.every
    rows: list[list[str]] = []
    for path in paths:
        step = int(path.name.removeprefix("step-"))
        kinds = ["last"] if path == paths[0] else []
        kinds += ["best"] if step == best else []
        kinds += [f"every {every}"] if every and step % every == 0 else []
        rows.append([path.name, ", ".join(kinds) or "-", *_checkpoint(path, contents=contents)])
    return rows


def _checkpoint(path: Path, *, contents: bool) -> list[str]:
    files = [file for file in path.iterdir() if file.is_file()]
    size = gigabytes(sum(file.stat().st_size for file in files))
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%S")
    try:
        manifest = verify(path, contents=contents)
    except DamagedCheckpoint as fault:
        return [size, written, f"DAMAGED: {fault.problems[0].got}"]
    state = "whole, hashes checked" if contents else "whole, by sizes"
    return [size, written, f"{state}, {manifest.world_size} rank(s)"]


def _best_step(folder: RunFolder) -> int | None:
    for path in published(folder.checkpoints):
        try:
            return read_manifest(path).state.best.step
        except DamagedCheckpoint:
            continue
    return None


def config_rows(plans: Sequence[RunPlan]) -> list[list[str]]:
    """Everything that training depends on and that is not the same in all runs."""
    parts = [flat_identity(plan) for plan in plans]
    names = dict.fromkeys(name for part in parts for name in part)
    rows = [[name, *(_short(part.get(name)) for part in parts)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _short(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def figure_rows(folders: Sequence[RunFolder], records: Sequence[Sequence[Mapping[str, object]]]) -> list[list[str]]:
    """Figures of several runs: state, losses, speed, time, and the scores of the tuned models."""
    scores = [read_scores(folder, "tuned") for folder in folders]
    names = dict.fromkeys(name for score in scores if score is not None for name in score.metrics)
    rows = [
        ["state", *(state_of(folder, lines) for folder, lines in zip(folders, records, strict=True))],
        ["steps", *(str(lines[-1]["step"]) if lines else "-" for lines in records)],
        ["lowest validation loss", *(_lowest(lines, "val_loss") for lines in records)],
        ["last loss", *(_last(lines, "loss") for lines in records)],
        ["tokens per second", *(_median(lines, "tokens_per_second") for lines in records)],
        ["time of all stages", *(time_rows(folder)[-1][1] for folder in folders)],
        ["test rows", *("-" if score is None else str(score.rows) for score in scores)],
        ["test loss", *("-" if score is None or score.loss is None else f"{score.loss:.4f}" for score in scores)],
    ]
    for name in names:
        rows.append(
            [f"test {name}", *("-" if s is None else f"{s.metrics.get(name, float('nan')):.4f}" for s in scores)]
        )
    return rows


def _lowest(records: Sequence[Mapping[str, object]], name: str) -> str:
    curve = curve_of(records, name)
    return "-" if curve is None else f"{min(curve.values):.4f}"


def _last(records: Sequence[Mapping[str, object]], name: str) -> str:
    curve = curve_of(records, name)
    return "-" if curve is None else f"{curve.values[-1]:.4f}"


def _median(records: Sequence[Mapping[str, object]], name: str) -> str:
    curve = curve_of(records, name)
    return "-" if curve is None else f"{statistics.median(curve.values):,.0f}"
