"""Tokens in the cache: used again when they are whole, named and made again when they are not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from prepare_fixtures import planned

from trainer import prepare as stage
from trainer.data import tokenized
from trainer.paths import RunFolder
from trainer.samples import Prepared
from trainer_kernels import TokenArena


def cut(arena: Path) -> None:
    with open(arena / "tokens.bin", "r+b") as stream:
        stream.truncate(16)


def flip_a_bit(arena: Path) -> None:
    content = bytearray((arena / "tokens.bin").read_bytes())
    content[5] ^= 1
    (arena / "tokens.bin").write_bytes(content)


def spoil_the_account(arena: Path) -> None:
    (arena.parent / tokenized.REPORT).write_text("{}")


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (cut, "16 bytes instead of"),
    (flip_a_bit, "instead of"),
    (shutil.rmtree, "there is no arena"),
    (spoil_the_account, "missing required field"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A prepared run, with a cache of its own. Whoever damages its tokens prepares it again."""
    folder = planned(tmp_path_factory.mktemp("cache"), "+experiment=smoke")
    stage.prepare(folder)
    return folder


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_damaged_tokens_in_the_cache_are_named_and_made_again(
    run: RunFolder, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], words: str
) -> None:
    """Ranks refuse them and say to prepare again: so that has to help."""
    first = msgspec.json.decode(run.prepared_json.read_bytes(), type=Prepared)
    damage(Path(first.train.arena))
    again = stage.prepare(run)
    printed = capsys.readouterr()
    said = " ".join(printed.err.split())
    assert "the tokens in the cache are damaged and are made again" in said
    assert words in said
    assert "tokens made" in printed.out
    assert again.train == first.train
    TokenArena.open(again.train.arena, expect_sha256=first.train.arena_sha256)
