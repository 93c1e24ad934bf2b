"""All rows of a run: read, understood, split, gated and chosen, with an account of every one that was left out.

The order matters and is kept here in one place. Rows are split before they are thinned or repeated, so that no copy of
a row lands in another split; gates come before anything is chosen, so that a limit does not hide a leak; the frozen
record is taken in between, so that a limit on the test rows does not look like another test.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainer.config import DataConfig, TaskConfig
from trainer.data.checks import Checked, Finding, check_rows, label_of, refuse_if_too_many
from trainer.data.dropped import merge
from trainer.data.formats import RowOptions, format_rows, unique_ids
from trainer.data.legal.store import legal_records
from trainer.data.mixture import MixedPart, mix
from trainer.data.smoke import smoke_records
from trainer.data.sources import read_source, read_sources
from trainer.data.splits import SPLITS, SplitName, Splits, make_splits, take
from trainer.fingerprint import digest
from trainer.samples import Conversation, Dropped, Record, SourceInfo

_BUILTIN_COLUMNS = {"legal": ("label", "family"), "smoke": ("label", None)}
"""Columns of the built-in rows with label and group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Rows as read: each part of the training rows apart (one part unless there is a mixture)."""

    train: list[list[Record]]
    validation: list[Record]
    test: list[Record]
    sources: list[SourceInfo]
    dropped: list[Dropped] = field(default_factory=list[Dropped])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of a run.

    ``gated``: all that passed the gates, before limits and mixture (what is frozen). ``splits``: those that are used;
    in a mixture a training row may occur several times. ``balance``: split to label to rows of those, for
    classification. ``shapes``: file to recognised shape.
    """

    gated: Splits
    splits: Splits
    labels: list[str]
    dropped: list[Dropped]
    findings: list[Finding]
    balance: dict[str, dict[str, int]]
    shapes: dict[str, str]
    ignored: list[str]
    mixture: list[MixedPart]
    sources: list[SourceInfo]


def gather_rows(data: DataConfig, task: TaskConfig, *, cache: Path) -> Rows:
    """Read, format, split, gate, mix and limit the rows that the config names.

    Raises:
        DataError: a source, a row, a split or a gate; ``data.max_dropped_share`` is exceeded.
    """
    read = _read(data, cache)
    options = _row_options(data)
    dropped, shapes, ignored = [read.dropped], dict[str, str](), list[str]()

    def formatted(records: Sequence[Record]) -> list[Conversation]:
        result = format_rows(records, options)
        dropped.append(result.dropped)
        shapes.update(result.shapes)
        ignored.extend(result.ignored)
        return result.conversations

    *parts, validation, test = unique_ids([formatted(part) for part in (*read.train, read.validation, read.test)])
    total = sum(map(len, read.train)) + len(read.validation) + len(read.test)
    total += sum(item.count for item in read.dropped)
    refuse_if_too_many(merge(*dropped), total, data.max_dropped_share)
    checked = _split_and_check(parts, validation, test, data, task)
    refuse_if_too_many(merge(*dropped, checked.dropped), total, data.max_dropped_share)
    used, mixture = _choose(checked.splits, parts, data)
    return Rows(
        gated=checked.splits,
        splits=used,
        labels=checked.labels,
        dropped=merge(*dropped, checked.dropped),
        findings=checked.findings,
        balance=_balance(used) if task.name == "classification" else {},
        shapes=shapes,
        ignored=sorted(set(ignored)),
        mixture=mixture,
        sources=read.sources,
    )


def _balance(splits: Splits) -> dict[str, dict[str, int]]:
    return {name: dict(sorted(Counter(map(label_of, rows)).items())) for name, rows in splits.items() if rows}


def rows_digest(rows: Sequence[Conversation]) -> str:
    """Return a digest of the content, names and order of ``rows``."""
    return digest([[row.id, str(row.origin), _content(row)] for row in rows])


def _content(row: Conversation) -> list[object]:
    turns = [[turn.role, turn.content, list(turn.tool_calls), turn.name] for turn in row.messages]
    return [turns, list(row.tools), row.text, row.answer, row.label, dict(row.slices)]


def _read(data: DataConfig, cache: Path) -> Read:
    if data.kind == "smoke":
        smoke = {name: smoke_records(name) for name in SPLITS}
        sources = [_smoke_source(name, smoke[name]) for name in SPLITS]
        return Read(train=[smoke["train"]], validation=smoke["validation"], test=smoke["test"], sources=sources)
    if data.kind == "legal":
        legal = {
            name: legal_records(data.tasks, name, cache=cache, max_characters=data.max_characters) for name in SPLITS
        }
        return Read(
            train=[legal["train"].records],
            validation=legal["validation"].records,
            test=legal["test"].records,
            sources=[rows.source for rows in legal.values()],
            dropped=merge(*(rows.dropped for rows in legal.values())),
        )
    return _read_files(data, cache)


def _read_files(data: DataConfig, cache: Path) -> Read:
    sources: list[SourceInfo] = []
    parts: list[list[Record]] = []
    for part in data.mixture:
        records, source = read_source(part.path, revision=data.revision, cache=cache)
        parts.append(records)
        sources.append(source)
    locations: dict[SplitName, list[str]] = {"train": data.train, "validation": data.validation, "test": data.test}
    given: dict[SplitName, list[Record]] = {}
    for name in SPLITS:
        given[name], found = read_sources(locations[name], revision=data.revision, cache=cache, split=name)
        sources += found
    train = parts or [given["train"]]
    return Read(train=train, validation=given["validation"], test=given["test"], sources=sources)


def _smoke_source(name: SplitName, records: list[Record]) -> SourceInfo:
    return SourceInfo(
        name=f"smoke/{name}",
        location="made on the spot",
        sha256=digest([dict(record.fields) for record in records]),
        rows=len(records),
        license="Apache-2.0",
    )


def _row_options(data: DataConfig) -> RowOptions:
    label, group = _BUILTIN_COLUMNS.get(data.kind, (None, None))
    return RowOptions(
        format=data.format,
        columns=data.columns,
        system=data.system,
        label_column=data.label_column or label,
        group_column=data.group_column or group,
        slice_columns=data.slice_columns,
    )


def _split_and_check(
    parts: list[list[Conversation]],
    validation: list[Conversation],
    test: list[Conversation],
    data: DataConfig,
    task: TaskConfig,
) -> Checked:
    splits = make_splits(
        [row for part in parts for row in part],
        validation,
        test,
        validation_share=data.validation_share,
        test_share=data.test_share,
        seed=data.split_seed,
        task_name=task.name,
    )
    return check_rows(splits, task_name=task.name, labels=task.labels, max_dropped_share=data.max_dropped_share)


def _choose(splits: Splits, parts: list[list[Conversation]], data: DataConfig) -> tuple[Splits, list[MixedPart]]:
    """Mix the parts of the training rows and apply the limits on rows."""
    train, report = splits.train, list[MixedPart]()
    if data.mixture:
        part_of = {row.id: number for number, part in enumerate(parts) for row in part}
        kept: list[list[Conversation]] = [[] for _ in parts]
        for row in splits.train:
            kept[part_of[row.id]].append(row)
        weighted = [(rows, part.weight) for rows, part in zip(kept, data.mixture, strict=True)]
        mixed = mix(weighted, data.split_seed)
        train, report = mixed.rows, mixed.parts
    chosen = replace(
        splits,
        train=take(train, data.max_train_rows, seed=data.split_seed),
        validation=take(splits.validation, data.max_validation_rows, seed=data.split_seed),
        test=take(splits.test, data.max_test_rows, seed=data.split_seed),
    )
    return chosen, report
