"""Content hashes: equal for equal content, different for any other, blind to dates and places."""

import os
from dataclasses import dataclass
from importlib.metadata import PackagePath
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer import fingerprint
from trainer.data.files import READERS
from trainer.errors import DataError
from trainer.fingerprint import (
    DATA_EXTENSIONS,
    data_files,
    digest,
    file_digest,
    package_digest,
    sampled_digest,
    tree_digest,
    visible_files,
)

MEGABYTE = 1 << 20


@dataclass
class Point:
    x: int
    y: float


def test_digest_is_of_canonical_json() -> None:
    assert digest({"b": 1, "a": [2.0, None]}) == digest({"a": [2.0, None], "b": 1})
    assert digest(Point(1, 2.0)) == digest({"y": 2.0, "x": 1})
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert len({digest(value) for value in (1, 1.5, "1", [1], None, True, {})}) == 7


def test_digest_refuses_what_json_cannot_say() -> None:
    with pytest.raises(TypeError, match="unsupported"):
        digest(object())


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    assert file_digest(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    before = file_digest(file)
    os.utime(file, (0, 0))
    assert file_digest(file) == before


def test_large_files_are_sampled_at_both_ends(tmp_path: Path) -> None:
    file = tmp_path / "big"
    size = 64 * MEGABYTE + 10

    def sparse(position: int, length: int = size) -> str:
        with file.open("wb") as handle:
            handle.truncate(length)
            handle.seek(position)
            handle.write(b"x")
        return sampled_digest(file)

    middle, head, tail, longer = sparse(size // 2), sparse(0), sparse(size - 1), sparse(size // 2, size + 1)
    assert len({middle, head, tail, longer}) == 4
    assert sparse(size // 2 + 1) == middle  # the middle of a large file is not read
    assert sparse(size // 4, 64 * MEGABYTE) == file_digest(file)


def test_tree_digest_knows_names_and_contents_but_no_places(tmp_path: Path) -> None:
    def make(name: str, files: dict[str, str]) -> Path:
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return tmp_path / name

    base = tree_digest([make("a", {"x": "1", "sub/y": "2"})])
    assert tree_digest([make("b", {"sub/y": "2", "x": "1", ".git/z": "3", "sub/.cache": "4"})]) == base
    assert tree_digest([make("c", {"x": "1", "sub/y": "3"})]) != base
    assert tree_digest([make("d", {"x": "1", "sub/z": "2"})]) != base
    assert tree_digest([make("e", {"x": "1", "y": "2"})]) != base
    assert tree_digest([tmp_path / "a/x"]) == tree_digest([tmp_path / "b/x"])
    assert tree_digest([tmp_path / "a/x", tmp_path / "a/sub/y"]) != tree_digest(
        [tmp_path / "a/sub/y", tmp_path / "a/x"]
    )
    assert visible_files(tmp_path / "b") == [tmp_path / "b/sub/y", tmp_path / "b/x"]


def test_data_files_are_those_that_can_be_read(tmp_path: Path) -> None:
    for name in ("b.JSONL", "a.csv.gz", "c.parquet", "readme.md", ".hidden.jsonl", "d.txt"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/e.jsonl").touch()
    assert [path.name for path in data_files(tmp_path)] == ["a.csv.gz", "b.JSONL", "c.parquet"]
    assert data_files(tmp_path / "readme.md") == [tmp_path / "readme.md"]
    assert set(DATA_EXTENSIONS) == set(READERS)


def test_package_digest_comes_from_the_record() -> None:
    assert package_digest("hydra-core") == package_digest("hydra-core")
    assert package_digest("hydra-core") != package_digest("omegaconf")


def test_compiled_files_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(name: str, value: str) -> PackagePath:
        path = PackagePath(name)
        path.hash = SimpleNamespace(mode="sha256", value=value)  # type: ignore[assignment]
        return path

    files = [entry("a.py", "1"), entry("b.json", "2")]
    monkeypatch.setattr(fingerprint, "distribution", lambda name: SimpleNamespace(files=files))
    before = package_digest("any")
    files.append(entry("__pycache__/a.pyc", "3"))
    assert package_digest("any") == before
    files[1] = entry("b.json", "4")
    assert package_digest("any") != before


def test_a_package_that_is_not_there() -> None:
    with pytest.raises(DataError, match="'no-such-package' is not installed") as caught:
        package_digest("no-such-package")
    assert "make assets" in caught.value.problems[0].do


@pytest.mark.parametrize("files", [None, []])
def test_a_package_without_hashes(monkeypatch: pytest.MonkeyPatch, files: list[PackagePath] | None) -> None:
    monkeypatch.setattr(fingerprint, "distribution", lambda name: SimpleNamespace(files=files))
    with pytest.raises(DataError, match="has no file hashes"):
        package_digest("any")
