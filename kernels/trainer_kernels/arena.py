"""All tokens of a split in one memory-mapped file, tokenised once and read by every rank of a machine.

A token is an int32: the id in bits 0 to 30, and bit 31 SET when the token is not to be learnt. So the loss mask costs
no second file and no second read. A document is a view (start, length) into the tokens; views may overlap, which is how
a long row becomes overlapping chunks: the ``muted`` first tokens of a chunk are context, learnt in the chunk before.

A folder, made by ``writer.py``, holds ``tokens.bin`` (little-endian int32), one ``.npy`` file per index array and
``meta.json``. Nothing in it is ever unpickled.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

TOKENS = "tokens.bin"
META = "meta.json"
INDEX = {"starts": "<i8", "lengths": "<i4", "muted": "<i4", "targets": "<i4"}


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


@dataclass(frozen=True, slots=True)
class _Record:
    """``meta.json`` after all checks of its form."""

    sha256: str
    num_documents: int
    num_tokens: int
    sizes: dict[str, int]
    hashes: dict[str, str]
    meta: dict[str, Any]


def _read_record(folder: Path) -> _Record:
    try:
        text = (folder / META).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArenaError(
            "there is no arena", got=folder, allowed=f"a folder with {META}", do="prepare the data"
        ) from error
    try:
        record = json.loads(text)
        kind, version = record["kind"], record["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / META, f"not the record of an arena ({error!r})") from error
    if (kind, version) != (KIND, ARENA_FORMAT):
        raise ArenaError(
            f"{folder} is of another format",
            got=f"{kind}, format {version}",
            allowed=f"{KIND}, format {ARENA_FORMAT}",
            do="prepare the data again with this version",
        )
    try:
        files = record["files"]
        names = [TOKENS, *(f"{name}.npy" for name in INDEX)]
        result = _Record(
            sha256=str(record["sha256"]),
            num_documents=int(record["num_documents"]),
            num_tokens=int(record["num_tokens"]),
            sizes={name: int(files[name]["bytes"]) for name in names},
            hashes={name: str(files[name]["sha256"]) for name in names},
            meta=dict(record["meta"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / META, f"not the record of an arena ({error!r})") from error
    if arena_hash(result.hashes) != result.sha256:
        raise _damaged(folder / META, "its hash is not that of the hashes of its files")
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
        found = file_hash(folder / name)
        if found != expected:
            raise _damaged(folder / name, f"sha256 {found} instead of {expected}")


def _map_files(folder: Path, record: _Record) -> TokenArena:
    index: dict[str, NDArray[Any]] = {}
    for name, dtype in INDEX.items():
        file = folder / f"{name}.npy"
        try:
            values = np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError as error:  # numpy's own words recommend unpickling
            raise _damaged(file, "not a plain array of numbers") from error
        if values.dtype != np.dtype(dtype) or values.shape != (record.num_documents,):
            raise _damaged(file, f"{values.dtype}{list(values.shape)} instead of {dtype}[{record.num_documents}]")
        index[name] = np.asarray(values)  # the same memory, without the slow indexing of np.memmap
    return TokenArena(
        path=folder,
        tokens=np.asarray(np.memmap(folder / TOKENS, dtype="<i4", mode="r")),
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


def arena_hash(hashes: dict[str, str]) -> str:
    """The hash of an arena, of those of its files."""
    content = json.dumps({"kind": KIND, "format": ARENA_FORMAT, "files": hashes}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def file_hash(file: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
