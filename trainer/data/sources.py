"""What the user calls a source (a file, a folder, a dataset on the Hub) to rows and to a record of what was read.

Locating and reading are two steps, so that every path of a config can be checked, and every file hashed, before the
first row is read. Nothing here interprets a row.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data import hub
from trainer.data.files import READERS, data_extension, known_extension, read_file
from trainer.errors import DataError, nearest
from trainer.fingerprint import file_digest
from trainer.samples import Record, SourceInfo

HUB_PREFIX = "hub:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One located source.

    ``location`` is what the user wrote. ``sha256`` covers names and contents of the files; for the Hub it covers
    repository, commit, subset and split, which fix the content. ``records`` may be called again and again; each call
    reads from the start.
    """

    location: str
    sha256: str
    records: Callable[[], Iterator[Record]]
    files: tuple[Path, ...] = ()
    revision: str = ""
    license: str = ""

    def info(self, rows: int) -> SourceInfo:
        """What lineage and card say about it; ``rows`` is the number of rows that were read."""
        return SourceInfo(
            name=Path(self.location).name if self.files else self.location.removeprefix(HUB_PREFIX),
            location=self.location,
            sha256=self.sha256,
            rows=rows,
            revision=self.revision,
            license=self.license,
        )


def find_source(location: str, *, revision: str | None, cache: Path, split: str) -> Source:
    """Locate ``location``: a data file, a folder of them, or ``hub:ORG/NAME[/SUBSET][:SPLIT]``.

    ``revision`` (branch, tag, commit) and ``split`` (used where the location names none) are for the Hub only; the
    revision is resolved to a commit here. Relative paths are those of the working directory.

    Raises:
        DataError: nothing there, unknown extension, folder without data or with other things in it, unknown or
            unreachable Hub dataset.
    """
    if location.startswith(HUB_PREFIX):
        return _hub_source(location, revision=revision, cache=cache, split=split)
    path = Path(location).expanduser()
    if path.is_dir():
        files = _files_of_folder(path, location)
    elif path.is_file():
        data_extension(path, location)
        files = (path,)
    else:
        raise _missing(path, location)
    names = [location if path.is_file() else f"{location.rstrip('/')}/{file.name}" for file in files]

    def records() -> Iterator[Record]:
        for file, name in zip(files, names, strict=True):
            yield from read_file(file, name=name)

    return Source(location=location, sha256=_content_hash(files), records=records, files=files)


def read_source(
    location: str, *, revision: str | None = None, cache: Path, split: str = "train"
) -> tuple[list[Record], SourceInfo]:
    """All rows of one source (``find_source``) and its description."""
    source = find_source(location, revision=revision, cache=cache, split=split)
    rows = list(source.records())
    return rows, source.info(len(rows))


def read_sources(
    locations: Sequence[str], *, revision: str | None = None, cache: Path, split: str = "train"
) -> tuple[list[Record], list[SourceInfo]]:
    """All rows of several sources, in the order given. All are located before the first is read.

    Raises:
        DataError: as ``find_source`` and ``read_file``; or a file is named twice.
    """
    sources = [find_source(location, revision=revision, cache=cache, split=split) for location in locations]
    _refuse_repeats(sources)
    rows: list[Record] = []
    infos: list[SourceInfo] = []
    for source in sources:
        before = len(rows)
        rows.extend(source.records())
        infos.append(source.info(len(rows) - before))
    return rows, infos


def _refuse_repeats(sources: Iterable[Source]) -> None:
    seen: dict[Path, str] = {}
    for source in sources:
        for file in source.files:
            first = seen.get(file.resolve())
            if first is not None:
                raise DataError(
                    "is named twice", where=str(file), got=f"in '{first}' and in '{source.location}'",
                    do="name it once; data.mixture repeats rows by weight",
                )  # fmt: skip
            seen[file.resolve()] = source.location


def _files_of_folder(folder: Path, location: str) -> tuple[Path, ...]:
    """The data files directly in ``folder``. Documents about the data may stand beside them, and nothing else."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = tuple(entry for entry in entries if entry.is_file() and known_extension(entry))
    others = [entry.name for entry in entries if entry not in files and not _is_document(entry)]
    if files and not others:
        return files
    raise DataError(
        "holds more than data files, and nothing is left out in silence" if files else "is a folder without data files",
        where=location,
        got=", ".join(others[:8]) or "an empty folder",
        allowed=f"{' '.join(READERS)}, and documents (.md, LICENSE, NOTICE)",
        do="move them away, or name the files one by one" if files else "name the folder that directly holds the files",
    )


def _is_document(entry: Path) -> bool:
    return entry.is_file() and (entry.suffix.lower() == ".md" or entry.stem.upper() in ("LICENSE", "NOTICE", "README"))


def _missing(path: Path, location: str) -> DataError:
    looks_like_hub = location.count("/") == 1 and not path.suffix
    hub_advice = f"for a dataset on the Hub write {HUB_PREFIX}{location}" if looks_like_hub else ""
    folder = path.parent
    if not folder.is_dir():
        existing = next(parent for parent in path.absolute().parents if parent.is_dir())
        got = f"its folder is missing too; {existing} is the nearest one"
        return DataError("does not exist", where=location, got=got, do=hub_advice or "check the path")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() or known_extension(entry))
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return DataError(
        "does not exist",
        where=location,
        got=f"{folder.resolve()} has {shown or 'no data files'}",
        do=nearest(path.name, names) or hub_advice or "check the path",
    )


def _content_hash(files: Sequence[Path]) -> str:
    """sha256 over the sha256 of each file and its name, so that a renamed file in a folder counts as a change."""
    whole = hashlib.sha256()
    for file in files:
        content = file_digest(file)
        if len(files) == 1:
            return content
        whole.update(f"{content}  {file.name}\n".encode())
    return whole.hexdigest()


def _hub_source(location: str, *, revision: str | None, cache: Path, split: str) -> Source:
    name = hub.parse(location, default_split=split)
    dataset = hub.resolve(name, revision=revision, cache=cache)
    identity = f"{name.repository}@{dataset.commit}/{name.subset or ''}:{name.split}"

    def records() -> Iterator[Record]:
        return hub.records(dataset, cache=cache, shown=location)

    return Source(
        location=location,
        sha256=hashlib.sha256(identity.encode()).hexdigest(),
        records=records,
        revision=dataset.commit,
        license=dataset.license,
    )
