"""The built-in legal rows: how they are found in a text, and that the whole is the frozen one, row by row.

The texts of the small package here are our own; the real package is only read where it is installed.
"""

import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import write_license, write_rule
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.legal import TASKS, legal_records, store
from trainer.data.legal.clauses import CLAUSE_TYPES, clause_type, clauses, clip, is_title
from trainer.data.legal.derive import FROZEN, LegalRow, check_frozen, derive, splits_hash
from trainer.data.legal.families import family_of_licenses, largest
from trainer.data.legal.reading import License, read_package
from trainer.data.legal.similarity import contained, near_duplicates, shingles
from trainer.data.legal.tasks import CATEGORIES, candidates, shorten
from trainer.data.splits import SPLITS, SplitName
from trainer.errors import DataError

# ------------------------------------------------------------------------------------------------ reading, clauses

LONG = (
    "The parties agree that this sentence is here to be long enough to count as the body of one whole clause, no less."
)

CONTRACT = f"""OUR OWN LICENCE

1. Governing Law. This Agreement is governed by the laws of the State of Oregon, without its rules of conflict. {LONG}

2. Termination: {LONG} Either side may end it.
   2.1 with a letter, or
   2.2 by handing back the keys.

3. DEFINITIONS
"Work" means the thing that is handed over under these terms and described in the first annex to this text. {LONG}
"Fee" shall mean the money that is paid for it. {LONG}

4. Short. No.
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A ``licensedcode/data`` folder with texts written for these tests."""
    data = tmp_path / "data"
    write_license(data, "oak-1.0", CONTRACT, owner="Oak", extra="ignorable_holders:\n  - Oak Society\n")
    write_license(
        data, "oak-2.0", "Copyright 2001 Oak Society. " + LONG * 3, extra="ignorable_holders:\n  - Oak Society\n"
    )
    write_license(data, "elm-1.0", CONTRACT.replace("Oregon", "Maine"), category="Copyleft", owner="Elm")
    write_license(data, "ulme", CONTRACT, extra="language: de\n", category="Copyleft")
    write_rule(data, "oak_long", "x" * 2501, "license_expression: oak-1.0\nis_license_text: yes\n")
    write_rule(
        data,
        "elm_notice",
        "(c) by Elm Trees Inc. who wrote it",
        "license_expression: elm-1.0 OR none\nignorable_holders:\n  - Elm Trees Inc.\n",
    )
    write_rule(data, "unused", "text", "license_expression: oak-1.0\nrelevance: 100\n")
    return data


def test_front_matter_and_text_are_told_apart(package: Path) -> None:
    read = read_package(package)
    assert list(read.licenses) == ["elm-1.0", "oak-1.0", "oak-2.0", "ulme"]
    oak = read.licenses["oak-1.0"]
    assert (oak.category, oak.owner, oak.english, oak.holders) == ("Permissive", "Oak", True, ("Oak Society",))
    assert oak.text.startswith("OUR OWN LICENCE\n\n1. Governing")
    assert not read.licenses["ulme"].english
    assert [(rule.source, rule.is_license_text) for rule in read.rules] == [
        ("rules/elm_notice.RULE", False),
        ("rules/oak_long.RULE", True),
    ]


def test_versions_and_dates_stay_text_and_line_ends_do_not_matter(tmp_path: Path) -> None:
    write_license(tmp_path, "a", "one\r\ntwo", owner="2001-02-03", category="1.0")
    write_rule(tmp_path, "r", "text", "license_expression: a\nis_license_text: yes\n")
    only = read_package(tmp_path).licenses["a"]
    assert (only.owner, only.category, only.text) == ("2001-02-03", "1.0", "one\ntwo")


def test_a_rule_may_end_with_its_front_matter(tmp_path: Path) -> None:
    write_license(tmp_path, "a", "text")
    write_rule(tmp_path, "r", "", "")
    (tmp_path / "rules" / "r.RULE").write_text("---\nlicense_expression: a\nis_license_text: yes\n---")
    (rule,) = read_package(tmp_path).rules
    assert (rule.expression, rule.text) == ("a", "")


def test_a_damaged_package(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is incomplete\n  got: 0 licences and 0 rules"):
        read_package(tmp_path)
    write_license(tmp_path, "a", "text")
    (tmp_path / "licenses" / "a.LICENSE").write_text("no front matter")
    with pytest.raises(DataError, match=r"a\.LICENSE: has no front matter"):
        read_package(tmp_path)
    (tmp_path / "licenses" / "a.LICENSE").write_text("---\nowner: [\n---\n\ntext")
    with pytest.raises(DataError, match=r"a\.LICENSE: has unreadable front matter"):
        read_package(tmp_path)


def test_clauses_are_found_with_their_headings() -> None:
    found = dict(clauses(CONTRACT))
    assert list(found) == ["Governing Law", "Termination", "DEFINITIONS"]
    assert found["Termination"].endswith("2.1 with a letter, or 2.2 by handing back the keys.")
    assert found["DEFINITIONS"].startswith('"Work" means the thing')


@pytest.mark.parametrize(
    ("heading", "label"),
    [
        ("Governing Law", "governing law"),
        ("TERMINATION", "termination"),
        ("Limitation of Liability", "limitation of liability"),
        ("Disclaimer of Warranty.", "warranty disclaimer"),
        ("Warranty and Liability", None),
        ("Term and Termination", "termination"),
        ("Patents and Trademarks", None),
        ("Miscellaneous", None),
    ],
)
def test_a_heading_about_two_things_has_no_type(heading: str, label: str | None) -> None:
    assert clause_type(heading) == label


def test_every_type_is_found_by_its_own_name() -> None:
    hits = {label: clause_type(label) for label in CLAUSE_TYPES}
    assert {label for label, hit in hits.items() if hit not in (label, None)} == set()


def test_the_start_of_a_sentence_is_no_title() -> None:
    assert is_title("Limited Warranty")
    assert not is_title("You may copy it")
    assert not is_title("One Two Three Four Five Six Seven Eight")
    assert not is_title("Law")


def test_clipping_ends_after_a_sentence_or_a_word() -> None:
    assert clip("short", 10) == "short"
    assert clip("One sentence. Another one", 16) == "One sentence."
    assert clip("A. then a long one without end", 20) == "A. then a long one …"


# -------------------------------------------------------------------------------------------------------- tasks


def test_rows_of_all_tasks_come_out_of_the_texts(package: Path) -> None:
    found = list(candidates(read_package(package)))
    by_task = {task: [(row.license_key, row.answer) for row in found if row.task == task] for task in TASKS}
    types = ["governing law", "termination", "definitions"]
    assert by_task == {
        "clause_type": [(key, label) for key in ("elm-1.0", "oak-1.0") for label in types],
        "clause_heading": [
            (k, h) for k in ("elm-1.0", "oak-1.0") for h in ("Governing Law", "Termination", "Definitions")
        ],
        "defined_terms": [("elm-1.0", "Work; Fee"), ("oak-1.0", "Work; Fee")],
        "governing_law": [("elm-1.0", "the State of Maine"), ("oak-1.0", "the State of Oregon")],
        "copyright_holder": [("elm-1.0", "Elm Trees Inc."), ("oak-2.0", "Oak Society")],
        "license_category": [("elm-1.0", "Copyleft"), ("oak-1.0", "Permissive"), ("oak-2.0", "Permissive")],
    }
    for row in found:
        if row.task in ("governing_law", "copyright_holder"):
            assert row.answer in row.text
        if row.task in ("clause_type", "clause_heading"):
            assert row.heading
            assert row.heading not in row.text[:40]


def test_a_definition_with_two_names_is_left_out(tmp_path: Path) -> None:
    write_license(tmp_path, "a", f'"Fee" means the money. "Work" or "Thing" means what is handed over here. {LONG}')
    write_rule(tmp_path, "r", "text", "license_expression: a\nis_license_text: yes\n")
    assert [row for row in candidates(read_package(tmp_path)) if row.task == "defined_terms"] == []


def test_a_shorter_text_has_the_answer_that_is_left() -> None:
    text = '"Work" means the thing itself. "Fee" means the money that is paid.'
    assert shorten("defined_terms", text, "Work; Fee", None) == (text, "Work; Fee")
    assert shorten("defined_terms", text, "Work; Fee", 40) == (text[:40], "Work")
    assert shorten("defined_terms", text, "Work; Fee", 5) is None
    assert shorten("copyright_holder", "by Oak Society", "Oak Society", 10) is None
    assert shorten("copyright_holder", "by Oak Society, all rights", "Oak Society", 14) == (
        "by Oak Society",
        "Oak Society",
    )
    assert shorten("clause_type", "a long clause", "termination", 6) == ("a long", "termination")


def license(key: str, owner: str) -> License:
    return License(key=key, source="", category="", owner=owner, english=True, holders=(), text="")


def test_families_are_joined_by_owner_and_by_name() -> None:
    licenses = [license("oak-1.0", "Ann"), license("oak-2.0", "Bob"), license("elm", "bob"), license("fir", "unknown")]
    families = family_of_licenses([*licenses, license("yew", "Unknown")])
    assert families["oak-1.0"] == families["oak-2.0"] == families["elm"]
    assert len(set(families.values())) == 3
    assert largest(families, 1) == {families["elm"]}


# ---------------------------------------------------------------------------------------------------- similarity


def words_in_runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + 4]) for start in range(max(1, len(words) - 3))}


texts = st.lists(st.lists(st.sampled_from("ab"), max_size=12).map(" ".join), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(texts, texts)
def test_similarity_equals_its_definition(left: list[str], right: list[str]) -> None:
    matrix = shingles(left + right)
    sets = [words_in_runs(text) for text in left + right]
    assert np.diff(matrix.indptr).tolist() == [len(runs) for runs in sets]
    a, b = sets[: len(left)], sets[len(left) :]
    expected = [any(len(x & y) / min(len(x), len(y)) >= 0.5 for y in b) for x in a]
    assert contained(matrix[: len(left)], matrix[len(left) :], containment=0.5).tolist() == expected
    kept: list[set[tuple[str, ...]]] = []
    repeated: list[bool] = []
    for runs in sets:
        repeated.append(any(len(runs & other) / len(runs | other) >= 0.7 for other in kept))
        if not repeated[-1]:
            kept.append(runs)
    assert near_duplicates(matrix, jaccard=0.7).tolist() == repeated


# --------------------------------------------------------------------------------------------------------- store


def test_a_repeated_text_is_one_row_and_a_contradiction_none(package: Path) -> None:
    write_license(package, "elm-2.0", CONTRACT.replace("Oregon", "Maine"), category="Permissive", owner="Elm")
    rows = derive(package, release="own")
    laws = [(row.license_key, row.answer) for row in rows if row.task == "governing_law"]
    assert Counter(laws)["elm-2.0", "the State of Maine"] == 0
    # elm-1.0 and elm-2.0 have one text and two categories: nobody can say which is right.
    assert not [row for row in rows if row.task == "license_category" and row.license_key.startswith("elm")]
    assert len({row.id for row in rows}) == len(rows)


def test_rows_that_moved_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    row = LegalRow(
        id="a-1", task="clause_type", split="train", prompt="p", answer="a", label=None, heading=None, license_key="k",
        family="f", category="c", source="s",
    )  # fmt: skip
    monkeypatch.setitem(FROZEN, "9.9", splits_hash([row]))
    check_frozen([row], "9.9")
    check_frozen([], "another release")
    with pytest.raises(DataError, match=r"licensedcode-data 9\.9: the built-in legal rows are not the frozen ones"):
        check_frozen([], "9.9")


@pytest.fixture
def small(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small package in place of the installed one."""
    monkeypatch.setattr(store, "installed", lambda: ("0.1", package))
    monkeypatch.setattr(store, "installed_digest", lambda: "d" * 64)


@pytest.mark.usefixtures("small")
def test_rows_are_kept_with_a_card_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [legal_records(TASKS, split, cache=tmp_path / "cache") for split in SPLITS]
    monkeypatch.setattr(store, "derive", None)  # whoever derives again fails
    assert [legal_records(TASKS, split, cache=tmp_path / "cache") for split in SPLITS] == first
    (folder,) = (tmp_path / "cache").iterdir()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "Copyright (c) nexB Inc. and others" in card
    assert f"{sum(len(part.records) for part in first)} rows of six tasks" in card
    source = first[0].source
    assert (source.license, source.revision, source.sha256) == ("CC-BY-4.0", "0.1", "d" * 64)
    assert "nexB" in source.attribution


@pytest.mark.usefixtures("small")
def test_a_record_has_turns_answer_and_provenance(tmp_path: Path) -> None:
    every = [record for split in SPLITS for record in legal_records(["clause_type"], split, cache=tmp_path).records]
    record = next(record for record in every if record.fields["answer"] == "termination")
    user, assistant = record.fields["messages"]
    assert user["content"].startswith(
        "Classify this licence or contract clause. Answer with exactly one of: governing law, "
    )
    assert "\n\nClause: The parties agree" in user["content"]
    assert assistant == {"role": "assistant", "content": "termination"}
    assert record.fields["label"] == "termination"
    assert record.fields["heading"] == "Termination"
    assert record.fields["license_key"] in ("elm-1.0", "oak-1.0")
    assert record.origin.file == f"legal/clause_type/{record.fields['split']}"
    assert set(record.fields) == {
        "id", "task", "messages", "answer", "label", "heading", "license_key", "family", "category", "source", "split"
    }  # fmt: skip


@pytest.mark.usefixtures("small")
def test_a_cut_clause_keeps_its_instruction_and_lost_answers_are_counted(tmp_path: Path) -> None:
    whole = [legal_records(["governing_law"], split, cache=tmp_path) for split in SPLITS]
    short = [legal_records(["governing_law"], split, cache=tmp_path, max_characters=30) for split in SPLITS]
    count = sum(len(rows.records) for rows in whole)
    assert count > 0
    assert [rows.records for rows in short] == [[], [], []]
    dropped = [dropped for rows in short for dropped in rows.dropped]
    assert sum(reason.count for reason in dropped) == count
    assert {reason.reason for reason in dropped} == {"answer cut away by data.max_characters"}
    clipped = [
        r for split in SPLITS for r in legal_records(["clause_type"], split, cache=tmp_path, max_characters=30).records
    ]
    assert {len(r.fields["messages"][0]["content"].split("\n\nClause: ")[1]) for r in clipped} == {30}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", ["content", "gone", "manifest"])
def test_a_damaged_cache_is_not_read(damage: str, tmp_path: Path) -> None:
    legal_records(["clause_type"], "train", cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    table = folder / "clause_type" / "train.parquet"
    if damage == "content":
        pq.write_table(pa.table({"id": ["another"]}), table)
    elif damage == "gone":
        table.unlink()
    else:
        (folder / "manifest.json").write_text("{}")
    with pytest.raises(
        DataError, match=f"the cached legal data is damaged\n  do this: remove it, it is made again: rm -r {folder}"
    ):
        legal_records(["clause_type"], "train", cache=tmp_path / "cache")


@pytest.mark.usefixtures("small")
def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write", no_space)
    with pytest.raises(OSError, match="No space left"):
        legal_records(["clause_type"], "train", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("small")
def test_two_processes_may_publish_the_same_rows(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "legal-x"
    for _ in range(2):
        store.publish([], folder, release="0.1", package_sha256="d" * 64)
    assert [entry.name for entry in folder.parent.iterdir()] == ["legal-x"]
    assert msgspec.json.decode((folder / "manifest.json").read_bytes(), type=store.Manifest).release == "0.1"
    taken = tmp_path / "cache" / "legal-y"
    taken.write_text("a file in the way")
    with pytest.raises(NotADirectoryError):
        store.publish([], taken, release="0.1", package_sha256="d" * 64)


def test_a_missing_package_names_the_lines_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(store, "distribution", missing)
    with pytest.raises(DataError) as caught:
        legal_records(["clause_type"], "train", cache=tmp_path)
    assert "needs the package licensedcode-data, which is not installed" in str(caught.value)
    assert f"do this: make assets\n  or: {sys.executable} -m pip install 'licensedcode-data" in str(caught.value)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], r"data\.tasks: no built-in task is named\n  allowed: clause_type, clause_heading"),
        (["clause_typ"], r"is not a built-in task\n  got: clause_typ\n.*\n  do this: did you mean 'clause_type'\?"),
        (["clause_type", "clause_type"], "a task is named twice\n  got: clause_type"),
    ],
)
def test_tasks_that_cannot_be_used(tasks: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        legal_records(tasks, "train", cache=tmp_path)


# ----------------------------------------------------------------------------------------------- the real package

COUNTS: dict[str, tuple[int, int, int]] = {
    "clause_type": (1966, 158, 189),
    "clause_heading": (3962, 348, 434),
    "defined_terms": (659, 36, 90),
    "governing_law": (81, 6, 16),
    "copyright_holder": (425, 17, 72),
    "license_category": (1127, 89, 171),
}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, SplitName], list[dict[str, str]]]:
    """All rows of the installed package (about 7 s), by task and split."""
    try:
        release, _ = store.installed()
    except DataError:
        pytest.skip("licensedcode-data is not installed (make assets)")
    if release != "32.1.0":
        pytest.skip(f"the counts are those of 32.1.0, not {release}")
    cache = tmp_path_factory.mktemp("legal")
    return {
        (task, split): [dict(record.fields) for record in legal_records([task], split, cache=cache).records]
        for task in TASKS
        for split in SPLITS
    }


Real = dict[tuple[str, SplitName], list[dict[str, str]]]


def test_the_rows_of_the_release_are_the_frozen_ones(real: Real) -> None:
    assert {task: tuple(len(real[task, split]) for split in SPLITS) for task in TASKS} == COUNTS


def test_no_family_is_in_two_splits(real: Real) -> None:
    families = {split: {row["family"] for task in TASKS for row in real[task, split]} for split in SPLITS}
    assert not families["train"] & families["test"]
    assert not families["train"] & families["validation"]
    assert not families["validation"] & families["test"]


def test_no_training_text_is_near_a_test_text(real: Real) -> None:
    texts = {split: [_text(row) for task in TASKS for row in real[task, split]] for split in SPLITS}
    matrix = shingles(texts["train"] + texts["test"])
    count = len(texts["train"])
    assert not contained(matrix[:count], matrix[count:], containment=0.5).any()


def test_answers_are_what_the_task_promises(real: Real) -> None:
    for (task, _), rows in real.items():
        for row in rows:
            if task in ("governing_law", "copyright_holder"):
                assert row["answer"] in _text(row)
            if task == "defined_terms":
                assert all(term in _text(row) for term in row["answer"].split("; "))
    assert {row["answer"] for row in real["clause_type", "train"]} == set(CLAUSE_TYPES)
    assert {row["answer"] for row in real["license_category", "train"]} <= set(CATEGORIES)


def _text(row: dict[str, str]) -> str:
    messages: list[dict[str, str]] = row["messages"]  # type: ignore[assignment]
    return messages[0]["content"].split("\n\n", 1)[1].split(": ", 1)[1]
