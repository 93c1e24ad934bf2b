"""One pass over the tokens gives the batch of ``reference.py``, in every layout."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_fixtures import Run, random_arena, runs, write_arena

from trainer_kernels import CompactBatch, PackedBatch, PackingError, TokenArena, collate, reference


def same(found: PackedBatch, expected: PackedBatch) -> None:
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    assert counts(found) == counts(expected)
    assert found.cu_seqlens.dtype == np.int32


def counts(batch: PackedBatch | CompactBatch) -> tuple[int, int, int, int]:
    return batch.max_seqlen, batch.num_tokens, batch.num_targets, batch.num_documents


@given(
    rows=st.lists(runs(), min_size=1, max_size=6),
    picks=st.lists(st.integers(0, 1000), max_size=8),
    padding=st.one_of(st.none(), st.integers(0, 40)),
    pad_id=st.integers(0, (1 << 31) - 1),
)
@settings(max_examples=80, deadline=None)
def test_every_layout_equals_the_reference(rows: list[Run], picks: list[int], padding: int | None, pad_id: int) -> None:
    with TemporaryDirectory() as folder:
        _check_all_layouts(write_arena(Path(folder) / "arena", rows), picks, padding, pad_id)


def _check_all_layouts(arena: TokenArena, picks: list[int], padding: int | None, pad_id: int) -> None:
    documents = [pick % arena.num_documents for pick in picks]
    total = sum(int(arena.lengths[document]) for document in documents)
    pad_to = None if padding is None else max(1, total + padding)
    expected = reference.collate(arena, documents, pad_to=pad_to, pad_id=pad_id)
    assert expected.num_targets == sum(int(arena.targets[document]) for document in documents)
    for layout in ("int64", "int32"):
        found = collate(arena, documents, pad_to=pad_to, layout=layout, pad_id=pad_id)
        same(found, expected)
        for array in (found.input_ids, found.labels, found.position_ids):
            assert array.dtype == np.dtype(layout)
            assert array.shape == (expected.cu_seqlens[-1],)
    compact = collate(arena, np.array(documents, np.int32), pad_to=pad_to, layout="compact", pad_id=pad_id)
    assert compact.tokens.dtype == np.int32
    assert counts(compact) == counts(expected)
    same(reference.expand(compact), expected)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> TokenArena:
    return random_arena(tmp_path_factory.mktemp("collate") / "arena", documents=50, longest=40)


def test_a_batch_by_hand(tmp_path: Path) -> None:
    rows: list[Run] = [
        ([10, 11, 12], [False, False, True], None),
        ([20, 21, 22, 23], [True, True, True, True], [(0, 4, 0), (1, 3, 2)]),
    ]
    batch = collate(write_arena(tmp_path / "arena", rows), [0, 2, 1], pad_to=13, pad_id=7)
    assert batch.input_ids.tolist() == [10, 11, 12, 21, 22, 23, 20, 21, 22, 23, 7, 7, 7]
    assert batch.labels.tolist() == [-100, 12, -100, -100, 23, -100, 21, 22, 23, -100, -100, -100, -100]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 10, 13]
    assert counts(batch) == (4, 10, 5, 3)


@pytest.mark.parametrize(("pad_to", "size"), [(None, 1), (6, 6)])
def test_no_documents_make_a_batch_of_padding(arena: TokenArena, pad_to: int | None, size: int) -> None:
    for documents in ([], np.empty(0, np.int32)):
        batch = collate(arena, documents, pad_to=pad_to, pad_id=3)
        same(batch, reference.collate(arena, [], pad_to=pad_to, pad_id=3))
        assert batch.input_ids.tolist() == [3] * size
        assert batch.labels.tolist() == [-100] * size
        assert batch.cu_seqlens.tolist() == [0, size]
        assert counts(batch) == (size, 0, 0, 0)


def test_the_pad_tail_is_one_segment_and_counts_for_the_longest(arena: TokenArena) -> None:
    total = int(arena.lengths[:2].sum())
    batch = collate(arena, [0, 1], pad_to=total + 100)
    assert batch.cu_seqlens.tolist() == [0, int(arena.lengths[0]), total, total + 100]
    assert batch.max_seqlen == 100
    assert batch.num_documents == 2
    assert collate(arena, [0, 1], pad_to=total).cu_seqlens.tolist() == [0, int(arena.lengths[0]), total]


def test_batches_do_not_share_memory_with_the_arena_or_each_other(arena: TokenArena) -> None:
    first, second = collate(arena, [0, 1]), collate(arena, [0, 1])
    first.input_ids[:] = -1
    assert second.input_ids.tolist() == reference.collate(arena, [0, 1]).input_ids.tolist()
    assert not np.shares_memory(collate(arena, [0], layout="compact").tokens, arena.tokens)


BAD: list[tuple[Any, dict[str, Any], list[str]]] = [
    ([0, 50], {}, ["there is no such document", "ids from 0 to 50", "0 to 49"]),
    ([-1], {}, ["there is no such document", "ids from -1 to -1"]),
    ([0.5], {}, ["documents must be a list of document ids", "float64"]),
    ([[0]], {}, ["documents must be a list of document ids", "shape (1, 1)"]),
    ([0, 1, 2], {"pad_to": 3}, ["the documents do not fit in the batch", "tokens in 3 documents, pad_to=3"]),
    ([], {"pad_to": 0}, ["the documents do not fit in the batch", "0 tokens in 0 documents, pad_to=0", "1 to"]),
    ([0], {"layout": "int16"}, ["unknown layout", "'int16'", "int64, int32, compact"]),
    ([0], {"pad_id": -1}, ["pad_id is out of range", "got: -1"]),
    ([0], {"pad_id": 1 << 31}, ["pad_id is out of range"]),
]


@pytest.mark.parametrize(("documents", "options", "words"), BAD)
def test_bad_input_is_refused(arena: TokenArena, documents: Any, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PackingError) as caught:
        collate(arena, documents, **options)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
