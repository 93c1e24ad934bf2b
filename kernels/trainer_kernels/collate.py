"""A pack of documents becomes the arrays of one micro-batch, in one pass over its tokens.

The labels come out shifted: ``labels[t]`` is what position t has to predict, and never the first token of the next
document. No model or loss has to shift, so none can shift wrongly. Boundaries, the longest segment and the number of
targets are known here as host numbers, so nothing on a device has to be waited for.

The ``compact`` layout is what has to cross to a device: ids with the loss bit, 4 bytes a token; the rest is derived
there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray

from trainer_kernels.arena import ID_MASK, NO_LOSS, TokenArena
from trainer_kernels.compiled import compiled
from trainer_kernels.errors import PackingError

Layout = Literal["int64", "int32", "compact"]

IGNORE = -100
"""The label of a position that is not trained: torch's ``ignore_index``."""

_NO_LOSS = np.int32(NO_LOSS)
_ID_MASK = np.int32(ID_MASK)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedBatch:
    """One micro-batch of T positions, as int64 or int32 arrays of shape [T].

    ``labels[t]`` is the id of token t + 1 if that is a target of the same document, else -100. ``position_ids`` start
    at 0 in every segment. ``cu_seqlens`` int32[k + 1]: where segments begin, and T; the pad tail, if there is one, is
    the last segment. ``max_seqlen``: the longest segment, the pad tail included. ``num_tokens``, ``num_targets`` and
    ``num_documents`` do not count padding.
    """

    input_ids: NDArray[np.int32] | NDArray[np.int64]
    labels: NDArray[np.int32] | NDArray[np.int64]
    position_ids: NDArray[np.int32] | NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    max_seqlen: int
    num_tokens: int
    num_targets: int
    num_documents: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CompactBatch:
    """The same micro-batch in 4 bytes a token; ``reference.expand`` says what it stands for.

    ``tokens`` int32[T]: ids, with bit 31 set where the token is no target. It is set on the first token of every
    document and on padding, so ``labels[t]`` is ``tokens[t + 1]`` if that is >= 0, else -100. The rest is as in
    ``PackedBatch``.
    """

    tokens: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    max_seqlen: int
    num_tokens: int
    num_targets: int
    num_documents: int


@overload
def collate(
    arena: TokenArena,
    documents: NDArray[np.integer] | Sequence[int],
    *,
    pad_to: int | None = None,
    layout: Literal["int64", "int32"] = "int64",
    pad_id: int = 0,
) -> PackedBatch: ...


@overload
def collate(
    arena: TokenArena,
    documents: NDArray[np.integer] | Sequence[int],
    *,
    pad_to: int | None = None,
    layout: Literal["compact"],
    pad_id: int = 0,
) -> CompactBatch: ...


def collate(
    arena: TokenArena,
    documents: NDArray[np.integer] | Sequence[int],
    *,
    pad_to: int | None = None,
    layout: Layout = "int64",
    pad_id: int = 0,
) -> PackedBatch | CompactBatch:
    """One micro-batch of ``documents`` (ids, in this order), filled up to ``pad_to`` positions with ``pad_id``.

    No documents: a batch of padding only, of ``pad_to`` or 1 positions. Raises ``PackingError`` for ids outside the
    arena, more tokens than ``pad_to``, and an unknown layout.
    """
    ids = _document_ids(arena, documents)
    starts, lengths, muted = arena.starts[ids], arena.lengths[ids], arena.muted[ids]
    cu_seqlens, num_tokens = _boundaries(lengths, pad_to)
    size = int(cu_seqlens[-1])
    if not 0 <= pad_id <= ID_MASK:
        raise PackingError(
            "pad_id is out of range", got=pad_id, allowed=f"0 to {ID_MASK}", do="give the tokenizer's pad token id"
        )
    longest = int(np.diff(cu_seqlens).max())
    tokens = _plain(arena.tokens)
    if layout == "compact":
        compact = np.empty(size, np.int32)
        targets = _fill_compact(tokens, starts, lengths, muted, np.int32(pad_id), compact)
        return CompactBatch(
            tokens=compact,
            cu_seqlens=cu_seqlens,
            max_seqlen=longest,
            num_tokens=num_tokens,
            num_targets=targets,
            num_documents=len(ids),
        )
    if layout not in get_args(Layout):
        raise PackingError(
            "unknown layout", got=repr(layout), allowed=", ".join(get_args(Layout)), do="choose a layout of the batch"
        )
    dtype = np.dtype(layout)
    input_ids, labels, position_ids = np.empty(size, dtype), np.empty(size, dtype), np.empty(size, dtype)
    targets = _fill(tokens, starts, lengths, muted, np.int32(pad_id), input_ids, labels, position_ids)
    return PackedBatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
        max_seqlen=longest,
        num_tokens=num_tokens,
        num_targets=targets,
        num_documents=len(ids),
    )


def _document_ids(arena: TokenArena, documents: NDArray[np.integer] | Sequence[int]) -> NDArray[np.int64]:
    ids = np.asarray(documents)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise PackingError(
            "documents must be a list of document ids",
            got=f"{ids.dtype} of shape {ids.shape}",
            allowed="whole numbers in one dimension",
            do="give one pack of a schedule",
        )
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < arena.num_documents):
        raise PackingError(
            "there is no such document",
            got=f"ids from {int(ids.min())} to {int(ids.max())}",
            allowed=f"0 to {arena.num_documents - 1}",
            do="use the arena that the plan was made for",
        )
    return ids.astype(np.int64)


def _boundaries(lengths: NDArray[np.int32], pad_to: int | None) -> tuple[NDArray[np.int32], int]:
    """``cu_seqlens`` with the pad tail, and the number of real tokens."""
    count = len(lengths)
    total = int(lengths.sum(dtype=np.int64))
    size = max(total, 1) if pad_to is None else pad_to
    if not max(total, 1) <= size < (1 << 31):
        raise PackingError(
            "the documents do not fit in the batch",
            got=f"{total} tokens in {count} documents, pad_to={pad_to}",
            allowed=f"{max(total, 1)} to {(1 << 31) - 1} positions",
            do="pad to the capacity that the documents were packed for",
        )
    padded = size > total
    cu_seqlens = np.zeros(count + 1 + padded, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1 : count + 1])
    if padded:
        cu_seqlens[-1] = size
    return cu_seqlens, total


def _plain(tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """The same memory as a read-only array of the base class: one machine code for files and memory."""
    view = np.asarray(tokens).view()
    view.flags.writeable = False
    return view


@compiled
def _fill(
    tokens: NDArray[np.int32],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int32],
    muted: NDArray[np.int32],
    pad_id: np.int32,
    input_ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    position_ids: NDArray[np.int64],
) -> int:
    """Write one batch; returns its number of targets."""
    filled = 0
    targets = 0
    for document in range(starts.size):
        length = np.int64(lengths[document])
        source = tokens[starts[document] : starts[document] + length]
        ids = input_ids[filled : filled + length]
        wanted = labels[filled : filled + length]
        positions = position_ids[filled : filled + length]
        for t in range(length):
            ids[t] = source[t] & _ID_MASK
            positions[t] = t
        context = min(max(np.int64(muted[document]) - 1, 0), length - 1)
        for t in range(context):
            wanted[t] = IGNORE
        for t in range(context, length - 1):
            following = source[t + 1]
            wanted[t] = following if following >= 0 else IGNORE
            targets += following >= 0
        wanted[length - 1] = IGNORE
        filled += length
    for t in range(input_ids.size - filled):
        input_ids[filled + t] = pad_id
        labels[filled + t] = IGNORE
        position_ids[filled + t] = t
    return targets


@compiled
def _fill_compact(
    tokens: NDArray[np.int32],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int32],
    muted: NDArray[np.int32],
    pad_id: np.int32,
    out: NDArray[np.int32],
) -> int:
    """Write one compact batch; returns its number of targets."""
    filled = 0
    targets = 0
    for document in range(starts.size):
        length = np.int64(lengths[document])
        source = tokens[starts[document] : starts[document] + length]
        place = out[filled : filled + length]
        context = min(max(np.int64(muted[document]), 1), length)
        for t in range(context):
            place[t] = source[t] | _NO_LOSS
        for t in range(context, length):
            place[t] = source[t]
            targets += source[t] >= 0
        filled += length
    for t in range(filled, out.size):
        out[t] = pad_id | _NO_LOSS
    return targets
