"""How the figures of an evaluation are written in a card, and what the Hub calls them."""

import math

from trainer.metric_names import LOWER_IS_BETTER as LOWER_IS_BETTER
from trainer.metric_names import MAIN as MAIN
from trainer.metric_names import METRICS as METRICS
from trainer.metric_names import SHARES as SHARES
from trainer.samples import EvaluationRecord

HUB_METRIC = {
    "exact_match": "exact_match",
    "accuracy": "accuracy",
    "macro_f1": "f1",
    "token_f1": "f1",
    "rouge1": "rouge",
    "rouge2": "rouge",
    "rougeL": "rouge",
    "perplexity": "perplexity",
}


def main_metric(evaluation: EvaluationRecord | None) -> str | None:
    """The figure that sums up ``evaluation``, if it was measured."""
    return None if evaluation is None else next((name for name in MAIN if name in evaluation.metrics), None)


def is_better(name: str, after: float, before: float) -> bool:
    """Whether ``after`` improves on ``before``."""
    return after < before if name in LOWER_IS_BETTER else after > before


def figure(name: str, evaluation: EvaluationRecord) -> str:
    """A metric with its standard error where that is known: sqrt(p (1 - p) / n).

    At 0 and 1 that formula gives 0, which would claim a certainty that n rows do not give: none is shown.
    """
    value = evaluation.metrics.get(name)
    if value is None:
        return "not measured"
    if name not in SHARES or not 0.0 < value < 1.0:
        return number(value)
    return f"{value:.3f} ± {math.sqrt(value * (1 - value) / evaluation.rows):.3f}"


def number(value: float | None) -> str:
    """Three decimals, or that it was not measured."""
    return "not measured" if value is None else f"{value:.3f}"
