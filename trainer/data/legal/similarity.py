"""How much of one text stands in another, for thousands of texts at once.

A text is the set of its runs of four words (shingles; Broder 1997, "On the resemblance and containment of documents").
All sets of a task form a sparse 0/1 matrix, so that one sparse product gives the sizes of all intersections.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

_WORD = re.compile(r"[a-z0-9]+")
_RUN = 4


def shingles(texts: Sequence[str]) -> sparse.csr_array:
    """int32 0/1 matrix [texts, distinct shingles]; a text of fewer than four words is one shingle."""
    words, starts = _word_ids(texts)
    vocabulary = int(words.max(initial=0)) + 1
    pairs = _distinct(words[:-1].astype(np.int64) * vocabulary + words[1:])
    runs = _distinct(pairs[:-2].astype(np.int64) * (int(pairs.max()) + 1) + pairs[2:])
    rows = np.repeat(np.arange(len(texts)), np.diff(starts) - _RUN + 1)
    # Position p of the flat array starts a run of its text unless it is one of the text's last three.
    begins = np.concatenate([np.arange(a, b - _RUN + 1) for a, b in pairwise(starts)])
    columns = runs[begins]
    matrix = sparse.csr_array((np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=(len(texts), runs.max() + 1))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _word_ids(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Flat word ids from 1 (0 pads short texts to four words), and int64[n + 1] where each text starts."""
    ids: dict[str, int] = {}
    flat: list[int] = []
    starts = [0]
    for text in texts:
        words = [ids.setdefault(word, len(ids) + 1) for word in _WORD.findall(text.lower())]
        flat.extend(words + [0] * (_RUN - len(words)))
        starts.append(len(flat))
    return np.asarray(flat, dtype=np.int64), np.asarray(starts, dtype=np.int64)


def _distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each value's rank among the distinct ones, so that two of them still fit into 64 bits."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def near_duplicates(sets: sparse.csr_array, *, jaccard: float) -> NDArray[np.bool_]:
    """Which rows repeat an earlier kept one: intersection over union at least ``jaccard``. bool[rows]."""
    sizes = _sizes(sets)
    first, second, common = _intersections(sets, sets)
    similar = (first < second) & (common / (sizes[first] + sizes[second] - common) >= jaccard)
    earlier: dict[int, list[int]] = {}
    for a, b in zip(first[similar].tolist(), second[similar].tolist(), strict=True):
        earlier.setdefault(b, []).append(a)
    repeated = np.zeros(len(sizes), dtype=np.bool_)
    for row in range(len(sizes)):
        repeated[row] = any(not repeated[other] for other in earlier.get(row, ()))
    return repeated


def contained(sets: sparse.csr_array, in_sets: sparse.csr_array, *, containment: float) -> NDArray[np.bool_]:
    """Which rows of ``sets`` share ``containment`` of the smaller text with some row of ``in_sets``. bool[rows]."""
    sizes, in_sizes = _sizes(sets), _sizes(in_sets)
    first, second, common = _intersections(sets, in_sets)
    found = common / np.minimum(sizes[first], in_sizes[second]) >= containment
    flags = np.zeros(len(sizes), dtype=np.bool_)
    flags[first[found]] = True
    return flags


def _sizes(sets: sparse.csr_array) -> NDArray[np.int64]:
    return np.diff(sets.indptr).astype(np.int64)


def _intersections(
    left: sparse.csr_array, right: sparse.csr_array
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row of ``left``, row of ``right`` and shared shingles of every pair that shares one."""
    product = sparse.coo_array(left @ right.T)
    return product.row.astype(np.int64), product.col.astype(np.int64), product.data.astype(np.int64)
