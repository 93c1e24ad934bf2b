"""The over-long policy loses no token and no row without saying so."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.length import CUT_AWAY, NO_TARGET, TOO_LONG, fit_length, targets_of
from trainer.errors import ConfigError, DataError
from trainer.samples import Origin, TokenizedExample


def document(length: int, learnt: slice = slice(None), row: int = 1) -> TokenizedExample:
    mask = np.zeros(length, np.bool_)
    mask[learnt] = True
    return TokenizedExample(np.arange(length, dtype=np.int32), mask, Origin("rows.jsonl", row))


def test_what_fits_is_one_whole_view() -> None:
    fitted = fit_length([document(8), document(3)], capacity=8, over_long="error", overlap=1)
    assert fitted.views == [[(0, 8, 0)], [(0, 3, 0)]]
    assert (fitted.over_long, fitted.dropped) == (0, [])


def test_error_names_the_rows_their_tokens_and_the_choices() -> None:
    with pytest.raises(DataError) as raised:
        fit_length([document(4), document(9, row=2), document(200, row=3)], capacity=8, over_long="error", overlap=1)
    message = str(raised.value)
    assert raised.value.exit_code == 2
    assert "2 rows are longer than a pack" in message
    assert "rows.jsonl:2 has 9 tokens, rows.jsonl:3 has 200 tokens; the longest has 200" in message
    assert "packing.capacity=256" in message
    assert all(choice in message for choice in ("data.over_long=drop", "truncate", "split"))


def test_one_long_row_among_many_is_in_the_singular_and_the_list_is_short() -> None:
    with pytest.raises(DataError, match="1 row is longer"):
        fit_length([document(9)], capacity=8, over_long="error", overlap=1)
    with pytest.raises(DataError, match="and 2 more; the longest has 15"):
        fit_length([document(9 + n, row=n) for n in range(7)], capacity=8, over_long="error", overlap=1)


def test_drop_counts() -> None:
    fitted = fit_length([document(9, row=4), document(8)], capacity=8, over_long="drop", overlap=1)
    assert fitted.views == [[], [(0, 8, 0)]]
    assert [(item.reason, item.first) for item in fitted.dropped] == [(TOO_LONG, ["rows.jsonl:4 (9 tokens)"])]


def test_truncate_drops_what_lost_its_answer() -> None:
    answer_at_the_end, answer_across = document(12, slice(9, 12), row=1), document(12, slice(6, 12), row=2)
    fitted = fit_length([answer_at_the_end, answer_across], capacity=8, over_long="truncate", overlap=1)
    assert fitted.views == [[], [(0, 8, 0)]]
    assert (fitted.over_long, fitted.truncated) == (2, 1)
    assert [(item.reason, item.first) for item in fitted.dropped] == [(CUT_AWAY, ["rows.jsonl:1 (12 tokens)"])]


def test_a_row_without_a_target_is_left_out_whatever_its_length() -> None:
    only_the_first = document(4, slice(0, 1))
    fitted = fit_length([only_the_first], capacity=8, over_long="error", overlap=1)
    assert fitted.views == [[]]
    assert [item.reason for item in fitted.dropped] == [NO_TARGET]


def test_split_overlaps_without_learning_twice_and_leaves_out_chunks_without_a_target() -> None:
    fitted = fit_length([document(20), document(20, slice(18, 20))], capacity=8, over_long="split", overlap=2)
    assert fitted.views == [[(0, 8, 0), (6, 8, 2), (12, 8, 2)], [(12, 8, 2)]]
    assert fitted.chunks == 4


@given(
    length=st.integers(1, 200),
    capacity=st.integers(2, 40),
    overlap=st.integers(1, 39),
    learnt=st.lists(st.booleans(), min_size=200, max_size=200),
)
def test_split_learns_every_target_exactly_once(length: int, capacity: int, overlap: int, learnt: list[bool]) -> None:
    overlap = min(overlap, capacity - 1)
    mask = np.asarray(learnt[:length], np.bool_)
    example = TokenizedExample(np.zeros(length, np.int32), mask, Origin("r", 1))
    (views,) = fit_length([example], capacity=capacity, over_long="split", overlap=overlap).views
    times = np.zeros(length, np.int64)
    for start, size, muted in views:
        assert size <= capacity
        first = start + max(1, muted)
        times[first : start + size] += mask[first : start + size]
        assert targets_of(mask, (start, size, muted)) > 0
    expected = mask.astype(np.int64)
    expected[0] = 0  # nothing stands before it
    assert times.tolist() == expected.tolist()


@pytest.mark.parametrize("overlap", [0, 8, 9])
def test_an_overlap_that_does_not_fit_is_refused(overlap: int) -> None:
    with pytest.raises(ConfigError, match="the overlap does not fit into a pack") as raised:
        fit_length([document(20)], capacity=8, over_long="split", overlap=overlap)
    assert "data.split_overlap" in str(raised.value)
    assert "1 to 7" in str(raised.value)
