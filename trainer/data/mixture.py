"""Weighted mixtures: how many rows of each part one epoch sees, said in numbers instead of sampled at run time.

A mixture is applied to training rows AFTER the splits are made: a row that is repeated before it could land in two
splits.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from trainer.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPart:
    """What became of one part: ``rows`` it has, ``used`` times a row of it is seen, ``left_out`` rows never seen."""

    rows: int
    used: int
    left_out: int

    @property
    def repeats(self) -> float:
        """How often its average row is seen."""
        return self.used / self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture(Generic[T]):
    """The rows of one epoch, in a seeded order, and what became of each part."""

    rows: list[T]
    parts: list[MixedPart]


def mix(parts: Sequence[tuple[Sequence[T], float]], seed: int) -> Mixture[T]:
    """Repeat and thin the rows of ``parts`` (rows, weight) so that they are seen in the ratio of their weights.

    The mixture is as long as the parts together. A part that has to be seen n + f times is taken n times whole, and a
    seeded choice of the fraction f once more. The same parts and seed give the same rows in the same order.

    Raises:
        DataError: no parts, a part without rows, a weight that is not a positive number, a weight so small that no
            row of its part would be seen.
    """
    if not parts:
        raise DataError("a mixture needs at least one part", where="data.mixture")
    for index, (rows, weight) in enumerate(parts):
        where = f"data.mixture[{index}]"
        if not (math.isfinite(weight) and weight > 0):
            raise DataError("the weight is not a positive number", where=f"{where}.weight", got=weight)
        if not rows:
            raise DataError("the part has no rows", where=where)
    total = sum(len(rows) for rows, _ in parts)
    targets = apportion([weight for _, weight in parts], total)
    mixed: list[T] = []
    report: list[MixedPart] = []
    for index, ((rows, weight), used) in enumerate(zip(parts, targets, strict=True)):
        if used == 0:
            raise DataError(
                "the weight is too small: no row of the part would be seen",
                where=f"data.mixture[{index}].weight", got=weight, do=f"remove the part; the mixture has {total} rows",
            )  # fmt: skip
        whole, rest = divmod(used, len(rows))
        chosen = random.Random(f"{seed}:{index}").sample(range(len(rows)), rest)
        mixed.extend(list(rows) * whole)
        mixed.extend(rows[position] for position in sorted(chosen))
        report.append(MixedPart(rows=len(rows), used=used, left_out=len(rows) - rest if whole == 0 else 0))
    random.Random(seed).shuffle(mixed)
    return Mixture(rows=mixed, parts=report)


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the ratio of ``weights`` that sum to ``total`` (largest remainders; ties: the earlier one)."""
    whole = math.fsum(weights)
    exact = [total * weight / whole for weight in weights]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(weights)), key=lambda index: (counts[index] - exact[index], index))
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts
