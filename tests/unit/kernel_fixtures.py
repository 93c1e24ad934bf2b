"""Documents to pack and arenas to read: shared by the tests of ``trainer_kernels``."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainer_kernels import ArenaWriter, PackPlan, TokenArena


@dataclass(frozen=True)
class Case:
    """One packing problem."""

    lengths: NDArray[np.int32]
    capacity: int
    seed: int
    epoch: int


@st.composite
def cases(draw: st.DrawFn, most: int = 120) -> Case:
    """Few or many documents, of one length, all lengths or nearly full packs, in packs of 1 to 300 tokens."""
    capacity = draw(st.one_of(st.integers(1, 12), st.integers(13, 300)))
    low = draw(st.sampled_from([1, 1, max(1, capacity // 3), capacity // 2 + 1]))
    high = draw(st.integers(min(low, capacity), capacity))
    lengths = draw(st.lists(st.integers(min(low, high), high), min_size=1, max_size=most))
    seed = draw(st.integers(0, (1 << 64) - 1))
    return Case(np.array(lengths, np.int32), capacity, seed, draw(st.integers(0, 5)))


def as_lists(plan: PackPlan) -> list[list[int]]:
    """The packs as lists of document ids."""
    return [plan.items[begin:end].tolist() for begin, end in pairwise(plan.offsets)]


def chat_lengths(count: int, longest: int, seed: int = 0) -> NDArray[np.int32]:
    """Lognormal lengths as chat data has them: median 350 tokens, a heavy tail, cut at ``longest``."""
    drawn = np.random.default_rng(seed).lognormal(np.log(350), 1.1, count)
    return np.clip(drawn, 1, longest).astype(np.int32)


Run = tuple[list[int], list[bool], list[tuple[int, int, int]] | None]


@st.composite
def runs(draw: st.DrawFn, most: int = 30) -> Run:
    """One row of tokens with a mask, as a whole or as up to four views that may overlap."""
    count = draw(st.integers(1, most))
    ids = draw(st.lists(st.integers(0, (1 << 31) - 1), min_size=count, max_size=count))
    mask = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    if draw(st.booleans()):
        return ids, mask, None
    views: list[tuple[int, int, int]] = []
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, count - 1))
        length = draw(st.integers(1, count - start))
        views.append((start, length, draw(st.integers(0, length))))
    return ids, mask, views


def write_arena(path: Path, rows: list[Run]) -> TokenArena:
    """An arena of ``rows``."""
    with ArenaWriter(path) as writer:
        for ids, mask, views in rows:
            writer.add(ids, mask, views)
        return writer.close()


def random_arena(path: Path, documents: int, longest: int, seed: int = 0) -> TokenArena:
    """``documents`` whole rows of 2 to ``longest`` tokens, about half of them targets and the last always one."""
    random = np.random.default_rng(seed)
    with ArenaWriter(path) as writer:
        for _ in range(documents):
            count = int(random.integers(2, longest + 1))
            mask = random.random(count) < 0.5
            mask[-1] = True
            writer.add(random.integers(0, 50_000, count), mask)
        return writer.close()


Edit = Callable[[Path], None]


def truncate(name: str) -> Edit:
    """Cut the last byte off a file of an arena."""

    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1])

    return edit


def flip(name: str) -> Edit:
    """Change the last byte of a file of an arena."""

    def edit(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    return edit


def remove(name: str) -> Edit:
    """Delete a file of an arena."""

    def edit(folder: Path) -> None:
        (folder / name).unlink()

    return edit
