"""Splits keep groups, equal texts and label shares together, and can be proved to be the same again."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from data_fixtures import row, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.splits import (
    SPLITS,
    SplitName,
    Splits,
    check_frozen,
    check_groups,
    freeze,
    input_key,
    make_splits,
    take,
    whole_key,
)
from trainer.errors import DataError
from trainer.samples import Conversation, Message, Origin


def make(train: list[Conversation], *, task_name: str = "classification", seed: int = 0, **changes: float) -> Splits:
    shares = {"validation_share": 0.1, "test_share": 0.2, **changes}
    return make_splits(train, [], [], seed=seed, task_name=task_name, **shares)


def sizes(splits: Splits) -> tuple[int, ...]:
    return tuple(len(part) for _, part in splits.items())


# ---------------------------------------------------------------------------------------------------- made splits


def test_shares_are_kept_for_every_label() -> None:
    common = [row(f"a{n}", "a", label="a", line=n) for n in range(900)]
    rare = [row(f"b{n}", "b", label="b", line=1000 + n) for n in range(100)]
    splits = make(common + rare)
    assert sizes(splits) == (700, 100, 200)
    assert [Counter(r.label for r in part) for _, part in splits.items()] == [
        {"a": 630, "b": 70},
        {"a": 90, "b": 10},
        {"a": 180, "b": 20},
    ]


def test_many_rare_labels_do_not_empty_the_test_split() -> None:
    pairs = [
        row(f"{label}.{n}", str(label), label=str(label), line=2 * label + n) for label in range(100) for n in (1, 2)
    ]
    assert sizes(make(pairs)) == (140, 20, 40)


@settings(max_examples=40, deadline=None)
@given(st.integers(60, 300), st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_no_group_is_split_and_no_row_is_lost(count: int, per_group: int, labels: int, seed: int) -> None:
    train = rows(count, labels=labels, per_group=per_group)
    splits = make(train, seed=seed)
    groups = [{r.group for r in part} for _, part in splits.items()]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert sorted(r.id for _, part in splits.items() for r in part) == sorted(r.id for r in train)
    check_groups(splits)
    for (_, part), share in zip(splits.items(), (0.7, 0.1, 0.2), strict=True):
        assert abs(len(part) - share * count) <= per_group


def test_the_rows_of_a_split_keep_their_order_and_the_seed_decides() -> None:
    train = rows(100, labels=4)
    first, again, other = make(train), make(train), make(train, seed=1)
    assert first == again
    assert first.test != other.test
    assert [r.origin.row for r in first.test] == sorted(r.origin.row for r in first.test)


def test_the_order_of_the_file_does_not_decide_who_is_tested() -> None:
    """Sorted files are common: the test rows must come from everywhere."""
    tested = [r.origin.row for r in make(rows(1000)).test]
    assert min(tested) < 50
    assert max(tested) > 950


def test_the_largest_groups_stay_in_training() -> None:
    large = [row(f"l{n}", "a", label="a", group="large", line=n) for n in range(60)]
    small = [row(f"s{n}", "a", label="a", group=f"small{n}", line=100 + n) for n in range(40)]
    splits = make(large + small)
    assert {r.group for r in splits.train} >= {"large"}
    assert sizes(splits) == (70, 10, 20)


@pytest.mark.parametrize("seed", range(6))
def test_groups_of_many_sizes_still_give_the_shares(seed: int) -> None:
    """The largest are placed first, so that the small ones can fill what is left."""
    large = [row(f"l{n}", "a", label="a", group=f"large{n // 20}", line=n) for n in range(100)]
    small = [row(f"s{n}", "a", label="a", group=f"small{n}", line=200 + n) for n in range(50)]
    assert sizes(make(large + small, seed=seed, validation_share=0.2, test_share=0.2)) == (90, 30, 30)


def test_rows_that_ask_the_same_stay_together_where_one_answer_is_right() -> None:
    train = [row("same", f"answer {n}", line=n) for n in range(20)] + rows(80, file="b.jsonl")
    splits = make(train, task_name="extraction")
    assert sum(any(r.messages[0].content == "same" for r in part) for _, part in splits.items()) == 1
    chat = make(train, task_name="chat")
    assert sum(any(r.messages[0].content == "same" for r in part) for _, part in chat.items()) > 1


def test_groups_that_share_a_text_become_one() -> None:
    train = rows(90, per_group=3)
    linked = [replace(train[0], group="group29", origin=Origin("b.jsonl", 1), id="b")]
    splits = make(train + linked)
    home = [name for name, part in splits.items() if any(r.group in ("group0", "group29") for r in part)]
    assert len(home) == 1


def test_a_given_split_is_left_as_it_is() -> None:
    train, test = rows(100), rows(5, file="test.jsonl")
    splits = make_splits(train, [], test, validation_share=0.1, test_share=0.5, seed=0, task_name="chat")
    assert splits.test == test
    assert sizes(splits) == (90, 10, 5)
    given_all = make_splits(train, test, test, validation_share=0.1, test_share=0.5, seed=0, task_name="chat")
    assert sizes(given_all) == (100, 5, 5)


def test_a_share_of_nothing_makes_no_split() -> None:
    assert sizes(make(rows(10), validation_share=0.0, test_share=0.2)) == (8, 0, 2)
    assert sizes(make(rows(10), validation_share=0.0, test_share=0.0)) == (10, 0, 0)


def test_too_few_rows_for_a_split() -> None:
    with pytest.raises(DataError) as caught:
        make(rows(5), validation_share=0.05)
    assert str(caught.value) == (
        "data.validation: the validation split would be empty\n"
        "  got: 5 rows, of which a share of 0.05 is asked for\n"
        "  do this: give more rows, a file for data.validation, or another data.validation_share"
    )


def test_too_few_groups_for_a_split() -> None:
    with pytest.raises(
        DataError, match=r"would be empty\n  got: 100 rows in 2 groups.*\n  do this: give more rows and groups"
    ):
        make(rows(100, per_group=50))
    with pytest.raises(
        DataError, match=r"the train split would be empty\n.*\n  do this: give more rows and groups, or smaller"
    ):
        make(rows(100, per_group=100), validation_share=0.1, test_share=0.8)


def test_shares_that_leave_nothing_for_training() -> None:
    with pytest.raises(DataError, match=r"leave no rows for training\n  got: validation_share=0\.5, test_share=0\.5"):
        make(rows(10), validation_share=0.5, test_share=0.5)


# ------------------------------------------------------------------------------------------------- identity of rows


def test_what_makes_two_rows_the_same() -> None:
    assert input_key(row("a  b\n", "x")) == input_key(row("a b", "y"))
    assert whole_key(row("a b", "x")) != whole_key(row("a b", "y"))
    assert input_key(row("a b", "x")) != input_key(row("A b", "x"))
    text = Conversation(id="1", origin=Origin("a", 1), text="some  words")
    assert input_key(text) == whole_key(replace(text, text="some words\n"))


def test_an_input_is_all_before_the_last_answer() -> None:
    def talk(*contents: str) -> Conversation:
        roles = ("user", "assistant", "user", "assistant")
        turns = tuple(Message(role=role, content=content) for role, content in zip(roles, contents, strict=True))
        return Conversation(id="1", origin=Origin("a", 1), messages=turns)

    assert input_key(talk("a", "b", "c", "d")) == input_key(talk("a", "b", "c", "e"))
    assert input_key(talk("a", "b", "c", "d")) != input_key(talk("a", "x", "c", "d"))


def test_turns_do_not_run_into_each_other() -> None:
    two_turns = (Message(role="user", content="a"), Message(role="user", content="b"))
    assert input_key(row("auserb", "x")) != input_key(replace(row("a", "x"), messages=two_turns))


# ----------------------------------------------------------------------------------------------------- given splits


def test_a_group_in_two_given_splits() -> None:
    splits = Splits(
        train=[row("a", "x", group="g1", line=1), row("b", "x", group="g2", line=2)],
        validation=[row("c", "x", group="g2", file="v.jsonl")],
        test=[row("d", "x", group="g1", file="t.jsonl")],
    )
    with pytest.raises(DataError) as caught:
        check_groups(splits)
    message = str(caught.value)
    assert "data.group_column: 1 groups are in train and in test\n  got: 'g1' (a.jsonl:1 and t.jsonl:1)" in message
    assert "1 groups are in train and in validation\n  got: 'g2' (a.jsonl:2 and v.jsonl:1)" in message
    assert len(caught.value.problems) == 2


# -------------------------------------------------------------------------------------------------------- selection


def test_taking_fewer_rows_keeps_shares_and_order() -> None:
    train = rows(200, labels=4)
    random.Random(0).shuffle(train)
    some = take(train, 40, seed=0)
    assert Counter(r.label for r in some) == dict.fromkeys(("label0", "label1", "label2", "label3"), 10)
    assert some == [r for r in train if r in some]
    assert some == take(train, 40, seed=0)
    assert some != take(train, 40, seed=1)


def test_taking_exactly_as_many_as_asked_for() -> None:
    many_labels = [row(f"q{n}", str(n), label=str(n), line=n) for n in range(50)]
    assert len(take(many_labels, 7, seed=0)) == 7
    assert take(many_labels, None, seed=0) == many_labels
    assert take(many_labels, 50, seed=0) == many_labels
    assert take(many_labels, 99, seed=0) == many_labels


# --------------------------------------------------------------------------------------------------------- freezing


def test_frozen_splits_recognise_themselves(tmp_path: Path) -> None:
    splits = make(rows(50))
    first = freeze(splits, tmp_path / "a.json", seed=0)
    assert freeze(splits, tmp_path / "b.json", seed=0) == first
    assert freeze(splits, tmp_path / "c.json", seed=1) != first
    check_frozen(splits, tmp_path / "a.json")


@pytest.mark.parametrize("name", ["validation", "test"])
def test_frozen_splits_refuse_other_rows(name: SplitName, tmp_path: Path) -> None:
    splits = make(rows(50))
    freeze(splits, tmp_path / "splits.json", seed=0)
    parts = dict(splits.items())
    shorter = Splits(**{**parts, name: parts[name][1:]})
    with pytest.raises(DataError, match=f"the {name} rows are not the frozen ones\n  got: 1 missing"):
        check_frozen(shorter, tmp_path / "splits.json")
    changed = Splits(**{**parts, name: [replace(parts[name][0], answer="another"), *parts[name][1:]]})
    with pytest.raises(DataError, match=f"the {name} rows are not the frozen ones\n  got: 0 missing"):
        check_frozen(changed, tmp_path / "splits.json")
    check_frozen(Splits(**{**parts, "train": []}), tmp_path / "splits.json")


def test_frozen_splits_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the frozen splits cannot be read"):
        check_frozen(make(rows(50)), tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match=r"the frozen splits cannot be read\n  got: Object missing required field"):
        check_frozen(make(rows(50)), tmp_path / "broken.json")


def test_the_names_of_the_splits() -> None:
    assert tuple(name for name, _ in make(rows(20)).items()) == SPLITS
