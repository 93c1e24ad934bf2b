"""The figures of an evaluation with how sure they are, and two evaluations held against each other row by row.

An interval stands only where the rows on disk give the recorded figure: a share of yes-or-no follows from its rows
alone, the mean of token F1 is added up again; macro-F1, ROUGE and losses have none, as their rows are not kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose

import msgspec

from trainer.drive.prepared import ScoresView, read_scores
from trainer.errors import RunError
from trainer.evaluate.texts import token_f1
from trainer.intervals import Interval, Paired, compare, of_mean, of_share
from trainer.metric_names import METRICS, SHARES
from trainer.paths import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One test row and what was answered; ``f1``: words that answer and reference share."""

    id: str
    text: str
    answer: str
    label: str = ""
    correct: bool
    stopped: bool
    token_ids: list[int] = field(default_factory=list[int])

    @property
    def f1(self) -> float:
        """Token F1, 0 to 1."""
        return token_f1(self.text, self.answer)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a test, and between what it lies (None: not known)."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A model on the test rows. ``figures``: metric -> figure, and ``loss`` last where it was measured.

    ``answers``: of every row, in their order (none for plain text); ``scores``: the file, with figures by slice.
    """

    figures: dict[str, Figure]
    answers: list[Answer]
    scores: ScoresView

    @property
    def generated(self) -> int:
        """Tokens of all answers."""
        return sum(len(answer.token_ids) for answer in self.answers)


def read_evaluated(folder: RunFolder, who: str) -> Evaluated | None:
    """The evaluation of ``who``; None where there is none.

    Raises:
        RunError: its files are not what the evaluation writes.
    """
    scores = read_scores(folder, who)
    if scores is None:
        return None
    answers = _read_answers(folder, who)
    known = [*(name for name in METRICS if name in scores.metrics), *(n for n in scores.metrics if n not in METRICS)]
    figures = {
        name: Figure(scores.metrics[name], interval_of(name, scores.metrics[name], scores.rows, answers))
        for name in known
    }
    if scores.loss is not None:
        figures["loss"] = Figure(scores.loss)
    return Evaluated(figures=figures, answers=answers, scores=scores)


def interval_of(name: str, value: float, rows: int, answers: Sequence[Answer]) -> Interval | None:
    """Between what a figure of ``rows`` rows lies; None where the files do not say."""
    if name in SHARES and rows and 0.0 <= value <= 1.0:
        return of_share(value, rows)
    if name == "token_f1":
        each = [answer.f1 for answer in answers if answer.answer]
        if each and isclose(sum(each) / len(each), value, abs_tol=1e-9):
            return of_mean(each)
    return None


def hold_against(before: Sequence[Answer], after: Sequence[Answer]) -> Paired | None:
    """Compare exact matches row by row; None where these are not the same rows with the same references."""
    if not before or [(row.id, row.answer) for row in before] != [(row.id, row.answer) for row in after]:
        return None
    return compare([row.correct for row in before], [row.correct for row in after])


def worst_answers(answers: Sequence[Answer], count: int) -> list[Answer]:
    """Wrong answers, the furthest from their reference first."""
    wrong = [answer for answer in answers if not answer.correct]
    return sorted(wrong, key=lambda answer: (answer.f1, answer.stopped))[:count]


def slices_of(scores: ScoresView, name: str) -> dict[str, dict[str, Mapping[str, float]]]:
    """Column -> value -> figures, for columns with several values, the values that score lowest at ``name`` first."""
    return {
        column: dict(sorted(values.items(), key=lambda item: item[1].get(name, 0.0)))
        for column, values in scores.by_slice.items()
        if len(values) > 1
    }


def test_digest(folder: RunFolder) -> str:
    """Hash of the frozen test rows; "" where there is none."""
    try:
        return msgspec.json.decode((folder.root / "splits.json").read_bytes(), type=_Frozen).test.sha256
    except (OSError, msgspec.DecodeError):
        return ""


def _read_answers(folder: RunFolder, who: str) -> list[Answer]:
    path = folder.evaluation / f"{who}.predictions.jsonl"
    try:
        return msgspec.json.Decoder(Answer).decode_lines(path.read_bytes())
    except FileNotFoundError:
        return []
    except msgspec.DecodeError as fault:
        raise RunError(
            "the answers of this run cannot be read",
            where=str(path),
            got=str(fault),
            allowed="the file as the evaluation wrote it",
            do=f"python -m trainer evaluate {folder.root}, after {folder.stages / 'evaluate.json'} is removed",
        ) from fault


class _Split(msgspec.Struct):
    sha256: str = ""


class _Frozen(msgspec.Struct):
    test: _Split
