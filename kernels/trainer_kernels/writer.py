"""Writes token arenas: document by document, in bounded memory, and never half.

An arena is written beside its place and renamed: it is there whole, or not at all, whatever happens to the machine.
"""

import hashlib
import json
import os
import secrets
import shutil
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from trainer_kernels.arena import (
    ARENA_FORMAT,
    ID_MASK,
    INDEX,
    KIND,
    META,
    NO_LOSS,
    TOKENS,
    TokenArena,
    arena_hash,
    file_hash,
)
from trainer_kernels.errors import ArenaError

TOKEN_BYTES = 4
WRITTEN_AT_ONCE = 1 << 22
"""Bytes of tokens. The system keeps what is written in pages as large as one write fills: in huge ones (2 MiB), tokens
at random places are read in three quarters of the time, because it looks up fewer pages. Only a hint: other file
systems and systems keep small ones."""


class ArenaWriter:
    """Writes a new arena at folder ``path``, document by document, in bounded memory.

    Use it as a context manager; ``close`` publishes. Leaving the block by an exception, or without ``close``,
    publishes nothing. If another process publishes the same content first, that arena is used.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        if self._path.exists():
            raise ArenaError(
                "the place of the new arena is taken",
                got=self._path,
                allowed="a path that does not exist",
                do="open the arena that is there, or remove the folder",
            )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self._path.parent / f".{self._path.name}.partial-{secrets.token_hex(8)}"
        self._partial.mkdir()
        file = open(self._partial / TOKENS, "wb", buffering=WRITTEN_AT_ONCE)  # noqa: SIM115  (closed at the end)
        self._file: BinaryIO = file
        self._hash = hashlib.sha256()
        self._stored = 0
        self._index = {"starts": array("q"), "lengths": array("i"), "muted": array("i"), "targets": array("i")}
        self._state = "open"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._state == "open":
            self._abandon()
            if kind is None:
                raise ArenaError(
                    "the arena was left without close()",
                    got=f"{len(self._index['starts'])} documents, now discarded",
                    allowed="close() inside the with block",
                    do="call close(meta) after the last document",
                )

    def add(
        self,
        input_ids: NDArray[np.integer] | Sequence[int],
        loss_mask: NDArray[np.bool_] | Sequence[bool],
        views: Sequence[tuple[int, int, int]] | None = None,
    ) -> None:
        """Store one run of tokens and the documents seen in it.

        ``input_ids`` int[n], ids in ``[0, 2**31)``, n >= 1. ``loss_mask`` bool[n]: True where the token itself is
        learnt. ``views``: ``(start, length, muted)`` per document, relative to this run; None is the whole run.
        """
        self._must_be_open()
        ids, mask = _checked_run(input_ids, loss_mask)
        spans = [(0, len(ids), 0)] if views is None else list(views)
        for start, length, muted in spans:
            if not (start >= 0 and 1 <= length <= len(ids) - start and 0 <= muted <= length):
                raise ArenaError(
                    "a view does not lie in its run of tokens",
                    got=f"start {start}, length {length}, muted {muted} of {len(ids)} tokens",
                    allowed="0 <= start, 1 <= length, start + length <= n, 0 <= muted <= length",
                    do="cut views inside the tokens they belong to",
                )
        raw = np.where(mask, ids, ids | NO_LOSS).astype("<i4").tobytes()
        room = WRITTEN_AT_ONCE - self._stored * TOKEN_BYTES % WRITTEN_AT_ONCE
        self._file.write(raw[:room])
        if len(raw) >= room:
            self._file.flush()  # so that every write begins at a multiple of its size
            self._file.write(raw[room:])
        self._hash.update(raw)
        for start, length, muted in spans:
            self._index["starts"].append(self._stored + start)
            self._index["lengths"].append(length)
            self._index["muted"].append(muted)
            self._index["targets"].append(int(np.count_nonzero(mask[start + max(1, muted) : start + length])))
        self._stored += len(ids)

    def close(self, meta: Mapping[str, Any] | None = None) -> TokenArena:
        """Publish the arena with ``meta`` (JSON values) and open it. Raises ``ArenaError`` when it has no document."""
        self._must_be_open()
        try:
            note = json.dumps(dict(meta or {}), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ArenaError(
                "the note of the arena is not JSON", got=error, allowed="JSON values", do="convert it before close()"
            ) from error
        if not self._index["starts"]:
            raise ArenaError(
                "an arena needs documents", got="none", allowed="at least 1", do="check which rows were dropped"
            )
        sha256 = self._write_index(json.loads(note))
        _sync(self._partial)
        self._state = "closed"
        try:
            os.rename(self._partial, self._path)
        except OSError:
            shutil.rmtree(self._partial, ignore_errors=True)
            if not self._path.exists():
                raise
            return TokenArena.open(self._path, sha256, verify=False)
        _sync(self._path.parent)
        return TokenArena.open(self._path, sha256, verify=False)

    def _write_index(self, note: dict[str, Any]) -> str:
        """Finish ``tokens.bin``, write the index and ``meta.json``; returns the arena's hash."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        hashes = {TOKENS: self._hash.hexdigest()}
        for name, dtype in INDEX.items():
            file = self._partial / f"{name}.npy"
            with open(file, "wb") as stream:
                np.save(stream, np.array(self._index[name], dtype), allow_pickle=False)
                stream.flush()
                os.fsync(stream.fileno())
            hashes[file.name] = file_hash(file)
        sha256 = arena_hash(hashes)
        record = {
            "kind": KIND,
            "format": ARENA_FORMAT,
            "sha256": sha256,
            "num_documents": len(self._index["starts"]),
            "num_tokens": sum(self._index["lengths"]),
            "num_targets": sum(self._index["targets"]),
            "files": {
                name: {"bytes": (self._partial / name).stat().st_size, "sha256": digest}
                for name, digest in hashes.items()
            },
            "meta": note,
        }
        with open(self._partial / META, "w", encoding="utf-8") as stream:
            json.dump(record, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        return sha256

    def _must_be_open(self) -> None:
        if self._state != "open":
            raise ArenaError(
                "the writer has ended", got=self._state, allowed="add() and close() once", do="make another writer"
            )

    def _abandon(self) -> None:
        self._state = "abandoned"
        with suppress(OSError):  # what waits in the buffer may not fit on the disk either
            self._file.close()
        shutil.rmtree(self._partial, ignore_errors=True)


def _checked_run(
    input_ids: NDArray[np.integer] | Sequence[int], loss_mask: NDArray[np.bool_] | Sequence[bool]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    ids = np.asarray(input_ids)
    mask = np.asarray(loss_mask)
    if (
        ids.ndim != 1
        or len(ids) == 0
        or ids.dtype.kind not in "iu"
        or mask.dtype != np.bool_
        or mask.shape != ids.shape
    ):
        raise ArenaError(
            "tokens and their loss mask do not fit",
            got=f"ids {ids.dtype}{list(ids.shape)}, mask {mask.dtype}{list(mask.shape)}",
            allowed="integer ids [n] and a bool mask [n], n >= 1",
            do="give one bool per token, and leave empty rows out",
        )
    if int(ids.min()) < 0 or int(ids.max()) > ID_MASK:
        raise ArenaError(
            "a token id does not fit in 31 bits",
            got=f"{int(ids.min())} to {int(ids.max())}",
            allowed=f"0 to {ID_MASK}",
            do="use the ids of the tokenizer; mark ignored tokens in the loss mask",
        )
    return ids.astype(np.int64), mask


def _sync(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
