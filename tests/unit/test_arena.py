"""The arena on disk: what goes in comes out, it is published whole or not at all, and damage is refused."""

import io
import json
import mmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_fixtures import Edit, Run, flip, random_arena, remove, runs, truncate, write_arena

from trainer_kernels import ARENA_FORMAT, ArenaError, ArenaWriter, TokenArena, reference
from trainer_kernels import writer as writing


@given(rows=st.lists(runs(), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_what_goes_in_comes_out(rows: list[Run]) -> None:
    with TemporaryDirectory() as folder:
        _check_round_trip(write_arena(Path(folder) / "arena", rows), rows)


def _check_round_trip(arena: TokenArena, rows: list[Run]) -> None:
    expected = [
        (ids[start : start + length], [mask[start + t] and t >= max(1, muted) for t in range(length)], muted)
        for ids, mask, views in rows
        for start, length, muted in views or [(0, len(ids), 0)]
    ]
    assert arena.num_documents == len(expected)
    for i, (ids, target, muted) in enumerate(expected):
        found_ids, found_target = arena.document(i)
        assert found_ids.tolist() == ids
        assert found_target.tolist() == target == reference.is_target(arena, i)
        assert int(arena.lengths[i]) == len(ids)
        assert int(arena.muted[i]) == muted
        assert int(arena.targets[i]) == sum(target)
    assert arena.num_tokens == sum(len(ids) for ids, _, _ in expected)
    assert arena.num_targets == sum(sum(target) for _, target, _ in expected)
    assert len(arena.tokens) == sum(len(ids) for ids, _, _ in rows)


def test_an_arena_is_mapped_read_only_and_stored_as_documented(tmp_path: Path) -> None:
    with ArenaWriter(tmp_path / "arena") as writer:
        writer.add([5, 6, 7], [False, True, True])
        arena = writer.close({"rows": 1, "source": "a.jsonl"})
    for array in (arena.tokens, arena.starts, arena.lengths, arena.muted, arena.targets):
        assert isinstance(array.base, np.memmap | mmap.mmap)
        assert type(array) is np.ndarray  # np.memmap is slow to index
    with pytest.raises(ValueError, match="read-only"):
        arena.tokens[0] = 1
    stored = np.fromfile(tmp_path / "arena" / "tokens.bin", "<u4").tolist()
    assert stored == [5 | 1 << 31, 6, 7]
    assert (arena.tokens.dtype, arena.starts.dtype) == (np.int32, np.int64)
    assert (arena.lengths.dtype, arena.muted.dtype, arena.targets.dtype) == (np.int32, np.int32, np.int32)
    assert arena.meta == {"rows": 1, "source": "a.jsonl"}
    assert sorted(file.name for file in arena.path.iterdir()) == [
        "lengths.npy",
        "meta.json",
        "muted.npy",
        "starts.npy",
        "targets.npy",
        "tokens.bin",
    ]


def test_the_hash_is_of_the_content_alone(tmp_path: Path) -> None:
    first = random_arena(tmp_path / "first", 20, 30)
    same = random_arena(tmp_path / "same", 20, 30)
    other = random_arena(tmp_path / "other", 20, 30, seed=1)
    assert first.sha256 == same.sha256
    assert first.sha256 != other.sha256
    opened = TokenArena.open(str(tmp_path / "first"), first.sha256)
    assert opened.sha256 == first.sha256
    with pytest.raises(ArenaError, match="is another arena than the one that was prepared") as caught:
        TokenArena.open(tmp_path / "other", first.sha256)
    assert (caught.value.got, caught.value.allowed) == (other.sha256, first.sha256)


def test_other_views_of_the_same_tokens_are_another_arena(tmp_path: Path) -> None:
    whole = write_arena(tmp_path / "whole", [([1, 2, 3], [True] * 3, None)])
    muted = write_arena(tmp_path / "muted", [([1, 2, 3], [True] * 3, [(0, 3, 2)])])
    assert whole.sha256 != muted.sha256


def test_nothing_is_published_when_writing_fails(tmp_path: Path) -> None:
    def write() -> None:
        with ArenaWriter(tmp_path / "arena") as writer:
            writer.add([1, 2], [True, True])
            raise RuntimeError("tokenizer fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_forgetting_close_is_an_error_and_publishes_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with ArenaWriter(tmp_path / "arena") as writer:
            writer.add([1, 2], [True, True])

    with pytest.raises(ArenaError, match=r"left without close\(\)") as caught:
        write()
    assert caught.value.got == "1 documents, now discarded"
    assert list(tmp_path.iterdir()) == []


def test_the_arena_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with ArenaWriter(tmp_path / "cache" / "arena") as writer:
        writer.add([1, 2], [True, True])
        assert not (tmp_path / "cache" / "arena").exists()
        writer.close()
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["arena"]


def test_of_two_writers_of_the_same_content_the_first_wins_and_both_go_on(tmp_path: Path) -> None:
    with ArenaWriter(tmp_path / "arena") as first, ArenaWriter(tmp_path / "arena") as second:
        for writer in (first, second):
            writer.add([1, 2], [True, True])
        assert first.close().sha256 == second.close().sha256
    assert [entry.name for entry in tmp_path.iterdir()] == ["arena"]


def test_of_two_writers_of_other_content_the_second_is_refused(tmp_path: Path) -> None:
    with ArenaWriter(tmp_path / "arena") as first, ArenaWriter(tmp_path / "arena") as second:
        first.add([1, 2], [True, True])
        second.add([1, 3], [True, True])
        kept = first.close()
        with pytest.raises(ArenaError, match="is another arena than the one that was prepared"):
            second.close()
    assert TokenArena.open(tmp_path / "arena", kept.sha256).document(0)[0].tolist() == [1, 2]


def test_a_failing_publication_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.rename", no_space)
    with ArenaWriter(tmp_path / "arena") as writer:
        writer.add([1, 2], [True, True])
        with pytest.raises(OSError, match="No space left"):
            writer.close()
    assert list(tmp_path.iterdir()) == []


class Disk(io.FileIO):
    """A file that notes where writes begin, and is full from a place on."""

    writes: ClassVar[list[tuple[int, int]]] = []
    room: ClassVar[int] = 1 << 40

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.room:
            raise OSError(28, "No space left on device")
        self.writes.append((self.tell(), len(data)))
        return super().write(data)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> type[Disk]:
    """``tokens.bin`` of new arenas is there, with the buffer that the writer asks for."""

    def opened(path: Path, mode: str, buffering: int = -1, **options: Any) -> Any:
        if path.name != "tokens.bin":
            return open(path, mode, buffering, **options)
        return io.BufferedWriter(Disk(path, "w"), buffering)

    monkeypatch.setattr(writing, "open", opened, raising=False)
    monkeypatch.setattr(Disk, "writes", [])
    return Disk


def test_tokens_are_written_in_whole_huge_pages(
    tmp_path: Path, disk: type[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "WRITTEN_AT_ONCE", 1 << 12)
    lengths = [*range(1, 400, 7), 5000, 3, 200, 1024, 2048, 9, 1020, 4, 1, 700, 700]
    arena = write_arena(tmp_path / "arena", [([7] * length, [True] * length, None) for length in lengths])
    assert arena.tokens.tolist() == [7] * sum(lengths)
    cut = [(begin, size) for begin, size in disk.writes if begin % 4096 and begin // 4096 < (begin + size - 1) // 4096]
    assert cut == [], "begun within a page and gone on into the next"
    assert len(disk.writes) <= 4 * sum(lengths) // 4096 + 2


def test_a_full_disk_leaves_nothing_and_is_named(
    tmp_path: Path, disk: type[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "room", 10_000)
    with pytest.raises(OSError, match="No space left"):
        write_arena(tmp_path / "arena", [([7] * 2000, [True] * 2000, None)] * 2)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_place_is_refused_at_once(tmp_path: Path) -> None:
    random_arena(tmp_path / "arena", 2, 5)
    with pytest.raises(ArenaError, match="the place of the new arena is taken"):
        ArenaWriter(tmp_path / "arena")


FILES = ["tokens.bin", "starts.npy", "lengths.npy", "muted.npy", "targets.npy"]


@pytest.mark.parametrize("name", FILES)
def test_missing_and_truncated_files_are_refused(tmp_path: Path, name: str) -> None:
    damages: list[tuple[Edit, str]] = [(truncate(name), "bytes instead of"), (remove(name), "the file is missing")]
    for place, (damage, words) in enumerate(damages):
        arena = random_arena(tmp_path / str(place), 5, 9)
        damage(arena.path)
        with pytest.raises(ArenaError, match=f"the arena is damaged: .*{name}") as caught:
            TokenArena.open(arena.path)
        assert words in caught.value.got


@pytest.mark.parametrize("name", FILES)
def test_changed_bytes_are_found_when_the_hash_is_known_or_asked_for(tmp_path: Path, name: str) -> None:
    arena = random_arena(tmp_path / "arena", 5, 9)
    flip(name)(arena.path)
    for expect_sha256, verify in ((arena.sha256, None), (None, True)):
        with pytest.raises(ArenaError, match=f"the arena is damaged: .*{name}") as caught:
            TokenArena.open(arena.path, expect_sha256, verify=verify)
        assert caught.value.got.startswith("sha256 ")


def _rewrite(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(record | changes))


def _write_a_list(folder: Path) -> None:
    (folder / "meta.json").write_text("[1]")


def test_records_that_cannot_be_trusted_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[Edit, str]] = [
        (lambda folder: (folder / "meta.json").unlink(), "there is no arena"),
        (lambda folder: truncate("meta.json")(folder), "not the record of an arena"),
        (_write_a_list, "not the record of an arena"),
        (lambda folder: _rewrite(folder, format=ARENA_FORMAT + 1), "is of another format"),
        (lambda folder: _rewrite(folder, kind="something"), "is of another format"),
        (lambda folder: _rewrite(folder, files={}), "not the record of an arena"),
        (lambda folder: _rewrite(folder, sha256="0" * 64), "its hash is not that of the hashes of its files"),
        (lambda folder: _rewrite(folder, num_documents=4), "instead of <i8[4]"),
        (lambda folder: _rewrite(folder, num_tokens=1), "its index names tokens that are not there"),
    ]
    for place, (damage, words) in enumerate(cases):
        arena = random_arena(tmp_path / str(place), 5, 9)
        damage(arena.path)
        with pytest.raises(ArenaError) as caught:
            TokenArena.open(arena.path)
        assert words in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("starts", -1), ("starts", 1 << 40), ("lengths", 0), ("muted", 99)])
def test_an_index_that_leaves_the_file_is_refused(tmp_path: Path, name: str, value: int) -> None:
    arena = random_arena(tmp_path / "arena", 5, 9)
    file = arena.path / f"{name}.npy"
    index = np.load(file)
    index[0] = value
    np.save(file, index)
    with pytest.raises(ArenaError, match="the arena is damaged") as caught:
        TokenArena.open(arena.path)
    assert caught.value.got == "its index names tokens that are not there"


def test_a_pickle_in_the_place_of_an_index_is_not_loaded(tmp_path: Path) -> None:
    arena = random_arena(tmp_path / "arena", 5, 9)
    file = arena.path / "starts.npy"
    size = file.stat().st_size
    file.write_bytes(b"\x80\x04N.".ljust(size, b"\0"))
    with pytest.raises(ArenaError, match=r"the arena is damaged: .*starts.npy") as caught:
        TokenArena.open(arena.path)
    assert caught.value.got == "not a plain array of numbers"


BAD_RUNS: list[tuple[Any, Any, Any, list[str]]] = [
    ([], [], None, ["tokens and their loss mask do not fit", "leave empty rows out"]),
    ([1, 2], [True], None, ["tokens and their loss mask do not fit", "ids int64[2], mask bool[1]"]),
    ([1, 2], [1, 0], None, ["tokens and their loss mask do not fit", "mask int64[2]"]),
    ([1.0, 2.0], [True, True], None, ["tokens and their loss mask do not fit", "ids float64[2]"]),
    ([1, -100], [True, True], None, ["a token id does not fit in 31 bits", "-100 to 1", "mark ignored tokens"]),
    ([1, 1 << 31], [True, True], None, ["a token id does not fit in 31 bits"]),
    ([1, 2], [True, True], [(1, 2, 0)], ["does not lie in its run", "start 1, length 2, muted 0 of 2 tokens"]),
    ([1, 2], [True, True], [(-1, 2, 0)], ["does not lie in its run", "start -1"]),
    ([1, 2], [True, True], [(0, 0, 0)], ["does not lie in its run", "length 0"]),
    ([1, 2], [True, True], [(0, 2, 3)], ["does not lie in its run", "muted 3"]),
    ([1, 2], [True, True], [(0, 2, -1)], ["does not lie in its run", "muted -1"]),
]


@pytest.mark.parametrize(("ids", "mask", "views", "words"), BAD_RUNS)
def test_rows_that_make_no_sense_are_refused(tmp_path: Path, ids: Any, mask: Any, views: Any, words: list[str]) -> None:
    with ArenaWriter(tmp_path / "arena") as writer:
        with pytest.raises(ArenaError) as caught:
            writer.add(ids, mask, views)
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
        writer.add([1], [True])
        assert writer.close().num_documents == 1


def test_an_arena_needs_documents_and_a_note_of_json(tmp_path: Path) -> None:
    with ArenaWriter(tmp_path / "arena") as writer:
        with pytest.raises(ArenaError, match="an arena needs documents"):
            writer.close()
        writer.add([1], [True], [])  # tokens without a document
        with pytest.raises(ArenaError, match="an arena needs documents"):
            writer.close()
        writer.add([1], [True])
        for note in ({"path": tmp_path}, {"loss": float("nan")}):
            with pytest.raises(ArenaError, match="the note of the arena is not JSON"):
                writer.close(note)
        writer.close()
        with pytest.raises(ArenaError, match="the writer has ended"):
            writer.add([1], [True])


def test_documents_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    arena = random_arena(tmp_path / "arena", 3, 5)
    for wrong in (-1, 3):
        with pytest.raises(ArenaError, match="there is no such document") as caught:
            arena.document(wrong)
        assert caught.value.allowed == "0 to 2"
