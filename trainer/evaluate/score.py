"""Was the answer right? One scorer per task, from generated text alone.

Nothing here needs a model or logits: predictions come from ``evaluate.generate`` (or any file of them) and are compared
with the reference text. All numbers are shares in [0, 1] unless said otherwise, and they are deterministic.

How texts are compared, and what a word is: ``texts.py``.

    task             metrics
    classification   exact_match, accuracy, macro_f1, valid_labels
    extraction       exact_match, token_f1
    summary          rouge1, rouge2, rougeL (F-measures), exact_match
    chat             exact_match, token_f1 (over the rows that have a reference answer)
    every task       stopped: answers that ended with a stop token and were not cut off
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from rouge_score import rouge_scorer, tokenizers
from sklearn.metrics import f1_score

from trainer.config import TaskName
from trainer.errors import DataError, TrimtabError
from trainer.evaluate.texts import exact_match as exact_match
from trainer.evaluate.texts import normalise as normalise
from trainer.evaluate.texts import token_f1 as token_f1
from trainer.evaluate.texts import words as words
from trainer.paths import write_atomic
from trainer.samples import EvaluationExample, EvaluationRecord, Prediction

NO_LABEL = ""
"""What stands for an answer that is none of the labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """``metrics`` of all rows; ``by_slice``: column -> value -> the same metrics (and ``rows``) of those rows alone."""

    metrics: dict[str, float]
    by_slice: dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(EvaluationRecord):
    """``evaluation/<who>.json``: the record, and whose it is ("zero_shot", "tuned")."""

    who: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredRow:
    """One line of ``evaluation/<who>.predictions.jsonl``: a prediction beside what it is compared with."""

    id: str
    text: str
    answer: str
    label: str
    correct: bool
    stopped: bool
    token_ids: list[int]


def score(
    task: TaskName,
    examples: Sequence[EvaluationExample],
    predictions: Sequence[Prediction],
    labels: Sequence[str] = (),
) -> Scores:
    """Compare ``predictions`` with ``examples``, row by row.

    Args:
        task: which scorer; ``text`` has none.
        examples: the held-out rows.
        predictions: one per example, in the same order.
        labels: classification: the allowed answers.

    Raises:
        TrimtabError: the predictions are not those of the examples, or the task is scored by loss alone.
        DataError: no rows; classification: no labels, two labels that compare equal, a row whose label is not allowed.
    """
    _check_alignment(examples, predictions)
    scorer = _scorer(task, examples, labels)
    everything = range(len(examples))
    by_slice: dict[str, dict[str, dict[str, float]]] = {}
    for column in sorted({column for example in examples for column in example.slices}):
        rows_of: dict[str, list[int]] = {}
        for row in everything:
            if column in examples[row].slices:
                rows_of.setdefault(examples[row].slices[column], []).append(row)
        by_slice[column] = {
            value: {"rows": float(len(rows)), **_measure(scorer, predictions, rows)}
            for value, rows in sorted(rows_of.items())
        }
    return Scores(metrics=_measure(scorer, predictions, everything), by_slice=by_slice)


def save_evaluation(
    folder: Path,
    evaluation: Evaluation,
    examples: Sequence[EvaluationExample],
    predictions: Sequence[Prediction],
) -> None:
    """Write ``<who>.predictions.jsonl``, then ``<who>.json`` (so the figures never stand without their rows).

    Raises:
        TrimtabError: a figure that is not finite (JSON has no word for it), or predictions of other examples.
    """
    if examples:
        _check_alignment(examples, predictions)
    bad = {name: value for name, value in evaluation.metrics.items() if not math.isfinite(value)}
    if evaluation.loss is not None and not math.isfinite(evaluation.loss):
        bad["loss"] = evaluation.loss
    if bad:
        raise TrimtabError(
            "an evaluation has figures that are not finite numbers",
            where=evaluation.who,
            got=str(bad),
            allowed="numbers",
        )
    lines = [msgspec.json.encode(_answered(*pair)) + b"\n" for pair in zip(examples, predictions, strict=True)]
    write_atomic(folder / f"{evaluation.who}.predictions.jsonl", b"".join(lines))
    write_atomic(folder / f"{evaluation.who}.json", msgspec.json.format(msgspec.json.encode(evaluation)) + b"\n")


def load_evaluation(folder: Path, who: str) -> Evaluation:
    """Read ``<who>.json``.

    Raises:
        DataError: missing, or not an evaluation.
    """
    path = folder / f"{who}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Evaluation)
    except (OSError, msgspec.DecodeError) as error:
        raise _unreadable(path, error) from error


def load_answers(folder: Path, who: str) -> list[AnsweredRow]:
    """Read ``<who>.predictions.jsonl``.

    Raises:
        DataError: missing, or a line that is not an answered row.
    """
    path = folder / f"{who}.predictions.jsonl"
    try:
        return [msgspec.json.decode(line, type=AnsweredRow) for line in path.read_bytes().splitlines()]
    except (OSError, msgspec.DecodeError) as error:
        raise _unreadable(path, error) from error


_Rows = Sequence[int]
_Scorer = Callable[[Sequence[str], _Rows], Mapping[str, float]]


def _measure(scorer: _Scorer, predictions: Sequence[Prediction], rows: _Rows) -> dict[str, float]:
    """Metrics of ``rows``: those of the task and the share that stopped."""
    texts = [prediction.text for prediction in predictions]
    stopped = sum(predictions[row].stopped for row in rows) / len(rows)
    return {**scorer(texts, rows), "stopped": stopped}


def _scorer(task: TaskName, examples: Sequence[EvaluationExample], labels: Sequence[str]) -> _Scorer:
    """The function that measures some rows of ``examples`` for ``task``."""
    answers = [example.answer for example in examples]
    if task == "classification":
        return _classification(examples, labels)
    if task == "extraction":
        return lambda texts, rows: _text_match(texts, answers, rows)
    if task == "summary":
        return lambda texts, rows: {**_rouge(texts, answers, rows), "exact_match": _exact_share(texts, answers, rows)}
    if task == "chat":
        return lambda texts, rows: _text_match(texts, answers, [row for row in rows if answers[row].strip()])
    raise TrimtabError(
        "this task has no scorer",
        where="task.name",
        got=task,
        allowed="classification, extraction, summary, chat",
        do="measure task=text by its loss",
    )


def _classification(examples: Sequence[EvaluationExample], labels: Sequence[str]) -> _Scorer:
    """Accuracy and macro-F1 over labels; an answer that is no label is wrong and counts for no class.

    Macro-F1 averages over the classes that occur among the true labels of the rows, so that two models on the same
    rows are averaged over the same classes.
    """
    known = _known_labels(labels)
    truth = [_true_label(example, known) for example in examples]
    answers = [example.answer for example in examples]

    def measure(texts: Sequence[str], rows: _Rows) -> dict[str, float]:
        expected = [truth[row] for row in rows]
        predicted = [known.get(normalise(texts[row]), NO_LABEL) for row in rows]
        classes = sorted(set(expected))
        macro = f1_score(expected, predicted, labels=classes, average="macro", zero_division=0)  # type: ignore[arg-type]
        return {
            "exact_match": _exact_share(texts, answers, rows),
            "accuracy": float(np.mean([left == right for left, right in zip(expected, predicted, strict=True)])),
            "macro_f1": float(macro),
            "valid_labels": float(np.mean([label != NO_LABEL for label in predicted])),
        }

    return measure


def _known_labels(labels: Sequence[str]) -> dict[str, str]:
    """Normalised form -> label."""
    known: dict[str, str] = {}
    for label in labels:
        form = normalise(label)
        if not form or known.get(form, label) != label:
            raise DataError(
                "a label cannot be told from another",
                where="task.labels",
                got=f"{label!r} and {known.get(form, '')!r}",
                allowed="labels that differ in more than case, spaces and a final full stop",
                do="rename one of them in the data and in task.labels",
            )
        known[form] = label
    if not known:
        raise DataError(
            "classification needs labels",
            where="task.labels",
            got="none",
            allowed="at least one",
            do="give task.labels, or data.label_column so that they are read from the training rows",
        )
    return known


def _true_label(example: EvaluationExample, known: Mapping[str, str]) -> str:
    """The label of a row: its label column, or else its answer."""
    for text in (example.label, example.answer):
        if normalise(text) in known:
            return known[normalise(text)]
    raise DataError(
        "a held-out row has a label that is not allowed",
        where=example.id,
        got=repr(example.label or example.answer),
        allowed=", ".join(sorted(known.values())),
        do="add it to task.labels, or correct the row",
    )


def _text_match(texts: Sequence[str], answers: Sequence[str], rows: _Rows) -> dict[str, float]:
    """Exact match and token F1; nothing when no row has a reference."""
    if not rows:
        return {}
    f1 = float(np.mean([token_f1(texts[row], answers[row]) for row in rows]))
    return {"exact_match": _exact_share(texts, answers, rows), "token_f1": f1}


def _exact_share(texts: Sequence[str], answers: Sequence[str], rows: _Rows) -> float:
    return float(np.mean([exact_match(texts[row], answers[row]) for row in rows]))


class _Words(tokenizers.Tokenizer):
    """Our words for rouge-score: its own tokenizer drops everything that is not a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _rouge(texts: Sequence[str], answers: Sequence[str], rows: _Rows) -> dict[str, float]:
    """Mean F-measure of ROUGE-1, -2 and -L (Lin 2004), not stemmed."""
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds, tokenizer=_Words())
    found = [scorer.score(answers[row], texts[row]) for row in rows]
    return {kind: float(np.mean([one[kind].fmeasure for one in found])) for kind in kinds}


def _answered(example: EvaluationExample, prediction: Prediction) -> AnsweredRow:
    return AnsweredRow(
        id=example.id,
        text=prediction.text,
        answer=example.answer,
        label=example.label,
        correct=exact_match(prediction.text, example.answer),
        stopped=prediction.stopped,
        token_ids=prediction.token_ids,
    )


def _check_alignment(examples: Sequence[EvaluationExample], predictions: Sequence[Prediction]) -> None:
    """Refuse to compare row i with the answer to another row."""
    if not examples:
        raise DataError(
            "there are no rows to score",
            got="0 held-out examples",
            allowed="at least one",
            do="give data.test, or raise data.test_share",
        )
    expected = [example.id for example in examples]
    got = [prediction.id for prediction in predictions]
    if expected != got:
        differs = next((row for row, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1]), None)
        raise TrimtabError(
            "the predictions are not those of the examples",
            got=f"{len(got)} predictions for {len(expected)} examples; first difference at row {differs}",
            allowed="one prediction per example, in the same order",
        )


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        "cannot read an evaluation",
        where=str(path),
        got=str(error),
        allowed="a file that `python -m trainer evaluate` wrote",
        do="run `python -m trainer evaluate` on this run again",
    )
