"""How sure a figure of a test is, and whether two runs differ on the same rows: closed formulas, no dependencies.

Rows are the sample: the intervals say what other rows of the same kind would give, and nothing about another seed of
the training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

LEVEL = 0.95
_Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure lies between ``low`` and ``high`` with the confidence ``LEVEL``."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Paired:
    """One yes-or-no figure of two runs on the same rows: ``gained`` only the second got right, ``lost`` only the first.

    ``difference``: share of the second less share of the first; ``interval``: of the difference. ``p``: how likely a
    split of the rows that differ is, at least as uneven as this one, if neither run is better (McNemar's exact test).
    """

    rows: int
    gained: int
    lost: int
    difference: float
    interval: Interval
    p: float

    @property
    def differs(self) -> bool:
        """Whether chance alone is an unlikely reason, at ``LEVEL``."""
        return self.p < 1 - LEVEL


def of_share(share: float, rows: int) -> Interval:
    """The interval of a share of ``rows`` rows (Wilson 1927): inside 0 to 1, and of some width at 0 and at 1 as well.

    Raises:
        ValueError: no rows, or a share outside of 0 to 1.
    """
    if rows < 1 or not 0.0 <= share <= 1.0:
        raise ValueError(f"no interval for a share of {share} of {rows} rows")
    weight = _Z * _Z / rows
    middle = (share + weight / 2) / (1 + weight)
    reach = _Z / (1 + weight) * sqrt(share * (1 - share) / rows + weight / (4 * rows))
    # Rounding must not leave the figure itself outside.
    return Interval(min(max(0.0, middle - reach), share), max(min(1.0, middle + reach), share))


def of_mean(values: Sequence[float]) -> Interval | None:
    """The interval of the mean of one figure per row, by its normal approximation; None below two rows."""
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    reach = _Z * sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return Interval(mean - reach, mean + reach)


def compare(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare two runs, row by row.

    Raises:
        ValueError: no rows, or not as many of the one as of the other.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"{len(first)} rows beside {len(second)}")
    rows = len(first)
    gained = sum(after and not before for before, after in zip(first, second, strict=True))
    lost = sum(before and not after for before, after in zip(first, second, strict=True))
    return Paired(rows, gained, lost, (gained - lost) / rows, of_difference(first, second), mcnemar(gained, lost))


def of_difference(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """The interval of the second share less the first on the same rows: Newcombe 1998 (Stat. Med. 17, 2635), method 10.

    Made of the two intervals of shares, so that it has some width where no row differs.
    """
    rows = len(first)
    after, before = sum(second) / rows, sum(first) / rows
    of_after, of_before = of_share(after, rows), of_share(before, rows)
    together = _correlation(first, second)
    down = _joined(after - of_after.low, of_before.high - before, together)
    up = _joined(of_after.high - after, before - of_before.low, together)
    return Interval(max(-1.0, after - before - down), min(1.0, after - before + up))


def _joined(one: float, other: float, correlation: float) -> float:
    return sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))


def _correlation(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Phi of the four counts, corrected for continuity as Newcombe does it; 0 where a margin is empty."""
    rows = len(first)
    both = sum(before and after for before, after in zip(first, second, strict=True))
    neither = sum(not before and not after for before, after in zip(first, second, strict=True))
    gained, lost = sum(second) - both, sum(first) - both
    margins = (both + gained) * (both + lost) * (neither + gained) * (neither + lost)
    if not margins:
        return 0.0
    product = both * neither - gained * lost
    return (max(0.0, product - rows / 2) if product > 0 else product) / sqrt(margins)


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided test: binomial with one half over the rows in which two runs differ; 1 where none."""
    count, fewer = gained + lost, min(gained, lost)
    tail = sum(comb(count, successes) for successes in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)
