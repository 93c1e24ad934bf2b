"""Is an optimizer step still a random sample? What steps are made of under each packer, beside random documents.

    python bench/packing_statistics.py [--documents 1000000] [--packs 64] [--seeds 4]

For five statistics of a step's lengths, the variance over steps divided by that of steps which are cut from a shuffled
order of the same documents at the same number of tokens (the design effect): 1 is a random sample. The relative error
of a figure is about 2 / sqrt(steps * seeds); figures are means over seeds. `TRL` is best-fit decreasing in groups of
1000 rows, its default, with the packs of an epoch shuffled; so are those of ffd and bfd here.
"""

import argparse
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from synthetic import LENGTHS, lower_bound

from trainer_kernels import PackPlan, pack

Lengths = NDArray[np.int32]
Steps = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Documents one after the other, and where the steps begin and end among them."""

STATISTICS = ("documents/token", "short share", "long share", "token log len", "doc log len")
CASES = (("chat", 4096), ("chat", 8192), ("chat", 32768), ("short", 4096), ("long_mix", 32768))
TRL_GROUP = 1000


def packed_steps(plan: PackPlan, packs: int) -> Steps:
    """Steps of ``packs`` packs each; what is left over is left out."""
    bounds = plan.offsets[: len(plan) // packs * packs + 1 : packs]
    return plan.items[: bounds[-1]], bounds


def grouped_steps(lengths: Lengths, capacity: int, packs: int, seed: int) -> Steps:
    """Best-fit decreasing of every ``TRL_GROUP`` documents on their own, and the packs of all shuffled."""
    random = np.random.default_rng(seed)
    found: list[NDArray[np.int32]] = []
    for first in range(0, len(lengths), TRL_GROUP):
        plan = pack(lengths[first : first + TRL_GROUP], capacity, algorithm="bfd")
        found += [first + plan.pack(number) for number in range(len(plan))]
    order = random.permutation(len(found))[: len(found) // packs * packs]
    sizes = np.array([len(found[number]) for number in order])
    bounds = np.concatenate([[0], np.cumsum(sizes)])[::packs]
    return np.concatenate([found[number] for number in order]), bounds


def random_steps(lengths: Lengths, steps: int, seed: int) -> Steps:
    """Documents in random order, cut at equal numbers of tokens."""
    shuffled = np.random.default_rng(1000 + seed).permutation(len(lengths)).astype(np.int32)
    total = np.cumsum(lengths[shuffled], dtype=np.int64)
    cuts = np.searchsorted(total, np.arange(1, steps) * (total[-1] / steps))
    return shuffled, np.concatenate([[0], cuts, [len(lengths)]])


def composition(lengths: Lengths, steps: Steps) -> NDArray[np.float64]:
    """The five statistics of every step, float64 [5, steps]."""
    items, bounds = steps
    length = lengths[items].astype(np.float64)
    begins = bounds[:-1]
    tokens = np.add.reduceat(length, begins)
    count = np.diff(bounds)
    log_length = np.log(length)

    def share(chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.add.reduceat(np.where(chosen, length, 0.0), begins) / tokens

    return np.stack(
        [
            count / tokens,
            share(length < np.median(lengths)),
            share(length > np.quantile(lengths, 0.95)),
            np.add.reduceat(length * log_length, begins) / tokens,
            np.add.reduceat(log_length, begins) / count,
        ]
    )


def design_effects(lengths: Lengths, steps: Steps, seed: int) -> NDArray[np.float64]:
    """Variance of each statistic over steps, over that of random documents."""
    random = random_steps(lengths, len(steps[1]) - 1, seed)
    return composition(lengths, steps).var(axis=1) / composition(lengths, random).var(axis=1)


def main() -> None:
    """Print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--documents", type=int, default=1_000_000)
    arguments.add_argument("--packs", type=int, default=64, help="packs of an optimizer step")
    arguments.add_argument("--seeds", type=int, default=4)
    given = arguments.parse_args()
    names: tuple[Literal["rfc", "ffd", "bfd"], ...] = ("rfc", "ffd", "bfd")
    print(f"variance of a step of {given.packs} packs / that of random documents, {given.documents:,} documents")
    print(f"{'':26}{'fill/bound':>11}" + "".join(f"{name:>17}" for name in STATISTICS) + f"{'steps':>8}")
    for kind, capacity in CASES:
        makers: dict[str, Callable[[Lengths, int], Steps]] = {
            name: lambda lengths, seed, name=name, capacity=capacity: packed_steps(
                pack(lengths, capacity, algorithm=name, seed=seed), given.packs
            )
            for name in names
        }
        makers["TRL"] = lambda lengths, seed, capacity=capacity: grouped_steps(lengths, capacity, given.packs, seed)
        for name, make in makers.items():
            effects: list[NDArray[np.float64]] = []
            bound = made = steps = 0
            for seed in range(given.seeds):
                lengths = LENGTHS[kind](given.documents, capacity, seed)
                found = make(lengths, seed)
                steps = len(found[1]) - 1
                effects.append(design_effects(lengths, found, seed))
                bound += lower_bound(lengths, capacity) * int(lengths[found[0]].sum()) / int(lengths.sum())
                made += steps * given.packs
            row = "".join(f"{value:17.2f}" for value in np.mean(effects, axis=0))
            print(f"{kind + ' ' + str(capacity):20}{name:6}{100 * bound / made:10.2f}%{row}{steps:8}", flush=True)


if __name__ == "__main__":
    main()
