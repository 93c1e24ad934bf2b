"""Scores against hand-counted cases, peers where there are any, and every refusal."""

import math
from pathlib import Path

import pytest
from rouge_score import rouge_scorer
from sklearn.metrics import accuracy_score, f1_score

from trainer.errors import DataError, TrimtabError
from trainer.evaluate.score import (
    Evaluation,
    exact_match,
    load_answers,
    load_evaluation,
    normalise,
    save_evaluation,
    score,
    token_f1,
    words,
)
from trainer.samples import EvaluationExample, Prediction


def rows(
    *answers: str, labels: tuple[str, ...] = (), slices: tuple[dict[str, str], ...] = ()
) -> list[EvaluationExample]:
    return [
        EvaluationExample(
            id=f"r{row}",
            prompt_ids=[1],
            answer=answer,
            label=labels[row] if labels else "",
            slices=slices[row] if slices else {},
        )
        for row, answer in enumerate(answers)
    ]


def said(*texts: str, stopped: bool = True) -> list[Prediction]:
    return [Prediction(id=f"r{row}", text=text, token_ids=[5], stopped=stopped) for row, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("  Governing\n\tLaw. ", "governing law"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("\ufb01le", "file"),  # a ligature
        ("Acme Inc.", "acme inc"),
        ("wait...", "wait.."),
        (".", ""),
        ("3.5", "3.5"),
    ],
)
def test_normalise(text, form):
    assert normalise(text) == form


def test_words_of_scripts_with_and_without_spaces():
    assert words("The Licensor's (2) rights, naïve_x") == ["the", "licensor", "s", "2", "rights", "naïve", "x"]
    assert words("合同法 2024") == ["合", "同", "法", "2024"]
    assert words(" ... ") == []


def test_exact_match():
    assert exact_match("Termination.", "termination")
    assert not exact_match("Termination clause", "termination")


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("a b c", "b c d", 2 / 3),
        ("a a b", "a b b", 2 / 3),
        ("x", "y", 0.0),
        ("", "", 1.0),
        ("", "x", 0.0),
        ("New York", "state of new york.", 2 * 2 / (2 + 4)),
    ],
)
def test_token_f1(prediction, answer, expected):
    assert token_f1(prediction, answer) == pytest.approx(expected)


def test_classification_counted_by_hand():
    examples = rows("tax", "tax", "law", "fee", labels=("tax", "tax", "law", "fee"))
    scores = score("classification", examples, said("Tax.", "law", "LAW", "no idea"), ["tax", "law", "fee", "other"])
    # tax: P 1, R 1/2 -> 2/3; law: P 1/2, R 1 -> 2/3; fee: 0. "other" never occurs and does not count.
    assert scores.metrics == pytest.approx(
        {"exact_match": 0.5, "accuracy": 0.5, "macro_f1": (2 / 3 + 2 / 3 + 0) / 3, "valid_labels": 0.75, "stopped": 1.0}
    )


def test_classification_agrees_with_scikit_learn_where_every_answer_is_a_label():
    truth = ["a", "b", "c", "a", "b", "a"]
    guesses = ["a", "c", "c", "b", "b", "a"]
    scores = score("classification", rows(*truth), said(*guesses), ["a", "b", "c"])
    assert scores.metrics["accuracy"] == accuracy_score(truth, guesses)
    assert scores.metrics["macro_f1"] == pytest.approx(f1_score(truth, guesses, average="macro"))


def test_the_answer_is_the_label_where_the_label_column_is_a_code():
    scores = score("classification", rows("tax", "law", labels=("0", "1")), said("tax", "tax"), ["tax", "law"])
    assert scores.metrics["accuracy"] == 0.5


def test_extraction():
    scores = score("extraction", rows("State of Ohio", "Acme"), said("ohio", "ACME"))
    assert scores.metrics == pytest.approx({"exact_match": 0.5, "token_f1": (0.5 + 1) / 2, "stopped": 1.0})


def test_summary_is_rouge_and_agrees_with_the_library_on_plain_english():
    reference, guess = "the license may be ended by notice", "license ended by written notice"
    scores = score("summary", rows(reference), said(guess))
    peer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, guess)
    for kind, value in peer.items():
        assert scores.metrics[kind] == pytest.approx(value.fmeasure)
    assert 0 < scores.metrics["rouge2"] < scores.metrics["rouge1"]
    assert scores.metrics["exact_match"] == 0.0


def test_rouge_sees_other_scripts():
    assert score("summary", rows("договор расторгнут"), said("договор расторгнут")).metrics["rouge1"] == 1.0
    assert score("summary", rows("合同终止"), said("合同有效")).metrics["rouge1"] == pytest.approx(0.5)


def test_chat_scores_the_rows_that_have_an_answer():
    scores = score("chat", rows("yes", " "), said("yes", "anything"))
    assert scores.metrics == {"exact_match": 1.0, "token_f1": 1.0, "stopped": 1.0}
    assert score("chat", rows("", ""), said("a", "b")).metrics == {"stopped": 1.0}


def test_the_share_that_stopped():
    predictions = [*said("a"), Prediction(id="r1", text="b", token_ids=[1], stopped=False)]
    assert score("extraction", rows("a", "b"), predictions).metrics["stopped"] == 0.5


def test_slices():
    slices = ({"court": "A", "year": "1"}, {"court": "B"}, {"court": "A"})
    scores = score("extraction", rows("x", "y", "z", slices=slices), said("x", "y", "no"))
    assert scores.by_slice["court"]["A"] == {"rows": 2.0, "exact_match": 0.5, "token_f1": 0.5, "stopped": 1.0}
    assert scores.by_slice["court"]["B"]["exact_match"] == 1.0
    assert list(scores.by_slice) == ["court", "year"]
    assert scores.by_slice["year"] == {"1": {"rows": 1.0, "exact_match": 1.0, "token_f1": 1.0, "stopped": 1.0}}


def test_predictions_of_other_rows_are_refused():
    with pytest.raises(TrimtabError, match="2 predictions for 2 examples; first difference at row 0"):
        score("extraction", rows("a", "b"), list(reversed(said("a", "b"))))
    with pytest.raises(TrimtabError, match="1 predictions for 2 examples; first difference at row None"):
        score("extraction", rows("a", "b"), said("a"))


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="there are no rows to score"):
        score("extraction", [], [])


def test_text_has_no_scorer():
    with pytest.raises(TrimtabError, match=r"task\.name: this task has no scorer\n  got: text"):
        score("text", rows("a"), said("a"))


def test_classification_without_labels_is_refused():
    with pytest.raises(DataError, match="classification needs labels"):
        score("classification", rows("a"), said("a"))


def test_labels_that_compare_equal_are_refused():
    with pytest.raises(DataError, match=r"got: 'Tax\.' and 'tax'"):
        score("classification", rows("tax"), said("a"), ["tax", "Tax."])
    with pytest.raises(DataError, match="a label cannot be told from another"):
        score("classification", rows("tax"), said("a"), ["tax", " "])


def test_a_row_with_another_label_is_refused():
    with pytest.raises(DataError, match="r0: a held-out row has a label that is not allowed\n  got: 'fee'"):
        score("classification", rows("fee"), said("a"), ["tax", "law"])


def evaluation(**changes: object) -> Evaluation:
    parts: dict[str, object] = {
        "who": "tuned",
        "task": "extraction",
        "rows": 2,
        "metrics": {"exact_match": 0.5},
        "by_slice": {"court": {"A": {"rows": 2.0}}},
        "loss": 0.25,
        "targets": 9,
        "seconds": 1.5,
    }
    return Evaluation(**(parts | changes))  # type: ignore[arg-type]


def test_save_and_load(tmp_path: Path):
    examples, predictions = rows("Ohio", "x"), said("ohio", "y", stopped=False)
    save_evaluation(tmp_path, evaluation(), examples, predictions)
    assert load_evaluation(tmp_path, "tuned") == evaluation()
    answers = load_answers(tmp_path, "tuned")
    assert [(one.text, one.answer, one.correct, one.stopped) for one in answers] == [
        ("ohio", "Ohio", True, False),
        ("y", "x", False, False),
    ]


def test_an_evaluation_of_loss_alone(tmp_path: Path):
    save_evaluation(tmp_path, evaluation(metrics={}, by_slice={}), [], [])
    assert load_evaluation(tmp_path, "tuned").metrics == {}
    assert load_answers(tmp_path, "tuned") == []


def test_figures_that_are_no_numbers_are_refused(tmp_path: Path):
    with pytest.raises(TrimtabError, match=r"tuned: an evaluation has figures .*\n  got: \{'loss': nan\}"):
        save_evaluation(tmp_path, evaluation(loss=math.nan), [], [])
    assert list(tmp_path.iterdir()) == []


def test_unreadable_evaluations_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"zero_shot\.json: cannot read an evaluation"):
        load_evaluation(tmp_path, "zero_shot")
    (tmp_path / "tuned.json").write_text("{}")
    with pytest.raises(DataError, match="missing required field `task`"):
        load_evaluation(tmp_path, "tuned")
    (tmp_path / "tuned.predictions.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"tuned\.predictions\.jsonl: cannot read an evaluation"):
        load_answers(tmp_path, "tuned")
