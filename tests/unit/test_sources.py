"""Every format to records that name their file and line; every bad file to a message that says what to do."""

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import LoopbackHub, troubled_hub
from huggingface_hub import DatasetInfo

from trainer.data import hub
from trainer.data.files import READERS, read_file
from trainer.data.mixture import apportion, mix
from trainer.data.sources import find_source, read_source, read_sources
from trainer.errors import DataError
from trainer.fingerprint import DATA_EXTENSIONS, file_digest

ROWS = [{"text": "one"}, {"text": "zwei „Wörter“"}, {"text": "three\nlines\nhere"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def problem(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_file(path, name=path.name))
    return str(caught.value)


def json_lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---------------------------------------------------------------------------------------------------------- formats


def write_rows(path: Path) -> Path:
    """ROWS in the format that the name asks for."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
        return path
    plain = path.with_name(f"plain-{name}")
    if name.endswith(".csv"):
        with plain.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, ["text"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        write(plain, json.dumps(ROWS) if name.endswith(".json") else json_lines(ROWS))
    raw = plain.read_bytes()
    return write(path, gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.mark.parametrize("extension", READERS)
def test_every_format_gives_the_same_rows_and_their_places(extension: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"rows{extension}")
    records = list(read_file(path, name="rows"))
    assert [record.fields for record in records] == ROWS
    lines = [2, 3, 4] if "csv" in extension else [1, 2, 3]
    assert [str(record.origin) for record in records] == [f"rows:{line}" for line in lines]


def test_a_csv_row_is_named_by_the_line_on_which_it_starts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"two\nlines",x\nlast,y\n')
    assert [(record.origin.row, record.fields["label"]) for record in read_file(path)] == [(2, "x"), (4, "y")]


def test_the_driver_hashes_what_the_readers_read() -> None:
    assert set(DATA_EXTENSIONS) == set(READERS)


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\n\n   \n{"text": "b"}\n')
    assert [record.origin.row for record in read_file(path)] == [1, 4]


def test_a_json_object_with_data_is_a_list_of_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"version": 1, "data": ROWS}))
    assert [record.fields for record in read_file(path)] == ROWS


def test_json_lines_are_not_read_ahead(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "good"}\n' + '{"text": "x"}\n' * 10_000 + "broken\n")
    records = read_file(path)
    assert next(records).fields == {"text": "good"}


# -------------------------------------------------------------------------------------------------------- bad input


def test_a_line_that_is_not_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": oops}\n')
    assert problem(path) == (
        "a.jsonl:3: line 3 is not JSON\n"
        '  got: {"text": oops} (Expecting value at column 10)\n'
        "  allowed: one JSON object per line\n"
        "  do this: mend or remove the line"
    )


def test_a_json_document_named_as_lines(tmp_path: Path) -> None:
    assert "name it .json" in problem(write(tmp_path / "a.jsonl", '[\n{"text": "a"}\n]\n'))


def test_lines_named_as_a_json_document(tmp_path: Path) -> None:
    message = problem(write(tmp_path / "a.json", json_lines(ROWS[:2])))
    assert "a.json:2: line 2 is not JSON" in message
    assert "name it .jsonl" in message


def test_nesting_without_end(tmp_path: Path) -> None:
    assert "line 1 is not JSON" in problem(write(tmp_path / "a.jsonl", "[" * 200_000 + "\n"))
    assert "nested too deeply" in problem(write(tmp_path / "a.json", "[" * 200_000))


def test_not_utf8_names_line_and_byte(tmp_path: Path) -> None:
    message = problem(write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n'))
    assert "a.jsonl:2: line 2 is not UTF-8" in message
    assert "byte 0xe9 at offset 27 of the file" in message
    assert "iconv -f WINDOWS-1252 -t UTF-8 a.jsonl > utf8-a.jsonl" in message


def test_utf16_is_recognised(tmp_path: Path) -> None:
    message = problem(write(tmp_path / "a.csv", "text\na\n".encode("utf-16")))
    assert "is UTF-16, not UTF-8" in message
    assert "iconv -f UTF-16" in message


def test_half_a_character(tmp_path: Path) -> None:
    message = problem(write(tmp_path / "a.jsonl", '{"text": "ok \\ud83d\\ude00"}\n{"text": "\\ud83d"}\n'))
    assert "a.jsonl:2: row 2 holds half of a character" in message
    assert "\\ud83d" in message


@pytest.mark.parametrize(
    ("line", "got"), [('["a"]', "a list"), ('"a"', "a string"), ("null", "null"), ("3", "a number")]
)
def test_a_row_that_is_not_an_object(line: str, got: str, tmp_path: Path) -> None:
    message = problem(write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{line}\n'))
    assert "a.jsonl:2: row 2 is not an object" in message
    assert f"got: {got}: {line}" in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_file_without_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        write(path, {"a.csv": "text,label\n", "a.json": "[]"}.get(name, ""))
    assert f"{name}: has no rows" in problem(path)


def test_an_empty_json_file(tmp_path: Path) -> None:
    assert "has no rows\n  got: 2 bytes" in problem(write(tmp_path / "a.json", " \n"))


@pytest.mark.parametrize(
    ("text", "got"), [('{"rows": []}', "an object with the keys rows"), ("3", "a number"), ("{}", "an object")]
)
def test_a_json_file_that_is_no_list(text: str, got: str, tmp_path: Path) -> None:
    message = problem(write(tmp_path / "a.json", text))
    assert "a.json: is not a list of rows" in message
    assert f"got: {got}" in message


def test_a_csv_row_with_a_comma_too_many(tmp_path: Path) -> None:
    message = problem(write(tmp_path / "a.csv", "text,label\na,x\nb, c,y\n"))
    assert "a.csv:3: line 3 has another number of columns than the header" in message
    assert "allowed: 2: text, label" in message


@pytest.mark.parametrize("header", ["text,text", "text,"])
def test_a_csv_header_that_cannot_name_columns(header: str, tmp_path: Path) -> None:
    assert "two columns of one name, or a column without a name" in problem(
        write(tmp_path / "a.csv", f"{header}\na,b\n")
    )


def test_a_csv_quote_that_never_ends(tmp_path: Path) -> None:
    message = problem(write(tmp_path / "a.csv", 'text,label\na,x\n"b,y\nc,z\n'))
    assert "a.csv:3: line 3 is not CSV" in message
    assert "mend the quotes" in message


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    assert "is not a readable Parquet file" in problem(write(tmp_path / "a.parquet", b"PAR1 no"))


def test_a_cut_gzip_file(tmp_path: Path) -> None:
    whole = gzip.compress(json_lines(ROWS * 500).encode())
    assert "a.jsonl.gz: is a damaged gzip file" in problem(write(tmp_path / "a.jsonl.gz", whole[: len(whole) // 2]))
    assert "is a damaged gzip file" in problem(write(tmp_path / "b.jsonl.gz", b"not gzip at all"))


def test_an_unknown_extension(tmp_path: Path) -> None:
    message = problem(write(tmp_path / "a.jsnl", "{}"))
    assert "is of an unknown format\n  got: .jsnl\n  allowed: .jsonl .ndjson .json" in message
    assert "did you mean '.jsonl'?" in message


def test_a_file_that_vanishes_or_is_forbidden(tmp_path: Path) -> None:
    assert "gone.jsonl: cannot be read\n  got: No such file" in problem(tmp_path / "gone.jsonl")


# ---------------------------------------------------------------------------------------------------------- sources


def test_a_folder_is_its_data_files_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "b.jsonl", '{"text": "b"}\n')
    write(folder / "a.csv", "text\na\n")
    write(folder / "README.md", "about")
    write(folder / ".hidden.jsonl", "not data")
    source = find_source(str(folder), revision=None, cache=tmp_path, split="train")
    records = list(source.records())
    assert [record.fields["text"] for record in records] == ["a", "b"]
    assert str(records[1].origin) == f"{folder}/b.jsonl:1"


def test_a_source_says_what_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines(ROWS))
    records, info = read_source(str(path), cache=tmp_path)
    assert (info.name, info.location, info.rows, info.revision) == ("a.jsonl", str(path), len(records), "")
    assert info.sha256 == file_digest(path)


def test_the_hash_of_a_folder_covers_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "a.jsonl", '{"text": "a"}\n')
    write(folder / "b.jsonl", '{"text": "b"}\n')

    def current() -> str:
        return find_source(str(folder), revision=None, cache=tmp_path, split="train").sha256

    before = current()
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    renamed = current()
    write(folder / "c.jsonl", '{"text": "B"}\n')
    assert len({before, renamed, current()}) == 3


def test_several_sources_are_read_in_the_order_given(tmp_path: Path) -> None:
    second, first = write(tmp_path / "a.jsonl", '{"text": "2"}\n'), write(tmp_path / "b.jsonl", '{"text": "1"}\n' * 2)
    records, infos = read_sources([str(first), str(second)], cache=tmp_path)
    assert [record.fields["text"] for record in records] == ["1", "1", "2"]
    assert [info.rows for info in infos] == [2, 1]


def test_a_missing_file_is_noticed_before_the_first_is_read(tmp_path: Path) -> None:
    broken = write(tmp_path / "broken.jsonl", "not json\n")
    with pytest.raises(DataError, match="does not exist"):
        read_sources([str(broken), str(tmp_path / "missing.jsonl")], cache=tmp_path)


def test_a_file_named_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines(ROWS))
    with pytest.raises(
        DataError, match=r"a\.jsonl: is named twice\n.*\n  do this: name it once; data\.mixture"
    ) as caught:
        read_sources([str(path), str(tmp_path)], cache=tmp_path)
    assert f"in '{path}' and in '{tmp_path}'" in str(caught.value)
    with pytest.raises(DataError, match="is named twice"):
        read_sources([str(path), str(path)], cache=tmp_path)


def test_a_misspelt_file_name(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", json_lines(ROWS))
    with pytest.raises(DataError) as caught:
        find_source(str(tmp_path / "trian.jsonl"), revision=None, cache=tmp_path, split="train")
    message = str(caught.value)
    assert "trian.jsonl: does not exist" in message
    assert "has train.jsonl" in message
    assert "did you mean 'train.jsonl'?" in message


def test_a_missing_folder_and_a_forgotten_hub_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=f"its folder is missing too; {tmp_path} is the nearest one"):
        find_source(str(tmp_path / "no" / "such" / "a.jsonl"), revision=None, cache=tmp_path, split="train")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="for a dataset on the Hub write hub:org/clauses"):
        find_source("org/clauses", revision=None, cache=tmp_path, split="train")


def test_a_folder_without_data(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "x")
    with pytest.raises(DataError, match=r"is a folder without data files\n  got: notes\.txt\n  allowed: \.jsonl"):
        find_source(str(tmp_path), revision=None, cache=tmp_path, split="train")


def test_a_folder_with_more_than_data_is_not_read_in_part(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "LICENSE", "x")
    write(tmp_path / "more.xlsx", "x")
    (tmp_path / "older").mkdir()
    with pytest.raises(DataError, match=r"holds more than data files.*\n  got: more\.xlsx, older\n") as caught:
        find_source(str(tmp_path), revision=None, cache=tmp_path, split="train")
    assert "do this: move them away, or name the files one by one" in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- hub


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("hub:org/name", ("org/name", None, "validation")),
        ("hub:org/name/long", ("org/name", "long", "validation")),
        ("hub:org/name:test", ("org/name", None, "test")),
        ("hub:org/na.me-1/long_form:train[:10%]", None),
        ("hub:org/na.me-1/long_form:train", ("org/na.me-1", "long_form", "train")),
        ("hub:name", None),
        ("hub:", None),
        ("hub:../secret", None),
    ],
)
def test_hub_names(location: str, expected: tuple[str, str | None, str] | None) -> None:
    if expected is None:
        with pytest.raises(DataError, match="is not the name of a dataset on the Hub\n  allowed: hub:ORG/NAME"):
            hub.parse(location, default_split="train")
        return
    name = hub.parse(location, default_split="validation")
    assert (name.repository, name.subset, name.split) == expected


COMMITS = {
    "1" * 40: {"train.jsonl": b'{"text": "old"}\n', "README.md": b"---\nlicense: cc0-1.0\n---\n"},
    "2" * 40: {"train.jsonl": b'{"text": "new"}\n{"text": "newer"}\n', "README.md": b"---\nlicense: cc0-1.0\n---\n"},
}

ON_THE_HUB = """
import json, sys
from pathlib import Path
from trainer.data import hub
from trainer.data.sources import find_source
from trainer.errors import DataError
hub.HUB_SECONDS = float(sys.argv[3])
answers = []
for location, revision in json.loads(sys.argv[1]):
    try:
        source = find_source(location, revision=revision, cache=Path(sys.argv[2]), split="train")
        rows = [(dict(record.fields), str(record.origin)) for record in source.records()]
        answers.append([rows, source.revision, source.license, source.info(len(rows)).name])
    except DataError as error:
        answers.append(str(error))
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture
def loopback() -> Iterator[LoopbackHub]:
    hub_server = LoopbackHub(COMMITS, {"main": "2" * 40, "v1": "1" * 40})
    yield hub_server
    hub_server.close()


def ask_hub(
    url: str, asked: list[tuple[str, str | None]], tmp_path: Path, *, offline: bool = False, seconds: float = 10.0
) -> list[object]:
    """In a process of its own, since the Hub's libraries read their settings when they are imported."""
    environment = {
        **os.environ,  # noqa: TID251
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", ON_THE_HUB, json.dumps(asked), str(tmp_path / "cache"), str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert "ANSWERS" in done.stdout, done.stderr
    return json.loads(done.stdout.split("ANSWERS")[1])


def test_a_hub_dataset_is_pinned_to_a_commit(loopback: LoopbackHub, tmp_path: Path) -> None:
    newest, tagged, no_split, no_revision, unknown, gated = ask_hub(
        loopback.url,
        [
            ("hub:org/clauses", None),
            ("hub:org/clauses:train", "v1"),
            ("hub:org/clauses:tset", None),
            ("hub:org/clauses", "v9"),
            ("hub:org/clause", None),
            ("hub:org/gated", None),
        ],
        tmp_path,
    )
    assert newest == [
        [[{"text": "new"}, "hub:org/clauses:1"], [{"text": "newer"}, "hub:org/clauses:2"]],
        "2" * 40,
        "cc0-1.0",
        "org/clauses",
    ]
    assert tagged == [[[{"text": "old"}, "hub:org/clauses:train:1"]], "1" * 40, "cc0-1.0", "org/clauses:train"]
    assert "hub:org/clauses:tset: cannot be loaded" in str(no_split)
    assert "train" in str(no_split)
    assert "hub:org/clauses: has no such revision\n  got: data.revision=v9" in str(no_revision)
    assert "hub:org/clause: is not on the Hub, or is private" in str(unknown)
    assert "hub:org/gated: is gated\n  do this: accept its terms at" in str(gated)


def test_without_a_connection_only_a_commit_is_taken(loopback: LoopbackHub, tmp_path: Path) -> None:
    ask_hub(loopback.url, [("hub:org/clauses", "v1")], tmp_path)
    asked = [("hub:org/clauses", "1" * 40), ("hub:org/clauses", None), ("hub:org/clauses", "v1")]
    cached, *moving = ask_hub(loopback.url, asked, tmp_path, offline=True)
    assert cached == [[[{"text": "old"}, "hub:org/clauses:1"]], "1" * 40, "", "org/clauses"]
    for message in moving:
        assert "hub:org/clauses: the Hub cannot be reached" in str(message)
        assert "set data.revision to the full commit" in str(message)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("refuses", marks=pytest.mark.slow),
        "says 401",
        pytest.param("never answers", marks=pytest.mark.slow),
    ],
)
def test_a_commit_in_the_cache_needs_no_hub(loopback: LoopbackHub, tmp_path: Path, fault: str) -> None:
    ask_hub(loopback.url, [("hub:org/clauses", "v1")], tmp_path)
    with troubled_hub(fault) as (url, requests):
        cached, unknown = ask_hub(url, [("hub:org/clauses", "1" * 40), ("hub:org/clauses", "v1")], tmp_path, seconds=1)
    assert cached == [[[{"text": "old"}, "hub:org/clauses:1"]], "1" * 40, "", "org/clauses"]
    assert "hub:org/clauses: " in str(unknown), "a branch cannot be resolved without the Hub"
    assert len(requests) <= 2, "one question for each"


def test_a_hub_dataset_without_a_commit_or_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unpinned:
        def dataset_info(self, repository: str, *, revision: str | None, timeout: float) -> DatasetInfo:
            return DatasetInfo(id=repository, private=False, sha=None, tags=[])

    monkeypatch.setattr(hub, "HfApi", Unpinned)
    name = hub.parse("hub:org/clauses", default_split="train")
    with pytest.raises(DataError, match="the Hub names no commit for it\n  got: revision main"):
        hub.resolve(name, revision=None, cache=tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": []}))
    dataset = hub.HubDataset(name=name, commit="1" * 40, license="")
    with pytest.raises(DataError, match="hub:org/clauses: has no rows\n  got: commit 1111"):
        list(hub.records(dataset, cache=tmp_path, shown="hub:org/clauses"))


# ---------------------------------------------------------------------------------------------------------- mixture


def test_a_mixture_shows_its_parts_in_the_ratio_of_their_weights() -> None:
    small, large = [f"s{n}" for n in range(10)], [f"l{n}" for n in range(90)]
    mixture = mix([(small, 1.0), (large, 1.0)], seed=3)
    assert len(mixture.rows) == 100
    assert [(part.rows, part.used, part.left_out) for part in mixture.parts] == [(10, 50, 0), (90, 50, 40)]
    assert mixture.parts[0].repeats == 5.0
    assert {mixture.rows.count(row) for row in small} == {5}
    assert {mixture.rows.count(row) for row in large} == {0, 1}


def test_a_fraction_of_a_repeat_is_a_choice_without_repeats() -> None:
    mixture = mix([(list(range(10)), 3.0), (list(range(100, 120)), 1.0)], seed=0)
    counts = [mixture.rows.count(row) for row in range(10)]
    assert mixture.parts[0].used == 23  # 22.5 and 7.5: the tie goes to the earlier part
    assert sorted(counts) == [2] * 7 + [3] * 3


def test_a_mixture_depends_on_its_seed_alone() -> None:
    parts = [(list(range(50)), 1.0), (list(range(100, 300)), 2.0)]
    assert mix(parts, seed=1) == mix(parts, seed=1)
    assert mix(parts, seed=1).rows != mix(parts, seed=2).rows
    assert {row < 100 for row in mix(parts, seed=1).rows[:40]} == {True, False}  # parts are mingled


def test_apportion_sums_up_and_stays_within_one() -> None:
    counts = apportion([1.0, 1.0, 1.0, 0.5], 100)
    assert sum(counts) == 100
    assert all(abs(count - exact) < 1 for count, exact in zip(counts, [28.57, 28.57, 28.57, 14.29], strict=True))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "a mixture needs at least one part"),
        ([([1], 1.0), ([2], 0.0)], r"data\.mixture\[1\]\.weight: the weight is not a positive number\n  got: 0\.0"),
        ([([1], float("nan"))], "the weight is not a positive number"),
        ([([1], 1.0), ([], 1.0)], r"data\.mixture\[1\]: the part has no rows"),
        ([([1], 1.0), ([2], 0.001)], "the weight is too small: no row of the part would be seen"),
    ],
)
def test_mixtures_that_cannot_be(parts: list[tuple[list[int], float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        mix(parts, seed=0)
