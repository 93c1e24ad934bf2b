"""One data file to records that remember their file and line, because a bad row must be found again by its user.

Text formats are read line by line, so a file may be larger than memory (a .json array is the exception: it has to be
read whole). Every reader refuses what it does not understand and names file and line; nothing is skipped but blank
lines.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.errors import DataError, nearest
from trainer.samples import Origin, Record

Reader = Callable[[Path, str], Iterator[Record]]

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SHOWN = 60


def read_file(path: Path, *, name: str | None = None) -> Iterator[Record]:
    """Yield the rows of one data file in order.

    ``name`` is what origins and messages call the file (its path when not given). ``Origin.row`` counts from 1: the
    line in .jsonl, .ndjson and .csv (of the row's start; the header of a .csv is line 1), the item in .json and
    .parquet. A ``.gz`` after a text format is unpacked on the fly.

    Raises:
        DataError: unknown extension, unreadable or empty file, not UTF-8, a line that is not JSON, a row that is not
            an object.
    """
    shown = name or str(path)
    reader = READERS[data_extension(path, shown)]
    rows = 0
    try:
        for record in reader(path, shown):
            rows += 1
            yield record
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            "cannot be read", where=shown, got=error.strerror or error, do="check the permissions"
        ) from error
    if rows == 0:
        raise DataError("has no rows", where=shown, got=f"{size} bytes", do="give a file with rows")


def data_extension(path: Path, shown: str) -> str:
    """The extension that chooses the reader (``.jsonl``, ``.csv.gz``, ...).

    Raises:
        DataError: no reader for it.
    """
    extension = known_extension(path)
    if extension is not None:
        return extension
    raise DataError(
        "is of an unknown format",
        where=shown,
        got=path.suffix or "no extension",
        allowed=" ".join(READERS),
        do=nearest(path.suffix, tuple(READERS)) or "convert it, for example to .jsonl with one object per line",
    )


def known_extension(path: Path) -> str | None:
    """As ``data_extension``, but None for a file that is not data."""
    lowered = path.name.lower()
    return next((known for known in READERS if lowered.endswith(known)), None)


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path, shown: str) -> Iterator[tuple[int, str]]:
    """Line numbers (from 1) and lines, line ends kept; strict UTF-8, a byte order mark at the start is left out."""
    offset = 0
    with _open(path) as handle:
        try:
            for number, raw in enumerate(handle, start=1):
                if number == 1:
                    _refuse_utf16(raw, shown)
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"line {number} is not UTF-8",
                        where=f"{shown}:{number}",
                        got=f"byte 0x{raw[error.start]:02x} at offset {offset + error.start} of the file",
                        do=f"convert it, for example: {_iconv('WINDOWS-1252', shown)}",
                    ) from error
                offset += len(raw)
                yield number, line.removeprefix("\ufeff") if number == 1 else line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                "is a damaged gzip file", where=shown, got=error, do="copy it again; gzip -t checks it"
            ) from error


def _refuse_utf16(first_line: bytes, shown: str) -> None:
    if first_line.startswith(_UTF16_MARKS):
        mark = first_line[:2].hex(" ")
        raise DataError(
            "is UTF-16, not UTF-8",
            where=shown,
            got=f"the byte order mark {mark}",
            do=f"convert it: {_iconv('UTF-16', shown)}",
        )


def _iconv(encoding: str, shown: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 {shown} > utf8-{Path(shown).name}"


def _read_json_lines(path: Path, shown: str) -> Iterator[Record]:
    for number, line in _lines(path, shown):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            document = number == 1 and line.strip() in ("[", "{")
            raise DataError(
                f"line {number} is not JSON",
                where=f"{shown}:{number}",
                got=f"{_shorten(line)} ({_reason(error)})",
                allowed="one JSON object per line",
                do="if the file is one JSON document, name it .json" if document else "mend or remove the line",
            ) from error
        yield _record(row, Origin(shown, number), may_hold_surrogates=_has_surrogate_escape(line))


def _reason(error: json.JSONDecodeError | RecursionError) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"


def _read_json(path: Path, shown: str) -> Iterator[Record]:
    text = "".join(line for _, line in _lines(path, shown))
    if not text.strip():
        return
    try:
        document: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        lines = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        raise DataError(
            f"line {line} is not JSON",
            where=f"{shown}:{line}",
            got=_reason(error),
            allowed='one list of objects, or {"data": [...]}',
            do="if the file has one object per line, name it .jsonl" if lines else "mend the file",
        ) from error
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    if not isinstance(document, list):
        keys = ", ".join(document) if isinstance(document, dict) else ""
        raise DataError(
            "is not a list of rows",
            where=shown,
            got=f"an object with the keys {_shorten(keys)}" if keys else _kind(document),
            allowed='one list of objects, or {"data": [...]}',
            do="write the rows as a list, or as .jsonl with one object per line",
        )
    escapes = _has_surrogate_escape(text)
    for number, row in enumerate(document, start=1):
        yield _record(row, Origin(shown, number), may_hold_surrogates=escapes)


def _read_csv(path: Path, shown: str) -> Iterator[Record]:
    # The limit guards a parser against a file that is not CSV; a long document in a cell is ordinary here.
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader((line for _, line in _lines(path, shown)), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in rows:
            origin = Origin(shown, start)
            start = rows.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(cells, origin)
            elif len(cells) != len(header):
                raise DataError(
                    f"line {origin.row} has another number of columns than the header",
                    where=str(origin),
                    got=f"{len(cells)} columns",
                    allowed=f"{len(header)}: {', '.join(header)}",
                    do='quote cells that hold commas or line breaks: "like, this"',
                )
            else:
                yield Record(dict(zip(header, cells, strict=True)), origin)
    except csv.Error as error:
        raise DataError(
            f"line {start} is not CSV",
            where=f"{shown}:{start}",
            got=error,
            allowed='comma-separated cells, quoted with "',
            do="mend the quotes, or write the data as .jsonl",
        ) from error


def _header(cells: list[str], origin: Origin) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) < len(names) or "" in names:
        raise DataError(
            "the header has two columns of one name, or a column without a name",
            where=str(origin),
            got=", ".join(f"'{name}'" for name in names),
            do="give every column its own name",
        )
    return names


def _read_parquet(path: Path, shown: str) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, Origin(shown, number))
    except pa.ArrowException as error:
        raise DataError(
            "is not a readable Parquet file",
            where=shown,
            got=f"after row {number}: {_shorten(str(error))}",
            do="copy it or write it again",
        ) from error


def _record(row: object, origin: Origin, *, may_hold_surrogates: bool) -> Record:
    if not isinstance(row, Mapping):
        raise DataError(
            f"row {origin.row} is not an object",
            where=str(origin),
            got=f"{_kind(row)}: {_shorten(json.dumps(row))}",
            allowed='{"column": value, ...}',
            do='name its columns, for example {"text": "..."}',
        )
    if may_hold_surrogates:
        _refuse_lone_surrogates(row, origin)
    return Record(cast(Mapping[str, Any], row), origin)


def _has_surrogate_escape(raw: str) -> bool:
    """Whether JSON text escapes a surrogate; a lone one is half a character, which UTF-8 and tokenizers cannot hold."""
    return "\\ud" in raw or "\\uD" in raw


def _refuse_lone_surrogates(row: object, origin: Origin) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"row {origin.row} holds half of a character",
            where=str(origin),
            got=f"the lone surrogate \\u{ord(error.object[error.start]):04x}",
            do="write the text again from its source; something cut it inside a character",
        ) from error


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {
        list: "a list",
        dict: "an object",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names[type(value)]


def _shorten(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN else flat[: _SHOWN - 1] + "…"


READERS: dict[str, Reader] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".jsonl.gz": _read_json_lines,
    ".ndjson.gz": _read_json_lines,
    ".json.gz": _read_json,
    ".csv.gz": _read_csv,
}
"""What can be read, by extension."""
