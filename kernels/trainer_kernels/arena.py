"""All tokens of a split in one memory-mapped file, tokenised once and read by every rank of a machine.

A token is an int32: the id in bits 0 to 30, and bit 31 SET when the token is not to be learnt. So the loss mask costs
no second file and no second read. A document is a view (start, length) into the tokens; views may overlap, which is how
a long row becomes overlapping chunks: the ``muted`` first tokens of a chunk are context, learnt in the chunk before.

A folder holds ``tokens.bin`` (little-endian int32), one ``.npy`` file per index array and ``meta.json``. It is written
beside its place and renamed: it is there whole, or not at all. Nothing in it is ever unpickled.
"""

import hashlib
import json
import os
import secrets
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from trainer_kernels.errors import ArenaError

ARENA_FORMAT = 1
"""Raised whenever files of an older version would be read wrongly."""

KIND = "trimtab-token-arena"
NO_LOSS = -(1 << 31)
"""Bit 31 of an int32: ``tokens & NO_LOSS`` is not zero where the token is not learnt."""
ID_MASK = (1 << 31) - 1
"""``tokens & ID_MASK`` are the ids."""

_TOKENS = "tokens.bin"
_META = "meta.json"
_INDEX = {"starts": "<i8", "lengths": "<i4", "muted": "<i4", "targets": "<i4"}


@dataclass(frozen=True, slots=True, eq=False)
class TokenArena:
    """Documents of one split, read-only. Make one with ``ArenaWriter``, read it with ``TokenArena.open``.

    ``tokens`` int32, memory-mapped: ids with the loss bit. Document ``i`` is the ``lengths[i]`` tokens from
    ``starts[i]`` on; its token ``t`` is a target when ``t >= 1``, ``t >= muted[i]`` and bit 31 is clear; ``targets[i]``
    counts these. ``num_tokens`` is the sum of ``lengths``: what one epoch reads (overlaps count twice). ``sha256``
    covers tokens and index, not ``meta``, which is what the writer noted.
    """

    path: Path
    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    muted: NDArray[np.int32]
    targets: NDArray[np.int32]
    num_tokens: int
    sha256: str
    meta: dict[str, Any]

    @property
    def num_documents(self) -> int:
        """How many documents there are (at least 1)."""
        return len(self.starts)

    @property
    def num_targets(self) -> int:
        """Targets of all documents: what one epoch learns."""
        return int(self.targets.sum(dtype=np.int64))

    def document(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """``(ids int32[n], target bool[n])`` of document ``i``, for people and tests; batches come from ``collate``."""
        if not 0 <= i < self.num_documents:
            raise ArenaError(
                "there is no such document",
                got=i,
                allowed=f"0 to {self.num_documents - 1}",
                do="ask for a document of this arena",
            )
        raw = self.tokens[self.starts[i] : self.starts[i] + self.lengths[i]]
        target = raw >= 0
        target[: max(1, int(self.muted[i]))] = False
        return raw & np.int32(ID_MASK), target

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], expect_sha256: str | None = None, *, verify: bool | None = None
    ) -> "TokenArena":
        """Map the arena in folder ``path``. Sizes, counts and the range of every view are always checked.

        ``expect_sha256``: refuse another arena than this. ``verify``: read all files and compare their hashes; by
        default done when ``expect_sha256`` is given. Raises ``ArenaError``.
        """
        folder = Path(path)
        record = _read_record(folder)
        if expect_sha256 is not None and record.sha256 != expect_sha256:
            raise ArenaError(
                f"{folder} is another arena than the one that was prepared",
                got=record.sha256,
                allowed=expect_sha256,
                do="prepare the data again; do not exchange arenas under a run",
            )
        _check_sizes(folder, record.sizes)
        if verify or (verify is None and expect_sha256 is not None):
            _check_hashes(folder, record.hashes)
        arena = _map_files(folder, record)
        _check_views(arena)
        return arena


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
        self._file: BinaryIO = open(self._partial / _TOKENS, "wb")  # noqa: SIM115  (closed by close or _abandon)
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
        self._file.write(raw)
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
        hashes = {_TOKENS: self._hash.hexdigest()}
        for name, dtype in _INDEX.items():
            file = self._partial / f"{name}.npy"
            with open(file, "wb") as stream:
                np.save(stream, np.array(self._index[name], dtype), allow_pickle=False)
                stream.flush()
                os.fsync(stream.fileno())
            hashes[file.name] = _file_hash(file)
        sha256 = _arena_hash(hashes)
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
        with open(self._partial / _META, "w", encoding="utf-8") as stream:
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
        self._file.close()
        shutil.rmtree(self._partial, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Record:
    """``meta.json`` after all checks of its form."""

    sha256: str
    num_documents: int
    num_tokens: int
    sizes: dict[str, int]
    hashes: dict[str, str]
    meta: dict[str, Any]


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


def _read_record(folder: Path) -> _Record:
    try:
        text = (folder / _META).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArenaError(
            "there is no arena", got=folder, allowed=f"a folder with {_META}", do="prepare the data"
        ) from error
    try:
        record = json.loads(text)
        kind, version = record["kind"], record["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / _META, f"not the record of an arena ({error!r})") from error
    if (kind, version) != (KIND, ARENA_FORMAT):
        raise ArenaError(
            f"{folder} is of another format",
            got=f"{kind}, format {version}",
            allowed=f"{KIND}, format {ARENA_FORMAT}",
            do="prepare the data again with this version",
        )
    try:
        files = record["files"]
        names = [_TOKENS, *(f"{name}.npy" for name in _INDEX)]
        result = _Record(
            sha256=str(record["sha256"]),
            num_documents=int(record["num_documents"]),
            num_tokens=int(record["num_tokens"]),
            sizes={name: int(files[name]["bytes"]) for name in names},
            hashes={name: str(files[name]["sha256"]) for name in names},
            meta=dict(record["meta"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / _META, f"not the record of an arena ({error!r})") from error
    if _arena_hash(result.hashes) != result.sha256:
        raise _damaged(folder / _META, "its hash is not that of the hashes of its files")
    return result


def _check_sizes(folder: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except FileNotFoundError as error:
            raise _damaged(folder / name, "the file is missing") from error
        if found != size:
            raise _damaged(folder / name, f"{found} bytes instead of {size}")


def _check_hashes(folder: Path, hashes: dict[str, str]) -> None:
    for name, expected in hashes.items():
        found = _file_hash(folder / name)
        if found != expected:
            raise _damaged(folder / name, f"sha256 {found} instead of {expected}")


def _map_files(folder: Path, record: _Record) -> TokenArena:
    index: dict[str, NDArray[Any]] = {}
    for name, dtype in _INDEX.items():
        file = folder / f"{name}.npy"
        try:
            values = np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError as error:  # numpy's own words recommend unpickling
            raise _damaged(file, "not a plain array of numbers") from error
        if values.dtype != np.dtype(dtype) or values.shape != (record.num_documents,):
            raise _damaged(file, f"{values.dtype}{list(values.shape)} instead of {dtype}[{record.num_documents}]")
        index[name] = values
    return TokenArena(
        path=folder,
        tokens=np.memmap(folder / _TOKENS, dtype="<i4", mode="r"),
        starts=index["starts"],
        lengths=index["lengths"],
        muted=index["muted"],
        targets=index["targets"],
        num_tokens=record.num_tokens,
        sha256=record.sha256,
        meta=record.meta,
    )


def _check_views(arena: TokenArena) -> None:
    """Compiled code reads what the index names without looking: so no view may leave the file."""
    starts, lengths = arena.starts, arena.lengths
    inside = int(starts.min()) >= 0 and int(lengths.min()) >= 1 and int((starts + lengths).max()) <= len(arena.tokens)
    muted = int(arena.muted.min()) >= 0 and bool((arena.muted <= lengths).all())
    if not (inside and muted and int(lengths.sum(dtype=np.int64)) == arena.num_tokens):
        raise _damaged(arena.path, "its index names tokens that are not there")


def _damaged(file: Path, how: str) -> ArenaError:
    return ArenaError(
        f"the arena is damaged: {file}",
        got=how,
        allowed="the files as written",
        do="remove the folder and prepare again",
    )


def _arena_hash(hashes: dict[str, str]) -> str:
    content = json.dumps({"kind": KIND, "format": ARENA_FORMAT, "files": hashes}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _file_hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
