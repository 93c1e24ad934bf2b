"""What is known to be weak about a model, derived from the figures of its run: no sentence without a reason in them."""

from trainer.export.comparison import rounding_price
from trainer.export.figures import LOWER_IS_BETTER, METRICS, is_better, main_metric
from trainer.export.lineage import Lineage
from trainer.export.markdown import escape
from trainer.samples import EvaluationRecord

TUNED = "tuned"
SMALL_SLICE = 10
"""Rows below which the figures of a slice say too little to be named."""


def limitations(lineage: Lineage) -> list[str]:
    """What is known to be weak, out of the figures of this run."""
    train, tuned = lineage.data.splits["train"], lineage.evaluations.get(TUNED)
    found = [
        f"It learnt from {train.rows:,} rows of the sources below. Other kinds of texts and other languages were not "
        "measured, and the knowledge and biases of the base model remain.",
        f"The longest training document has {train.longest:,} tokens; longer prompts were not measured.",
        f"One run with seed {lineage.config.run.seed}: another seed gives other figures.",
    ]
    if tuned is not None:
        found += weaknesses(lineage, tuned)
    for one in lineage.verification:
        if one.rounding is not None and one.rounding.is_large:
            found.append(
                f"`{one.name}/` is not quite the model that was evaluated: {rounding_price(one.rounding)}. An adapter "
                "beside it is."
            )
    if lineage.config.task.name == "classification":
        found.append("It answers with one of its labels also where none fits.")
    if lineage.data.truncated:
        found.append(f"{lineage.data.truncated:,} over-long documents were cut before training.")
    if lineage.config.data.kind == "legal":
        found.append(
            "The texts are clauses of English software licences, and the reference answers come from headings and "
            "annotations that may be wrong. Nothing it says is legal advice."
        )
    if lineage.base.name == "builtin:tiny":
        found.append("The base has random weights and knows nothing: this run only shows that every stage works.")
    return found


def weaknesses(lineage: Lineage, tuned: EvaluationRecord) -> list[str]:
    """What the test says against it."""
    found: list[str] = []
    name, before = main_metric(tuned), lineage.evaluations.get("zero_shot")
    if name and before and name in before.metrics and not is_better(name, tuned.metrics[name], before.metrics[name]):
        found.append(f"It is not better than the base model at {METRICS[name]} on the test rows.")
    if tuned.metrics.get("valid_labels", 1.0) < 1.0:
        share = 1.0 - tuned.metrics["valid_labels"]
        found.append(f"{share:.1%} of its answers on the test rows are none of the labels.")
    if tuned.metrics.get("stopped", 1.0) < 1.0:
        share = 1.0 - tuned.metrics["stopped"]
        found.append(f"{share:.1%} of its answers did not stop by themselves within the allowed length.")
    worst = worst_slice(tuned, name) if name else None
    if name and worst:
        column, value, rows, score = worst
        found.append(f"Weakest slice: {escape(column)} = {escape(value)}, {METRICS[name]} {score:.3f} on {rows} rows.")
    return found


def worst_slice(evaluation: EvaluationRecord, name: str) -> tuple[str, str, int, float] | None:
    """Column, value, rows and figure of the slice that scores lowest, among those that are large enough."""
    candidates = [
        (figures[name], column, value, int(figures["rows"]))
        for column, values in evaluation.by_slice.items()
        for value, figures in values.items()
        if len(values) > 1 and figures["rows"] >= SMALL_SLICE and name in figures
    ]
    if not candidates:
        return None
    score, column, value, rows = max(candidates) if name in LOWER_IS_BETTER else min(candidates)
    return column, value, rows, score
