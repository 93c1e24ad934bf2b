"""The built-in legal rows, derived once per release of the package and kept as Parquet files with a data card.

The folder is published by one rename, so that two runs that start together cannot see half of it, and its files are
checked when they are read.
"""

import functools
import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.legal.card import ATTRIBUTION, LICENSE, data_card
from trainer.data.legal.derive import VERSION, LegalRow, derive, splits_hash
from trainer.data.legal.tasks import INSTRUCTIONS, shorten
from trainer.data.splits import SPLITS, SplitName
from trainer.errors import DataError, nearest
from trainer.fingerprint import digest, file_digest, package_digest
from trainer.paths import fresh_folder, fsync_directory
from trainer.samples import Dropped, Origin, Record, SourceInfo

TASKS: tuple[str, ...] = tuple(INSTRUCTIONS)
"""clause_type clause_heading defined_terms governing_law copyright_holder license_category"""

DISTRIBUTION = "licensedcode-data"
CUT_AWAY = "answer cut away by data.max_characters"

_MANIFEST = "manifest.json"
_FIRST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LegalRows:
    """Rows of one split, what had to be left out of them, and the source for lineage and card.

    Fields of a record: ``id``, ``task``, ``messages`` (user, assistant), ``answer``, ``label`` (None where a task has
    none), ``heading``, ``license_key``, ``family``, ``category``, ``source`` (file in the package), ``split``. The
    origin is the row of the stored table, ``legal/clause_type/train:17``.
    """

    records: list[Record]
    dropped: list[Dropped]
    source: SourceInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is in the folder: the release it was derived from, the hash of the splits, and each file's sha256."""

    release: str
    package_sha256: str
    derivation: int
    splits_sha256: str
    files: dict[str, str]


def legal_records(
    tasks: Sequence[str], split: SplitName, *, cache: Path, max_characters: int | None = None
) -> LegalRows:
    """The rows of ``tasks`` in ``split``, in the order of ``tasks``; derived on first use (about 10 s), then cached.

    ``max_characters`` cuts the clause in the prompt, never the instruction before it. The answer of ``defined_terms``
    becomes the terms that the shorter text still defines; a row whose answer is cut away is left out and counted.

    Raises:
        DataError: unknown or repeated task, package not installed, damaged cache.
    """
    check_tasks(tasks)
    folder = ensure_derived(cache)
    manifest = _read_manifest(folder)
    records: list[Record] = []
    cut_away: list[Origin] = []
    for task in tasks:
        for number, row in enumerate(_read_table(folder, manifest, f"{task}/{split}.parquet"), start=1):
            origin = Origin(f"legal/{task}/{split}", number)
            instruction = INSTRUCTIONS[task]
            short = shorten(task, row.prompt.removeprefix(instruction), row.answer, max_characters)
            if short is None:
                cut_away.append(origin)
            else:
                text, answer = short
                records.append(Record(_fields(row, prompt=instruction + text, answer=answer), origin))
    first = [str(origin) for origin in cut_away[:_FIRST]]
    return LegalRows(
        records=records,
        dropped=[Dropped(reason=CUT_AWAY, count=len(cut_away), first=first)] if cut_away else [],
        source=SourceInfo(
            name=DISTRIBUTION,
            location=f"package {DISTRIBUTION} {manifest.release}: {', '.join(tasks)}",
            sha256=manifest.package_sha256,
            rows=len(records),
            revision=manifest.release,
            license=LICENSE,
            attribution=ATTRIBUTION,
        ),
    )


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse what is not a list of different built-in tasks.

    Raises:
        DataError: none, an unknown one (the nearest is named), or one twice.
    """
    allowed = ", ".join(TASKS)
    if not tasks:
        raise DataError("no built-in task is named", where="data.tasks", allowed=allowed)
    for task in tasks:
        if task not in INSTRUCTIONS:
            raise DataError(
                "is not a built-in task", where="data.tasks", got=task, allowed=allowed, do=nearest(task, TASKS)
            )
    twice = [task for task, count in Counter(tasks).items() if count > 1]
    if twice:
        raise DataError("a task is named twice", where="data.tasks", got=", ".join(twice), do="name it once")


def ensure_derived(cache: Path) -> Path:
    """The folder ``legal-<digest>`` below ``cache``, derived now if it is not there.

    Raises:
        DataError: the package is not installed or not as it was released.
    """
    release, data = installed()
    package = installed_digest()
    folder = cache.expanduser() / f"legal-{digest([package, VERSION])[:16]}"
    if not folder.is_dir():
        publish(derive(data, release=release), folder, release=release, package_sha256=package)
    return folder


def installed() -> tuple[str, Path]:
    """Release and ``licensedcode/data`` folder of the installed package.

    Raises:
        DataError: it is not installed.
    """
    try:
        found = distribution(DISTRIBUTION)
    except PackageNotFoundError:
        raise DataError(
            f"the built-in legal data needs the package {DISTRIBUTION}, which is not installed",
            where="data.kind=legal",
            do=f"make assets\n  or: {sys.executable} -m pip install '{DISTRIBUTION}>=32.1'",
        ) from None
    return found.version, Path(str(found.locate_file("licensedcode/data")))


@functools.cache
def installed_digest() -> str:
    """Digest of the installed package; it lists 37 000 files, so once per process is enough."""
    return package_digest(DISTRIBUTION)


def publish(rows: Sequence[LegalRow], folder: Path, *, release: str, package_sha256: str) -> None:
    """Write ``rows``, manifest and data card beside ``folder`` and rename them into place.

    Raises:
        OSError: no space, no permission; nothing is left behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = fresh_folder(folder.parent, f".{folder.name}.")
    try:
        files = {name: _write_table(stage / name, part) for name, part in _tables(rows).items()}
        manifest = Manifest(
            release=release,
            package_sha256=package_sha256,
            derivation=VERSION,
            splits_sha256=splits_hash(rows),
            files=files,
        )
        _write(stage / "README.md", data_card(rows, release=release, splits_sha256=manifest.splits_sha256).encode())
        _write(stage / _MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        for task in TASKS:
            fsync_directory(stage / task)
        fsync_directory(stage)
        _rename(stage, folder)
        fsync_directory(folder.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _rename(stage: Path, folder: Path) -> None:
    """Put ``stage`` in place; another process that was faster wrote the same rows, so that is no failure."""
    try:
        stage.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _tables(rows: Sequence[LegalRow]) -> dict[str, list[LegalRow]]:
    tables: dict[str, list[LegalRow]] = {f"{task}/{split}.parquet": [] for task in TASKS for split in SPLITS}
    for row in rows:
        tables[f"{row.task}/{row.split}.parquet"].append(row)
    return tables


_SCHEMA = pa.schema([(name, pa.string()) for name in LegalRow.__dataclass_fields__])


def _write_table(path: Path, rows: Sequence[LegalRow]) -> str:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=_SCHEMA), path)
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return file_digest(path)


def _write(path: Path, raw: bytes) -> None:
    with path.open("wb") as handle:
        handle.write(raw)
        handle.flush()
        os.fsync(handle.fileno())


def _read_manifest(folder: Path) -> Manifest:
    try:
        return msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise _damaged(folder, _MANIFEST) from error


def _read_table(folder: Path, manifest: Manifest, name: str) -> list[LegalRow]:
    try:
        raw = (folder / name).read_bytes()
    except OSError as error:
        raise _damaged(folder, name) from error
    if hashlib.sha256(raw).hexdigest() != manifest.files.get(name):
        raise _damaged(folder, name)
    return [LegalRow(**fields) for fields in pq.read_table(pa.BufferReader(raw)).to_pylist()]


def _damaged(folder: Path, name: str) -> DataError:
    return DataError(
        "the cached legal data is damaged", where=str(folder / name), do=f"remove it, it is made again: rm -r {folder}"
    )


def _fields(row: LegalRow, *, prompt: str, answer: str) -> dict[str, object]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    fields = asdict(row)
    del fields["prompt"]
    return {**fields, "answer": answer, "messages": turns}
