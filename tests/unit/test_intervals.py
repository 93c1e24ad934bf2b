"""Intervals and tests give the figures of the papers they come from, and refuse what has none."""

from itertools import product

import pytest
from scipy.stats import binomtest

from trainer.intervals import compare, mcnemar, of_mean, of_share


@pytest.mark.parametrize(
    ("hits", "rows", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_as_in_the_table_of_newcombe(hits: int, rows: int, low: float, high: float) -> None:
    """Statistics in Medicine 17, 857 (1998), table I, method 3."""
    found = of_share(hits / rows, rows)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_the_share_is_inside_at_both_ends() -> None:
    for hits, rows in product((0, 1), (1, 3, 189)):
        found = of_share(float(hits), rows)
        assert 0.0 <= found.low <= hits <= found.high <= 1.0
        assert found.high - found.low > 0.01


@pytest.mark.parametrize(("share", "rows"), [(0.5, 0), (1.5, 10), (-0.1, 10)])
def test_what_is_no_share_has_no_interval(share: float, rows: int) -> None:
    with pytest.raises(ValueError, match="no interval"):
        of_share(share, rows)


def test_the_mean_of_rows() -> None:
    assert of_mean([0.5]) is None
    found = of_mean([0.0, 1.0, 0.0, 1.0])
    assert found is not None
    # 0.5 +- 1.96 * sqrt((1/3) / 4)
    assert (round(found.low, 4), round(found.high, 4)) == (-0.0658, 1.0658)


def pairs(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = [True] * (both + lost) + [False] * (gained + neither)
    second = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return first, second


def test_pairs_as_in_the_example_of_newcombe() -> None:
    """Statistics in Medicine 17, 2635 (1998): 36, 12, 2 and 0 of 50, method 10: 0.0569 to 0.3404."""
    found = compare(*pairs(36, 2, 12, 0))
    assert (found.gained, found.lost, found.rows) == (12, 2, 50)
    assert found.difference == pytest.approx(0.2)
    assert (round(found.interval.low, 4), round(found.interval.high, 4)) == (0.0569, 0.3404)
    back = compare(*pairs(36, 12, 2, 0))
    assert (round(back.interval.low, 4), round(back.interval.high, 4)) == (-0.3404, -0.0569)


def test_rows_that_never_differ_leave_some_doubt() -> None:
    found = compare(*pairs(30, 0, 0, 10))
    assert found.interval.low < 0 < found.interval.high
    assert (found.p, found.differs) == (1.0, False)


def test_mcnemar_is_the_binomial_test_of_the_rows_that_differ() -> None:
    for gained, lost in ((0, 0), (5, 1), (1, 5), (12, 2), (40, 60), (7, 7)):
        expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert mcnemar(gained, lost) == pytest.approx(expected)
    assert compare(*pairs(0, 2, 12, 0)).differs
    assert not compare(*pairs(0, 1, 5, 0)).differs


def test_runs_of_other_rows_are_not_paired() -> None:
    for first, second in (([], []), ([True], [True, False])):
        with pytest.raises(ValueError, match="rows beside"):
            compare(first, second)
