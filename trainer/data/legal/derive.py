"""From the package to the rows of six tasks in three frozen splits.

No row occurs twice, no training row is near a test row, and no licence family is in two splits, so a score on the test
rows is a score on agreements that the model has never seen. The splits of a known release of the package are pinned
by a hash: a change of this code that would move a single row is refused.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.legal.families import family_of_licenses, largest
from trainer.data.legal.reading import Package, read_package
from trainer.data.legal.similarity import contained, near_duplicates, shingles
from trainer.data.legal.tasks import INSTRUCTIONS, Candidate, candidates
from trainer.data.splits import SPLITS, SplitName
from trainer.errors import DataError

VERSION = 1
"""Changes whenever this code would derive other rows; part of the cache key."""

FROZEN = {"32.1.0": "9a69ea6d8d1df6340b7d90e730346d42a2439b9b6dc800c47f4f2ec9b23b8262"}
"""Release of licensedcode-data -> sha256 over "id split" of all rows, sorted."""

_ONE_RIGHT_ANSWER = frozenset({"clause_type", "governing_law", "license_category"})
_SAME_START = 400
_NEAR_DUPLICATE = 0.7
_LEAKED = 0.5
_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]")


@dataclass(frozen=True, slots=True, kw_only=True)
class LegalRow:
    """One row as it is stored; ``family``, ``category`` and ``source`` say where it comes from."""

    id: str
    task: str
    split: SplitName
    prompt: str
    answer: str
    label: str | None
    heading: str | None
    license_key: str
    family: str
    category: str
    source: str


def derive(data: Path, *, release: str) -> list[LegalRow]:
    """All rows out of the ``licensedcode/data`` folder, in a fixed shuffled order.

    Raises:
        DataError: the package is incomplete, or the rows are not the frozen ones of ``release``.
    """
    package = read_package(data)
    families = family_of_licenses(package.licenses.values())
    unique = _thin(_one_per_text(candidates(package)))
    always_train = largest(families, 3)
    splits: list[SplitName] = [_split_of(families[row.license_key], always_train) for row in unique]
    rows = [_finish(row, split, families, package) for row, split in zip(*_decontaminate(unique, splits), strict=True)]
    rows.sort(key=lambda pair: pair[0])
    final = [row for _, row in rows]
    check_frozen(final, release)
    return final


def check_frozen(rows: Sequence[LegalRow], release: str) -> None:
    """Refuse rows of a known ``release`` that differ from the pinned ones.

    Raises:
        DataError: ids or splits differ.
    """
    expected, found = FROZEN.get(release), splits_hash(rows)
    if expected is not None and found != expected:
        raise DataError(
            "the built-in legal rows are not the frozen ones",
            where=f"licensedcode-data {release}",
            got=f"{len(rows)} rows with the hash {found[:12]}",
            allowed=f"the hash {expected[:12]}",
            do="install the package again: pip install --force-reinstall licensedcode-data",
        )


def splits_hash(rows: Iterable[LegalRow]) -> str:
    """sha256 over the sorted lines "id split"."""
    lines = sorted(f"{row.id} {row.split}\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _one_per_text(rows: Iterable[Candidate]) -> list[Candidate]:
    """One row per task and beginning of the text; a licence's own file wins over a rule.

    Where the same text has different answers and only one can be right, none is kept.
    """
    groups: dict[tuple[str, str], list[Candidate]] = defaultdict(list)
    for row in rows:
        groups[row.task, _NOT_ALPHANUMERIC.sub("", row.text.lower())[:_SAME_START]].append(row)
    kept: list[Candidate] = []
    for (task, _), group in groups.items():
        if task in _ONE_RIGHT_ANSWER and len({row.answer.lower() for row in group}) > 1:
            continue
        kept.append(min(group, key=lambda row: (not row.source.startswith("licenses"), row.source)))
    return kept


def _thin(rows: Sequence[Candidate]) -> list[Candidate]:
    """Leave out near copies within each task; a hash decides which of several comes first."""
    kept: list[Candidate] = []
    for task in sorted(INSTRUCTIONS):
        ordered = sorted((row for row in rows if row.task == task), key=lambda row: number_of(row.source + row.text))
        if ordered:
            repeated = near_duplicates(shingles([row.text for row in ordered]), jaccard=_NEAR_DUPLICATE)
            kept.extend(row for row, again in zip(ordered, repeated, strict=True) if not again)
    return kept


def _split_of(family: str, always_train: frozenset[str]) -> SplitName:
    """75 / 10 / 15 by a hash of the family; ``always_train`` are too large to hold out."""
    place = number_of(f"v1:{family}") % 100
    if family in always_train or place >= 25:
        return "train"
    return "test" if place < 15 else "validation"


def _decontaminate(rows: Sequence[Candidate], splits: Sequence[SplitName]) -> tuple[list[Candidate], list[SplitName]]:
    """Leave out training rows that are near a held-out row of any task, and validation rows near a test row."""
    sets = shingles([row.text for row in rows])
    where = {name: np.flatnonzero(np.asarray(splits) == name) for name in SPLITS}
    held_out = np.concatenate([where["validation"], where["test"]])
    leaked = np.zeros(len(rows), dtype=np.bool_)
    leaked[where["train"]] = contained(sets[where["train"]], sets[held_out], containment=_LEAKED)
    leaked[where["validation"]] = contained(sets[where["validation"]], sets[where["test"]], containment=_LEAKED)
    clean = np.flatnonzero(~leaked).tolist()
    return [rows[position] for position in clean], [splits[position] for position in clean]


def _finish(row: Candidate, split: SplitName, families: Mapping[str, str], package: Package) -> tuple[int, LegalRow]:
    """The row as it is stored, and the number that gives it its place."""
    turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.answer}]
    finished = LegalRow(
        id=f"{row.task}-{number_of(row.source + json.dumps(turns)):012x}",
        task=row.task,
        split=split,
        prompt=row.prompt,
        answer=row.answer,
        label=row.label,
        heading=row.heading,
        license_key=row.license_key,
        family=families[row.license_key],
        category=package.licenses[row.license_key].category,
        source=row.source,
    )
    return number_of(f"o{row.source}{row.task}{row.text}"), finished


def number_of(text: str) -> int:
    """48 bits of sha256: the same order and the same splits on every machine."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
