"""Which figures a run reports, by name, and which of them a trial is judged by."""

import math

from trainer.config import Config
from trainer.drive.prepared import read_scores
from trainer.markers import read_marker
from trainer.paths import RunFolder
from trainer.records import curve_of, read_records
from trainer.rules.names import METRICS

VALIDATION = "val_"
TEST = "test_"


def reported_figures(config: Config, *, with_answers: bool | None = None) -> list[str]:
    """Names of the validation figures (``val_loss``) and of the final ones on the test split (``test_loss``).

    ``with_answers``: as if validation rows were answered and scored (``eval.generate_rows``).
    """
    data, task = config.data, config.task.name
    scores = [name for name in METRICS[task] if name != "loss"]
    scores += ["stopped"] if task != "text" else []
    answers = config.eval.generate_rows > 0 if with_answers is None else with_answers
    found: list[str] = []
    if data.kind != "files" or data.validation or data.validation_share > 0:
        found += [f"{VALIDATION}loss", *(f"{VALIDATION}{name}" for name in scores if answers)]
    if data.kind != "files" or data.test or data.test_share > 0:
        final = scores if task != "text" else ["perplexity"]
        found += [f"{TEST}loss", *(f"{TEST}{name}" for name in final)]
    return found


def validations(folder: RunFolder, metric: str) -> list[float]:
    """The figure at each validation so far, oldest first; none for a figure of the test split."""
    curve = curve_of(read_records(folder.metrics_jsonl), metric)
    return [] if curve is None or metric.startswith(TEST) else curve.values


def final_value(folder: RunFolder, metric: str) -> float | None:
    """The figure of the finished run: that of its best checkpoint; None where it was not reported or is no number."""
    if metric.startswith(TEST):
        scores = read_scores(folder, "tuned")
        if scores is None:
            return None
        name = metric.removeprefix(TEST)
        value = scores.loss if name == "loss" else scores.metrics.get(name)
    else:
        marker = read_marker(folder, "train")
        value = None if marker is None else marker.summary.get(f"best_{metric.removeprefix(VALIDATION)}")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
