"""Gates that the rows pass before anything is trained, because a model trained on bad rows looks like a trained model.

Every row that is left out is counted under a reason and the first few are named; above a share the run is refused.
Nothing is printed here: the caller shows ``Checked``.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.data.splits import Splits, check_groups, row_key
from trainer.errors import DataError, nearest
from trainer.samples import Conversation, Dropped

FIRST = 5
"""How many rows a report names for one reason."""

NO_ANSWER = "no answer"
NO_TEXT = "no text"
IN_TEST = "also in the test rows"
IN_VALIDATION = "also in the validation rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something the user should know that drops no row: ``what``, how many rows, the first of them as ``file:row``."""

    what: str
    count: int
    first: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Rows that passed, and what was found.

    ``labels``: the allowed answers of a classification, sorted ([] for other tasks). ``balance``: split -> label ->
    rows, for classification.
    """

    splits: Splits
    labels: list[str]
    dropped: list[Dropped]
    findings: list[Finding]
    balance: dict[str, dict[str, int]]


def check_rows(splits: Splits, *, task_name: str, labels: Sequence[str], max_dropped_share: float) -> Checked:
    """Pass ``splits`` through all gates.

    Left out: rows without an answer (or text); training rows that are also in validation or test, validation rows that
    are also in test (the same for the task, ``splits.row_key``). Reported: rows that repeat within a split, equal
    inputs with different answers, test labels that training never shows.

    Raises:
        DataError: a group is in two splits, an answer is not among ``labels``, a classification with fewer than two
            labels, nothing is left of a split, or more than ``max_dropped_share`` of all rows had to be left out.
    """
    check_groups(splits)
    total = sum(len(rows) for _, rows in splits.items())
    answered, unanswered = _without_empty(splits)
    key = _once_per_row(row_key(task_name))
    clean, leaked = _without_leaks(answered, key)
    dropped = [*unanswered, *leaked]
    refuse_if_too_many(dropped, total, max_dropped_share)
    for (name, rows), (_, before) in zip(clean.items(), splits.items(), strict=True):
        if before and not rows:
            raise DataError(
                f"no {name} rows are left", where=f"data.{name}", got=describe(dropped), do="mend the rows named here"
            )
    findings = _repeats(clean, key)
    allowed: list[str] = []
    balance: dict[str, dict[str, int]] = {}
    if task_name == "classification":
        allowed = _check_labels(clean, labels)
        balance = {name: dict(sorted(Counter(map(label_of, rows)).items())) for name, rows in clean.items() if rows}
        findings += _unseen_labels(clean)
    if task_name in ("classification", "extraction"):
        findings += _conflicts(clean, key)
    return Checked(splits=clean, labels=allowed, dropped=dropped, findings=findings, balance=balance)


def label_of(row: Conversation) -> str:
    """The class of a row: its label, or its answer when it has no label of its own."""
    return row.label or row.answer


def dropped_rows(reason: str, rows: Sequence[Conversation]) -> list[Dropped]:
    """``rows`` as one counted reason; [] for no rows."""
    return [Dropped(reason=reason, count=len(rows), first=_first(rows))] if rows else []


def refuse_if_too_many(dropped: Sequence[Dropped], total: int, max_dropped_share: float) -> None:
    """Stop when more than ``max_dropped_share`` of ``total`` rows were left out.

    Raises:
        DataError: it lists every reason with its first rows.
    """
    count = sum(reason.count for reason in dropped)
    if count > max_dropped_share * total:
        raise DataError(
            f"{count} of {total} rows would have to be left out",
            where="data",
            got=describe(dropped),
            allowed=f"a share of {max_dropped_share:g} (data.max_dropped_share), here it is {count / total:.3g}",
            do="mend the rows named here, or raise data.max_dropped_share",
        )


def describe(dropped: Sequence[Dropped]) -> str:
    """One line: ``12 no answer (a.jsonl:3, a.jsonl:9, ...); 1 ...``."""
    parts: list[str] = []
    for reason in dropped:
        more = ", ..." if reason.count > len(reason.first) else ""
        parts.append(f"{reason.count} {reason.reason} ({', '.join(reason.first)}{more})")
    return "; ".join(parts)


def _once_per_row(key: Callable[[Conversation], str]) -> Callable[[Conversation], str]:
    """``key``, computed once for each row object; only for rows that outlive the result."""
    known: dict[int, str] = {}

    def lookup(row: Conversation) -> str:
        found = known.get(id(row))
        if found is None:
            found = known[id(row)] = key(row)
        return found

    return lookup


def _first(rows: Sequence[Conversation]) -> list[str]:
    return [str(row.origin) for row in rows[:FIRST]]


def _filter(splits: Splits, keep: Callable[[str, Conversation], bool]) -> tuple[Splits, list[Conversation]]:
    kept: dict[str, list[Conversation]] = {}
    out: list[Conversation] = []
    for name, rows in splits.items():
        kept[name] = []
        for row in rows:
            (kept[name] if keep(name, row) else out).append(row)
    return Splits(train=kept["train"], validation=kept["validation"], test=kept["test"]), out


def _without_empty(splits: Splits) -> tuple[Splits, list[Dropped]]:
    def answered(_: str, row: Conversation) -> bool:
        if not row.messages:
            return bool(row.text.strip())
        return any(turn.role == "assistant" and (turn.content.strip() or turn.tool_calls) for turn in row.messages)

    kept, out = _filter(splits, answered)
    no_answer = dropped_rows(NO_ANSWER, [row for row in out if row.messages])
    return kept, no_answer + dropped_rows(NO_TEXT, [row for row in out if not row.messages])


def _without_leaks(splits: Splits, key: Callable[[Conversation], str]) -> tuple[Splits, list[Dropped]]:
    test = {key(row) for row in splits.test}
    validation = {key(row) for row in splits.validation}
    kept, in_test = _filter(splits, lambda name, row: name == "test" or key(row) not in test)
    kept, in_validation = _filter(kept, lambda name, row: name != "train" or key(row) not in validation)
    return kept, dropped_rows(IN_TEST, in_test) + dropped_rows(IN_VALIDATION, in_validation)


def _repeats(splits: Splits, key: Callable[[Conversation], str]) -> list[Finding]:
    findings: list[Finding] = []
    for name, rows in splits.items():
        seen: dict[str, Conversation] = {}
        again = [row for row in rows if seen.setdefault(key(row), row).origin != row.origin]
        if again:
            findings.append(
                Finding(what=f"{name} rows that repeat an earlier one", count=len(again), first=_first(again))
            )
    return findings


def _conflicts(splits: Splits, key: Callable[[Conversation], str]) -> list[Finding]:
    """Rows with one input and several answers, over all splits: at most one of the answers can be scored as right."""
    answers: dict[str, dict[str, Conversation]] = defaultdict(dict)
    counts: Counter[str] = Counter()
    for _, rows in splits.items():
        for row in rows:
            same = key(row)
            counts[same] += 1
            answers[same].setdefault(" ".join(row.answer.split()), row)
    conflicting = [key for key, by_answer in answers.items() if len(by_answer) > 1]
    if not conflicting:
        return []
    first = [
        " / ".join(f"{row.origin} '{answer}'" for answer, row in answers[key].items()) for key in conflicting[:FIRST]
    ]
    count = sum(counts[key] for key in conflicting)
    return [Finding(what="rows with the same input and different answers", count=count, first=first)]


def _check_labels(splits: Splits, labels: Sequence[str]) -> list[str]:
    """The allowed labels: ``labels``, or those of the training rows."""
    if labels:
        allowed = sorted(labels)
        _refuse_unknown_labels(splits, allowed)
    else:
        allowed = sorted({label_of(row) for row in splits.train})
    if len(allowed) < 2:
        raise DataError(
            "a classification needs at least two labels", where="task.labels", got=", ".join(allowed),
            do="check data.label_column and the answers, or choose another task",
        )  # fmt: skip
    return allowed


def _refuse_unknown_labels(splits: Splits, allowed: Sequence[str]) -> None:
    known = frozenset(allowed)
    unknown = [row for _, rows in splits.items() for row in rows if label_of(row) not in known]
    if not unknown:
        return
    names = Counter(map(label_of, unknown))
    shown = ", ".join(f"'{name}' ({count} rows)" for name, count in names.most_common(FIRST))
    raise DataError(
        f"{len(unknown)} rows have an answer that is not in task.labels",
        where=str(unknown[0].origin),
        got=shown,
        allowed=", ".join(allowed),
        do=nearest(next(iter(names)), allowed) or "add the label to task.labels, or mend the rows",
    )


def _unseen_labels(splits: Splits) -> list[Finding]:
    seen = {label_of(row) for row in splits.train}
    findings: list[Finding] = []
    for name, rows in splits.items():
        unseen = [row for row in rows if label_of(row) not in seen]
        if unseen:
            names = ", ".join(sorted({label_of(row) for row in unseen})[:FIRST])
            what = f"{name} rows with a label that no training row has ({names})"
            findings.append(Finding(what=what, count=len(unseen), first=_first(unseen)))
    return findings
