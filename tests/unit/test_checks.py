"""Each gate stops or counts what it should, and names the rows."""

from dataclasses import replace

import pytest
from data_fixtures import row, rows

from trainer.data.checks import Finding, check_rows, describe, dropped_rows, refuse_if_too_many
from trainer.data.splits import Splits
from trainer.errors import DataError
from trainer.samples import Conversation, Dropped, Message, Origin


def splits(
    train: list[Conversation], validation: list[Conversation] | None = None, test: list[Conversation] | None = None
) -> Splits:
    return Splits(train=train, validation=validation or [], test=test or [])


def text_row(text: str, line: int) -> Conversation:
    return Conversation(id=str(line), origin=Origin("t.jsonl", line), text=text)


def test_good_rows_pass_unchanged() -> None:
    given = splits(rows(40, labels=2), rows(10, labels=2, file="v.jsonl"), rows(10, labels=2, file="t.jsonl"))
    checked = check_rows(given, task_name="classification", labels=[], max_dropped_share=0.0)
    assert checked.splits == given
    assert checked.labels == ["label0", "label1"]
    assert (checked.dropped, checked.findings) == ([], [])
    assert checked.balance == {
        "train": {"label0": 20, "label1": 20},
        "validation": {"label0": 5, "label1": 5},
        "test": {"label0": 5, "label1": 5},
    }


def test_rows_without_an_answer_are_left_out_and_counted() -> None:
    unanswered = [row(f"q{n}", " \n", file="bad.jsonl", line=n) for n in range(1, 8)]
    question = replace(row("q", "x", file="bad.jsonl", line=8), messages=(Message(role="user", content="q"),))
    good = rows(100)
    checked = check_rows(splits([*good, *unanswered, question]), task_name="chat", labels=[], max_dropped_share=0.1)
    first = [f"bad.jsonl:{n}" for n in range(1, 6)]
    assert checked.splits.train == good
    assert checked.dropped == [Dropped(reason="no answer", count=8, first=first)]


def test_a_turn_that_only_calls_a_tool_is_an_answer() -> None:
    call = Message(role="assistant", content="", tool_calls=({"name": "search"},))
    with_call = replace(row("q", ""), messages=(Message(role="user", content="q"), call))
    assert check_rows(splits([with_call]), task_name="chat", labels=[], max_dropped_share=0.0).splits.train == [
        with_call
    ]


def test_empty_texts_are_left_out_and_counted() -> None:
    given = splits([text_row("words", 1), text_row("  ", 2), text_row("more", 3)])
    checked = check_rows(given, task_name="text", labels=[], max_dropped_share=0.5)
    assert checked.dropped == [Dropped(reason="no text", count=1, first=["t.jsonl:2"])]
    assert [r.text for r in checked.splits.train] == ["words", "more"]


def test_training_rows_that_are_tested_are_left_out_of_training() -> None:
    train, validation, test = rows(96), rows(5, file="v.jsonl"), rows(5, file="t.jsonl")
    leaked = [
        replace(validation[0], origin=Origin("a.jsonl", 201)),
        replace(test[0], origin=Origin("a.jsonl", 202)),
        replace(test[1], origin=Origin("v.jsonl", 203)),
    ]
    given = splits([*train, *leaked[:2]], [*validation, leaked[2]], test)
    checked = check_rows(given, task_name="chat", labels=[], max_dropped_share=0.1)
    assert checked.splits == splits(train, validation, test)
    assert checked.dropped == [
        Dropped(reason="also in the test rows", count=2, first=["a.jsonl:202", "v.jsonl:203"]),
        Dropped(reason="also in the validation rows", count=1, first=["a.jsonl:201"]),
    ]


def test_the_same_input_is_a_leak_only_where_one_answer_is_right() -> None:
    given = splits([*rows(50, labels=2), row("q", "label0", line=51)], [], [row("q", "label1", file="t.jsonl")])
    as_class = check_rows(given, task_name="classification", labels=[], max_dropped_share=0.1)
    assert [dropped.reason for dropped in as_class.dropped] == ["also in the test rows"]
    assert check_rows(given, task_name="chat", labels=[], max_dropped_share=0.1).dropped == []


def test_repeats_within_a_split_are_reported_and_kept() -> None:
    train = [*rows(10), replace(rows(1)[0], origin=Origin("a.jsonl", 99))]
    checked = check_rows(splits(train), task_name="chat", labels=[], max_dropped_share=0.0)
    assert len(checked.splits.train) == 11
    assert checked.findings == [Finding(what="train rows that repeat an earlier one", count=1, first=["a.jsonl:99"])]


def test_rows_that_a_mixture_repeats_are_no_repeats() -> None:
    seen_again = [replace(r) for r in rows(10)]
    assert check_rows(splits(rows(10) + seen_again), task_name="chat", labels=[], max_dropped_share=0.0).findings == []


def test_one_input_with_two_answers_is_reported() -> None:
    conflict = [row("q", "label0", line=91), row("q ", "label1", line=92), row("q", "label0", line=93)]
    given = splits([*rows(20, labels=2), *conflict])
    checked = check_rows(given, task_name="classification", labels=[], max_dropped_share=0.0)
    assert checked.findings[-1] == Finding(
        what="rows with the same input and different answers",
        count=3,
        first=["a.jsonl:91 'label0' / a.jsonl:92 'label1'"],
    )
    assert len(checked.splits.train) == 23


def test_an_answer_outside_the_labels() -> None:
    given = splits([*rows(10, labels=2), row("q", "lable0", label="lable0", line=11)])
    with pytest.raises(DataError) as caught:
        check_rows(given, task_name="classification", labels=["label1", "label0"], max_dropped_share=1.0)
    assert str(caught.value) == (
        "a.jsonl:11: 1 rows have an answer that is not in task.labels\n"
        "  got: 'lable0' (1 rows)\n"
        "  allowed: label0, label1\n"
        "  do this: did you mean 'label0'?"
    )
    far = splits([*rows(10, labels=2), row("q", "zzz", line=11)])
    with pytest.raises(DataError, match=r"do this: add the label to task\.labels, or mend the rows"):
        check_rows(far, task_name="classification", labels=["label1", "label0"], max_dropped_share=1.0)


def test_a_class_that_nobody_has_is_allowed() -> None:
    labels = ["label0", "label1", "label2"]
    assert (
        check_rows(splits(rows(9, labels=2)), task_name="classification", labels=labels, max_dropped_share=0).labels
        == labels
    )


def test_labels_that_training_never_shows_are_reported() -> None:
    test = [row("q", "new", label="new", file="t.jsonl", line=4)]
    checked = check_rows(
        splits(rows(10, labels=2), [], test), task_name="classification", labels=[], max_dropped_share=0.0
    )
    what = "test rows with a label that no training row has (new)"
    assert checked.findings == [Finding(what=what, count=1, first=["t.jsonl:4"])]


def test_one_label_is_no_classification() -> None:
    with pytest.raises(DataError, match=r"task\.labels: a classification needs at least two labels\n  got: label0"):
        check_rows(splits(rows(10)), task_name="classification", labels=[], max_dropped_share=0.0)


def test_too_many_rows_left_out() -> None:
    given = splits([*rows(8), row("q", "", file="bad.jsonl", line=3), row("r", "", file="bad.jsonl", line=4)])
    with pytest.raises(DataError) as caught:
        check_rows(given, task_name="chat", labels=[], max_dropped_share=0.1)
    assert str(caught.value) == (
        "data: 2 of 10 rows would have to be left out\n"
        "  got: 2 no answer (bad.jsonl:3, bad.jsonl:4)\n"
        "  allowed: a share of 0.1 (data.max_dropped_share), here it is 0.2\n"
        "  do this: mend the rows named here, or raise data.max_dropped_share"
    )
    assert check_rows(given, task_name="chat", labels=[], max_dropped_share=0.2).dropped[0].count == 2


def test_a_split_of_which_nothing_is_left() -> None:
    given = splits(rows(99), [], [row("q", "", file="t.jsonl")])
    with pytest.raises(DataError, match=r"data\.test: no test rows are left\n  got: 1 no answer \(t\.jsonl:1\)"):
        check_rows(given, task_name="chat", labels=[], max_dropped_share=0.5)


def test_a_group_in_two_splits_is_refused() -> None:
    given = splits([row("a", "x", group="g")], [], [row("b", "x", group="g")])
    with pytest.raises(DataError, match="1 groups are in train and in test"):
        check_rows(given, task_name="chat", labels=[], max_dropped_share=0.5)


def test_reasons_in_one_line() -> None:
    many = dropped_rows("no answer", rows(7))
    assert describe([*many, *dropped_rows("no text", [])]) == (
        "7 no answer (a.jsonl:1, a.jsonl:2, a.jsonl:3, a.jsonl:4, a.jsonl:5, ...)"
    )
    refuse_if_too_many(many, total=70, max_dropped_share=0.1)
    with pytest.raises(DataError, match="7 of 69 rows would have to be left out"):
        refuse_if_too_many(many, total=69, max_dropped_share=0.1)
