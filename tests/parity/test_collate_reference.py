"""One pass over the tokens gives the batch of ``reference.py``, in every layout."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_fixtures import Run, random_arena, runs, write_arena

from trainer_kernels import Buffers, CompactBatch, PackedBatch, PackingError, TokenArena, collate, reference


def same(found: PackedBatch, expected: PackedBatch) -> None:
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    assert counts(found) == counts(expected)
    assert found.cu_seqlens.dtype == np.int32


def counts(batch: PackedBatch | CompactBatch) -> tuple[int, int, int, int]:
    return batch.max_seqlen, batch.num_tokens, batch.num_targets, batch.num_documents


def dirty(layout: Literal["int64", "int32", "compact"], positions: int, documents: int) -> Buffers:
    """Buffers that hold an older batch."""
    buffers = Buffers.of(layout, positions, documents)
    buffers.rows[:] = 77
    buffers.cu_seqlens[:] = 77
    return buffers


@given(
    rows=st.lists(runs(), min_size=1, max_size=6),
    picks=st.lists(st.integers(0, 1000), max_size=8),
    padding=st.one_of(st.none(), st.integers(0, 40)),
    pad_id=st.integers(0, (1 << 31) - 1),
    align=st.sampled_from([1, 1, 2, 8, 5]),
    reused=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_every_layout_equals_the_reference(
    rows: list[Run], picks: list[int], padding: int | None, pad_id: int, align: int, reused: bool
) -> None:
    with TemporaryDirectory() as folder:
        _check_all_layouts(write_arena(Path(folder) / "arena", rows), picks, padding, pad_id, align, reused)


def _check_all_layouts(
    arena: TokenArena, picks: list[int], padding: int | None, pad_id: int, align: int, reused: bool
) -> None:
    documents = [pick % arena.num_documents for pick in picks]
    total = sum(-(-int(arena.lengths[document]) // align) * align for document in documents)
    pad_to = None if padding is None else max(align, total + padding * align)
    expected = reference.collate(arena, documents, pad_to=pad_to, pad_id=pad_id, align=align)
    assert not (expected.cu_seqlens % align).any()
    size = int(expected.cu_seqlens[-1])
    assert expected.num_targets == sum(int(arena.targets[document]) for document in documents)
    for layout in ("int64", "int32"):
        out = dirty(layout, size + 3, len(documents) + 2) if reused else None
        found = collate(arena, documents, pad_to=pad_to, layout=layout, pad_id=pad_id, align=align, out=out)
        same(found, expected)
        for array in (found.input_ids, found.labels, found.position_ids):
            assert array.dtype == np.dtype(layout)
            assert array.shape == (expected.cu_seqlens[-1],)
        if out is not None:
            assert np.shares_memory(found.labels, out.rows)
    out = dirty("compact", size, len(documents)) if reused else None
    chosen = np.array(documents, np.int32)
    compact = collate(arena, chosen, pad_to=pad_to, layout="compact", pad_id=pad_id, align=align, out=out)
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


def test_padding_of_a_document_belongs_to_its_segment(arena: TokenArena) -> None:
    lengths = arena.lengths[:2].tolist()
    rounded = [-(-length // 16) * 16 for length in lengths]
    batch = collate(arena, [0, 1], align=16, pad_to=sum(rounded) + 32, pad_id=9)
    assert batch.cu_seqlens.tolist() == [0, rounded[0], sum(rounded), sum(rounded) + 32]
    assert batch.position_ids[: rounded[0]].tolist() == list(range(rounded[0]))
    assert set(batch.input_ids[lengths[0] : rounded[0]].tolist()) <= {9}
    assert set(batch.labels[lengths[0] - 1 : rounded[0]].tolist()) == {-100}
    assert (batch.num_tokens, batch.num_documents) == (sum(lengths), 2)
    assert batch.max_seqlen == max(*rounded, 32)
    assert collate(arena, [], align=16).cu_seqlens.tolist() == [0, 16]


def test_documents_of_more_than_2_to_the_31_tokens_do_not_fit_in_any_batch(arena: TokenArena) -> None:
    """Each segment is 2**30 positions by alignment; nothing of that size is allocated."""
    with pytest.raises(PackingError, match="the documents do not fit in the batch") as caught:
        collate(arena, [0, 1, 2], align=1 << 30)
    assert str(3 << 30) in caught.value.got


def test_documents_behind_2_to_the_31_tokens_are_read_from_where_they_are(arena: TokenArena, tmp_path: Path) -> None:
    """In a file of 8 GB that takes no room: all but its end is a hole."""
    first = (1 << 31) + 7
    own = arena.tokens[arena.starts[3] : arena.starts[3] + arena.lengths[3]]
    with open(tmp_path / "tokens.bin", "wb") as stream:
        stream.seek(4 * first)
        stream.write(own.tobytes())
    tokens = np.asarray(np.memmap(tmp_path / "tokens.bin", "<i4", "r"))
    big = replace(arena, tokens=tokens, starts=np.full(arena.num_documents, first))
    same(collate(big, [3, 3]), reference.collate(arena, [3, 3]))
    same(reference.expand(collate(big, [3], layout="compact")), reference.collate(arena, [3]))


SMALL = Buffers.of("int64", 4, 1)

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
    ([0], {"align": 0}, ["align is out of range", "got: 0"]),
    ([], {"align": 8, "pad_to": 12}, ["do not fit in the batch", "pad_to=12, align=8", "a multiple of 8"]),
    ([0], {"pad_to": 64, "out": SMALL}, ["the batch does not fit in the buffers", "int64[3, 4] for 64 positions"]),
    ([], {"layout": "int32", "out": SMALL}, ["the batch does not fit in the buffers", "int32 [3, at least 1]"]),
    ([], {"layout": "compact", "out": SMALL}, ["of layout compact", "allowed: int32 [1, at least 1]"]),
    ([0, 1], {"out": SMALL}, ["the boundaries do not fit", "int32[3] for 2 documents", "int32 of at least 4"]),
]


@pytest.mark.parametrize(("documents", "options", "words"), BAD)
def test_bad_input_is_refused(arena: TokenArena, documents: Any, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PackingError) as caught:
        collate(arena, documents, **options)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_buffers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(PackingError, match="unknown layout"):
        Buffers.of("int16", 8, 1)  # type: ignore[arg-type]
    for positions, documents, name in ((0, 1, "positions"), (8, -1, "documents")):
        with pytest.raises(PackingError, match=f"{name} is out of range"):
            Buffers.of("int32", positions, documents)
