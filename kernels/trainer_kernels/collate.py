"""A pack of documents becomes the arrays of one micro-batch, in one pass over its tokens.

The labels come out shifted: ``labels[t]`` is what position t has to predict, and never the first token of the next
document. No model or loss has to shift, so none can shift wrongly. Boundaries, the longest segment and the number of
targets are known here as host numbers, so nothing on a device has to be waited for.

The ``compact`` layout is what has to cross to a device: ids with the loss bit, 4 bytes a token; the rest is derived
there.

Fresh memory costs more than filling it: the system hands it out page by page, cleared. So batches can be written to
``Buffers`` that are used again and again, and may be pinned. The lock of the interpreter is released while tokens are
copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from trainer_kernels.arena import ID_MASK, NO_LOSS, TokenArena
from trainer_kernels.checks import whole
from trainer_kernels.compiled import compiled, prefetch
from trainer_kernels.errors import PackingError

Layout = Literal["int64", "int32", "compact"]
Documents = NDArray[np.integer] | Sequence[int]

IGNORE = -100
"""The label of a position that is not trained: torch's ``ignore_index``."""

MAX_POSITIONS = (1 << 31) - 1
"""Boundaries are int32."""

_ROWS: dict[str, tuple[int, np.dtype[Any]]] = {
    "int64": (3, np.dtype(np.int64)),
    "int32": (3, np.dtype(np.int32)),
    "compact": (1, np.dtype(np.int32)),
}
HEAD = 64
"""Tokens of the next document that are asked for early. Documents are at random places, and a processor sees that
memory is read in a row only after a few lines of it; for the lines after these it needs no help."""
LINE = 16
"""Tokens of one line of the cache."""

_NO_LOSS = np.int32(NO_LOSS)
_ID_MASK = np.int32(ID_MASK)


@dataclass(frozen=True, slots=True, eq=False)
class Buffers:
    """Memory for one batch: ``rows`` [3, T] int64 or int32 (ids, labels, positions), or [1, T] int32 for ``compact``.

    ``cu_seqlens`` int32[k], with two places more than the most documents of a batch. A batch takes the front of each.
    """

    rows: NDArray[np.int64] | NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]

    @classmethod
    def of(cls, layout: Layout, positions: int, documents: int) -> "Buffers":
        """Ordinary memory for batches of up to so many positions and documents."""
        count, dtype = _rows_of(layout)
        whole("positions", positions, 1, MAX_POSITIONS)
        whole("documents", documents, 0, MAX_POSITIONS)
        return cls(np.zeros((count, positions), dtype), np.zeros(documents + 2, np.int32))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Segments:
    """What all layouts have in common.

    ``cu_seqlens`` int32[k + 1]: where segments begin, and T; the pad tail, if there is one, is the last segment.
    ``max_seqlen``: the longest segment, the pad tail included. ``num_tokens``, ``num_targets`` and ``num_documents`` do
    not count padding.
    """

    cu_seqlens: NDArray[np.int32]
    max_seqlen: int
    num_tokens: int
    num_targets: int
    num_documents: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedBatch(_Segments):
    """One micro-batch of T positions, as int64 or int32 arrays of shape [T].

    ``labels[t]`` is the id of token t + 1 if that is a target of the same document, else -100. ``position_ids`` start
    at 0 in every segment.
    """

    input_ids: NDArray[np.int32] | NDArray[np.int64]
    labels: NDArray[np.int32] | NDArray[np.int64]
    position_ids: NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CompactBatch(_Segments):
    """The same micro-batch in 4 bytes a token; ``reference.expand`` says what it stands for.

    ``tokens`` int32[T]: ids, with bit 31 set where the token is no target. It is set on the first token of every
    document and on padding, so ``labels[t]`` is ``tokens[t + 1]`` if that is >= 0, else -100.
    """

    tokens: NDArray[np.int32]


@overload
def collate(
    arena: TokenArena,
    documents: Documents,
    *,
    pad_to: int | None = None,
    layout: Literal["int64", "int32"] = "int64",
    pad_id: int = 0,
    align: int = 1,
    out: Buffers | None = None,
) -> PackedBatch: ...


@overload
def collate(
    arena: TokenArena,
    documents: Documents,
    *,
    pad_to: int | None = None,
    layout: Literal["compact"],
    pad_id: int = 0,
    align: int = 1,
    out: Buffers | None = None,
) -> CompactBatch: ...


@overload
def collate(
    arena: TokenArena,
    documents: Documents,
    *,
    pad_to: int | None = None,
    layout: Layout,
    pad_id: int = 0,
    align: int = 1,
    out: Buffers | None = None,
) -> PackedBatch | CompactBatch: ...


def collate(
    arena: TokenArena,
    documents: Documents,
    *,
    pad_to: int | None = None,
    layout: Layout = "int64",
    pad_id: int = 0,
    align: int = 1,
    out: Buffers | None = None,
) -> PackedBatch | CompactBatch:
    """One micro-batch of ``documents`` (ids, in this order), filled up to ``pad_to`` positions with ``pad_id``.

    No documents: a batch of padding only, of ``pad_to`` or ``align`` positions. ``align``: every segment is made a
    multiple of it, a document's by padding behind it that belongs to its segment: no target, positions go on, and no
    token of the document can see it under a causal mask. ``out``: the batch is written there and its arrays are views
    of it, until the next batch is.

    Raises ``PackingError`` for ids outside the arena, more tokens than ``pad_to`` or ``out`` have room for, an unknown
    layout, and options out of range.
    """
    count, dtype = _rows_of(layout)
    whole("pad_id", pad_id, 0, ID_MASK)
    whole("align", align, 1, MAX_POSITIONS)
    ids = _document_ids(documents)
    bounds = np.empty(len(ids) + 2, np.int32) if out is None else _room_for_boundaries(out, len(ids))
    num_tokens, used, longest = _set_boundaries(arena.lengths, ids, align, bounds)
    if used < 0:
        raise _no_such_document(ids, arena)
    size = _padded_size(used, pad_to, align, len(ids))
    segments = len(ids)
    if size > used:
        segments += 1
        bounds[segments] = size
        longest = max(longest, size - used)
    rows = np.empty((count, size), dtype) if out is None else _room_for_rows(out, layout, size)
    tokens, starts, muted, bounds = arena.tokens, arena.starts, arena.muted, bounds[: segments + 1]
    if layout == "compact":
        compact = rows[0, :size]
        targets = _fill_compact(tokens, starts, arena.lengths, muted, ids, bounds, pad_id, compact)
        return CompactBatch(
            tokens=compact,  # type: ignore[arg-type]  (int32, by the layout)
            cu_seqlens=bounds,
            max_seqlen=longest,
            num_tokens=num_tokens,
            num_targets=targets,
            num_documents=len(ids),
        )
    input_ids, labels, position_ids = rows[0, :size], rows[1, :size], rows[2, :size]
    targets = _fill(tokens, starts, arena.lengths, muted, ids, bounds, pad_id, input_ids, labels, position_ids)
    return PackedBatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        cu_seqlens=bounds,
        max_seqlen=longest,
        num_tokens=num_tokens,
        num_targets=targets,
        num_documents=len(ids),
    )


def _rows_of(layout: str) -> tuple[int, np.dtype[Any]]:
    if layout not in _ROWS:
        raise PackingError(
            "unknown layout", got=repr(layout), allowed=", ".join(_ROWS), do="choose a layout of the batch"
        )
    return _ROWS[layout]


def _document_ids(documents: Documents) -> NDArray[np.int64]:
    ids = np.asarray(documents)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise PackingError(
            "documents must be a list of document ids",
            got=f"{ids.dtype} of shape {ids.shape}",
            allowed="whole numbers in one dimension",
            do="give one pack of a schedule",
        )
    return ids.astype(np.int64)


def _no_such_document(ids: NDArray[np.int64], arena: TokenArena) -> PackingError:
    return PackingError(
        "there is no such document",
        got=f"ids from {int(ids.min())} to {int(ids.max())}",
        allowed=f"0 to {arena.num_documents - 1}",
        do="use the arena that the plan was made for",
    )


def _padded_size(used: int, pad_to: int | None, align: int, documents: int) -> int:
    least = max(used, align)
    size = least if pad_to is None else pad_to
    if not least <= size <= MAX_POSITIONS or size % align:
        raise PackingError(
            "the documents do not fit in the batch",
            got=f"{used} tokens in {documents} documents, pad_to={pad_to}, align={align}",
            allowed=f"{least} to {MAX_POSITIONS} positions, a multiple of {align}",
            do="pad to the capacity that the documents were packed for",
        )
    return size


def _room_for_boundaries(out: Buffers, documents: int) -> NDArray[np.int32]:
    bounds = out.cu_seqlens
    if bounds.dtype != np.int32 or bounds.ndim != 1 or len(bounds) < documents + 2:
        raise PackingError(
            "the boundaries do not fit in the buffers",
            got=f"cu_seqlens {bounds.dtype}{list(bounds.shape)} for {documents} documents",
            allowed=f"int32 of at least {documents + 2}",
            do="make buffers for the most documents of a pack",
        )
    return bounds


def _room_for_rows(out: Buffers, layout: Layout, size: int) -> NDArray[Any]:
    count, dtype = _ROWS[layout]
    rows = out.rows
    if rows.dtype != dtype or rows.ndim != 2 or rows.shape[0] != count or rows.shape[1] < size:
        raise PackingError(
            "the batch does not fit in the buffers",
            got=f"rows {rows.dtype}{list(rows.shape)} for {size} positions of layout {layout}",
            allowed=f"{dtype} [{count}, at least {size}]",
            do="make buffers of the same layout for as many positions as batches have",
        )
    return rows


@compiled
def _set_boundaries(
    lengths: NDArray[np.int32], documents: NDArray[np.int64], align: int, cu_seqlens: NDArray[np.int32]
) -> tuple[int, int, int]:
    """Tokens, positions with alignment, and the longest segment; positions are negative if a document is not there."""
    tokens = used = longest = 0
    cu_seqlens[0] = 0
    for index in range(documents.size):
        document = documents[index]
        if document < 0 or document >= lengths.size:
            return 0, -1, 0
        length = int(lengths[document])
        segment = (length + align - 1) // align * align
        tokens += length
        used += segment
        longest = max(longest, segment)
        cu_seqlens[index + 1] = min(used, MAX_POSITIONS)
    return tokens, used, longest


@compiled
def _ask_for_head(
    tokens: NDArray[np.int32],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int32],
    documents: NDArray[np.int64],
    index: int,
) -> None:
    """The beginning of the document at place ``index``, if there is one, is fetched while the one before is copied."""
    if index < documents.size:
        start = starts[documents[index]]
        for t in range(0, min(np.int64(lengths[documents[index]]), HEAD), LINE):
            prefetch(tokens, start + t)


@compiled
def _fill(
    tokens: NDArray[np.int32],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int32],
    muted: NDArray[np.int32],
    documents: NDArray[np.int64],
    cu_seqlens: NDArray[np.int32],
    pad_id: int,
    input_ids: NDArray[Any],
    labels: NDArray[Any],
    position_ids: NDArray[Any],
) -> int:
    """Write one batch; returns its number of targets. Segments after the documents are padding."""
    targets = 0
    for index in range(cu_seqlens.size - 1):
        begin, end = np.int64(cu_seqlens[index]), np.int64(cu_seqlens[index + 1])
        length = 0
        context = 0
        start = 0
        if index < documents.size:
            document = documents[index]
            _ask_for_head(tokens, starts, lengths, documents, index + 1)
            length = np.int64(lengths[document])
            context = min(max(np.int64(muted[document]) - 1, 0), length - 1)
            start = starts[document]
        source = tokens[start : start + length]
        ids, wanted, positions = input_ids[begin:end], labels[begin:end], position_ids[begin:end]
        for t in range(length):
            ids[t] = source[t] & _ID_MASK
        for t in range(ids.size):
            positions[t] = t
        following, target = source[context + 1 :], wanted[context:]
        for t in range(following.size):
            target[t] = following[t] if following[t] >= 0 else IGNORE
            targets += following[t] >= 0
        wanted[:context] = IGNORE
        target[following.size :] = IGNORE
        ids[length:] = pad_id
    return targets


@compiled
def _fill_compact(
    tokens: NDArray[np.int32],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int32],
    muted: NDArray[np.int32],
    documents: NDArray[np.int64],
    cu_seqlens: NDArray[np.int32],
    pad_id: int,
    out: NDArray[Any],
) -> int:
    """Write one compact batch; returns its number of targets."""
    targets = 0
    padding = np.int32(pad_id) | _NO_LOSS
    for index in range(documents.size):
        document = documents[index]
        _ask_for_head(tokens, starts, lengths, documents, index + 1)
        length = np.int64(lengths[document])
        source = tokens[starts[document] : starts[document] + length]
        place = out[cu_seqlens[index] : cu_seqlens[index + 1]]
        context = min(max(np.int64(muted[document]), 1), length)
        for t in range(length):
            place[t] = source[t]
            targets += source[t] >= 0
        for t in range(context):
            targets -= place[t] >= 0
            place[t] |= _NO_LOSS
        place[length:] = padding
    out[cu_seqlens[documents.size] :] = padding
    return targets
