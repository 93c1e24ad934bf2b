"""Training, validation and test rows: made once, reproducibly, so that what was tested was never trained on.

Rows of one group never fall into different splits, nor do rows with the same text, whatever the shuffle. Made splits
are stratified by label and frozen to a file, so that a later run can prove that it was tested on the same rows.
"""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from trainer.data.mixture import apportion
from trainer.errors import DataError, Problem
from trainer.paths import write_atomic
from trainer.samples import Conversation

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """The rows of the three splits, each in the order of its sources; validation and test may be empty."""

    train: list[Conversation]
    validation: list[Conversation]
    test: list[Conversation]

    def items(self) -> Iterator[tuple[SplitName, list[Conversation]]]:
        """Name and rows of each split."""
        yield "train", self.train
        yield "validation", self.validation
        yield "test", self.test


# --------------------------------------------------------------------------------------------------- identity of rows


def input_key(row: Conversation) -> str:
    """32 hex digits that are equal for rows that ask the same: all before the last assistant turn, or the text.

    White space is not compared.
    """
    if not row.messages:
        return _hash([row.text])
    last = max((n for n, message in enumerate(row.messages) if message.role == "assistant"), default=len(row.messages))
    return _hash(part for message in row.messages[:last] for part in (message.role, message.content))


def whole_key(row: Conversation) -> str:
    """As ``input_key``, for rows that ask and answer the same."""
    if not row.messages:
        return _hash([row.text])
    turns = (part for message in row.messages for part in (message.role, message.content, repr(message.tool_calls)))
    return _hash(turns)


def row_key(task_name: str) -> Callable[[Conversation], str]:
    """What makes two rows "the same" for a task.

    Classification and extraction have one right answer per input, so the input alone decides. Elsewhere (many poems
    for one request) only question and answer together do.
    """
    return input_key if task_name in ("classification", "extraction") else whole_key


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(" ".join(part.split()).encode("utf-8"))
        digest.update(b"\0")
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ making splits


def make_splits(
    train: Sequence[Conversation],
    validation: Sequence[Conversation],
    test: Sequence[Conversation],
    *,
    validation_share: float,
    test_share: float,
    seed: int,
    task_name: str,
) -> Splits:
    """Complete the splits: a validation or test split that is not given (empty) is taken from the training rows.

    A share is that of the training rows; 0 leaves that split empty. Whole groups move (``Conversation.group``; rows
    that are the same for the task count as one group), the largest first, so the largest groups stay in training.
    Labels keep their shares as far as the groups allow. Equal rows and seed give equal splits.

    Raises:
        DataError: a split would be empty, or there are fewer groups than splits.
    """
    shares: dict[SplitName, float] = {
        "validation": 0.0 if validation else validation_share,
        "test": 0.0 if test else test_share,
    }
    shares = {"train": 1.0 - sum(shares.values()), **{name: share for name, share in shares.items() if share > 0}}
    if shares["train"] <= 0:
        raise DataError(
            "the shares leave no rows for training", where="data",
            got=f"validation_share={validation_share}, test_share={test_share}", allowed="a sum below 1",
        )  # fmt: skip
    if len(shares) == 1:
        return Splits(train=list(train), validation=list(validation), test=list(test))
    units = _units(train, row_key(task_name))
    assigned = _assign(units, [row.label for row in train], shares, seed)
    made: dict[SplitName, list[Conversation]] = {name: [] for name in SPLITS}
    for position, row in enumerate(train):
        made[assigned[position]].append(row)
    for name, share in shares.items():
        if not made[name]:
            raise _too_small(name, share, rows=len(train), units=len(units))
    return Splits(
        train=made["train"], validation=made["validation"] or list(validation), test=made["test"] or list(test)
    )


def _units(rows: Sequence[Conversation], key: Callable[[Conversation], str]) -> list[list[int]]:
    """Positions of rows that must stay together: the same group, or the same text, directly or through others."""
    parent = list(range(len(rows)))

    def root(position: int) -> int:
        while parent[position] != position:
            parent[position] = parent[parent[position]]
            position = parent[position]
        return position

    first: dict[tuple[str, str], int] = {}
    for position, row in enumerate(rows):
        names = [("text", key(row))] + ([("group", row.group)] if row.group else [])
        for name in names:
            parent[root(position)] = root(first.setdefault(name, position))
    units: dict[int, list[int]] = defaultdict(list)
    for position in range(len(rows)):
        units[root(position)].append(position)
    return list(units.values())


def _assign(
    units: Sequence[Sequence[int]], labels: Sequence[str], shares: Mapping[SplitName, float], seed: int
) -> dict[int, SplitName]:
    """Give every unit to a split so that rows per label, and rows in all, come near to their shares.

    Greedy on the squared distance of the counts from their targets. Adding c rows to a split that has h of a target t
    changes (h - t)^2 by 2c(h - t) + c^2; c^2 is the same for every split and is left out.
    """
    totals = Counter(labels)
    have: dict[SplitName, Counter[str]] = {name: Counter() for name in shares}
    size: Counter[SplitName] = Counter()
    order = list(units)
    random.Random(seed).shuffle(order)
    order.sort(key=len, reverse=True)
    assigned: dict[int, SplitName] = {}
    for unit in order:
        counts = Counter(labels[position] for position in unit)

        def cost(name: SplitName, counts: Counter[str] = counts, rows: int = len(unit)) -> float:
            by_label = sum(c * (have[name][label] - shares[name] * totals[label]) for label, c in counts.items())
            return by_label + rows * (size[name] - shares[name] * len(labels))

        chosen = min(shares, key=cost)
        have[chosen].update(counts)
        size[chosen] += len(unit)
        assigned.update(dict.fromkeys(unit, chosen))
    return assigned


def _too_small(name: SplitName, share: float, *, rows: int, units: int) -> DataError:
    groups = f" in {units} groups" if units < rows else ""
    keys = {"train": "data.train", "validation": "data.validation", "test": "data.test"}
    return DataError(
        f"the {name} split would be empty",
        where=keys[name],
        got=f"{rows} rows{groups}, of which a share of {share:g} is asked for",
        do=f"give more rows{' and groups' if groups else ''}, a file for {keys[name]}, or another data.{name}_share"
        if name != "train"
        else "give more rows and groups, or smaller shares for validation and test",
    )


def check_groups(splits: Splits) -> None:
    """Refuse given splits that share a group.

    Raises:
        DataError: one problem per pair of splits, with the first groups that are in both.
    """
    groups = {
        name: {row.group: str(row.origin) for row in reversed(rows) if row.group} for name, rows in splits.items()
    }
    problems: list[Problem] = []
    for kept, other in (("test", "train"), ("test", "validation"), ("validation", "train")):
        shared = sorted(groups[kept].keys() & groups[other].keys())
        if shared:
            shown = ", ".join(f"'{g}' ({groups[other][g]} and {groups[kept][g]})" for g in shared[:3])
            problems.append(
                Problem(
                    what=f"{len(shared)} groups are in {other} and in {kept}", where="data.group_column", got=shown,
                    do=f"remove them from one side, or give no data.{kept} and let whole groups be split",
                )
            )  # fmt: skip
    if problems:
        error = DataError(problems[0].what)
        error.problems = tuple(problems)
        error.args = ("\n".join(map(str, problems)),)
        raise error


def take(rows: Sequence[Conversation], limit: int | None, *, seed: int) -> list[Conversation]:
    """At most ``limit`` rows, chosen by ``seed``, in their old order; labels keep their shares.

    Shares are kept, not evened out: balanced classes would teach the model another prior than the one it is tested on.
    A smaller limit does not choose a subset of a larger one's rows.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    by_label: dict[str, list[int]] = defaultdict(list)
    for position, row in enumerate(rows):
        by_label[row.label].append(position)
    # The order decides who gets the last places when many labels have the same remainder.
    labels = sorted(by_label)
    random.Random(seed).shuffle(labels)
    chosen: list[int] = []
    for label, count in zip(labels, apportion([len(by_label[label]) for label in labels], limit), strict=True):
        chosen.extend(random.Random(f"{seed}:{label}").sample(by_label[label], count))
    return [rows[position] for position in sorted(chosen)]


# ----------------------------------------------------------------------------------------------------------- freezing


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenSplit:
    """One split in the file: ``ids`` and ``origins`` (file:row) of its rows in order, sha256 over their contents."""

    rows: int
    sha256: str
    ids: list[str]
    origins: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenSplits:
    """The content of ``splits.json``. ``seed`` is ``data.split_seed``."""

    format: int
    seed: int
    train: FrozenSplit
    validation: FrozenSplit
    test: FrozenSplit


def freeze(splits: Splits, path: Path, *, seed: int) -> str:
    """Write who is in which split to ``path`` and return the sha256 of the file."""
    raw = msgspec.json.format(msgspec.json.encode(_frozen(splits, seed)), indent=1)
    write_atomic(path, raw)
    return hashlib.sha256(raw).hexdigest()


def check_frozen(splits: Splits, path: Path) -> None:
    """Refuse validation or test rows that are not those frozen in ``path``.

    Raises:
        DataError: the file cannot be read, or a row was added, removed or changed.
    """
    try:
        then = msgspec.json.decode(path.read_bytes(), type=FrozenSplits)
    except (OSError, msgspec.DecodeError) as error:
        raise DataError("the frozen splits cannot be read", where=str(path), got=error) from error
    now = _frozen(splits, then.seed)
    for name, old, new in (("validation", then.validation, now.validation), ("test", then.test, now.test)):
        if old.sha256 == new.sha256:
            continue
        gone, added = sorted(set(old.ids) - set(new.ids)), sorted(set(new.ids) - set(old.ids))
        raise DataError(
            f"the {name} rows are not the frozen ones",
            where=str(path),
            got=f"{len(gone)} missing {gone[:3]}, {len(added)} new {added[:3]}, of {old.rows}",
            do="restore the data, or start a new run and do not compare it with this one",
        )


def _frozen(splits: Splits, seed: int) -> FrozenSplits:
    parts = {name: _frozen_split(rows) for name, rows in splits.items()}
    return FrozenSplits(
        format=_FORMAT, seed=seed, train=parts["train"], validation=parts["validation"], test=parts["test"]
    )


def _frozen_split(rows: Sequence[Conversation]) -> FrozenSplit:
    content = hashlib.sha256()
    for row in rows:
        content.update(f"{row.id}\0{whole_key(row)}\0{row.answer}\0{row.label}\n".encode())
    return FrozenSplit(
        rows=len(rows),
        sha256=content.hexdigest(),
        ids=[row.id for row in rows],
        origins=[str(row.origin) for row in rows],
    )
