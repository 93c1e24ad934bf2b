"""What is only sent when it is asked for: predictions of the test rows as tables, and the files of an export."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from trainer.fingerprint import digest, file_digest
from trainer.markers import read_marker
from trainer.paths import RunFolder
from trainer.redaction import redact

COLUMNS = ("id", "answer", "text", "correct")


@dataclass(frozen=True, slots=True)
class Table:
    """Predictions of one model: ``rows`` of texts under ``COLUMNS``; ``digest`` of them."""

    name: str
    rows: list[list[str]]
    digest: str


@dataclass(frozen=True, slots=True)
class Weights:
    """An export: its folder and the digest of its files."""

    folder: Path
    digest: str


def tables_of(folder: RunFolder) -> list[Table]:
    """The predictions that are there, with every secret replaced."""
    tables: list[Table] = []
    for path in sorted(folder.evaluation.glob("*.predictions.jsonl")):
        lines = [msgspec.json.decode(line, type=dict[str, object]) for line in path.read_bytes().splitlines()]
        rows = [[redact(_text(line, name)) for name in COLUMNS] for line in lines]
        tables.append(Table(path.name.removesuffix(".predictions.jsonl"), rows, digest(rows)))
    return tables


def _text(line: Mapping[str, object], name: str) -> str:
    value = line.get(name)
    return "" if value is None else str(value)


def weights_of(folder: RunFolder) -> Weights | None:
    """The adapter, or the merged model where there is none; None before the export is finished."""
    if read_marker(folder, "export") is None:
        return None
    for export in (folder.adapter, folder.merged):
        files = sorted(path for path in export.glob("*") if path.is_file())
        if files:
            return Weights(export, digest({path.name: file_digest(path) for path in files}))
    return None
