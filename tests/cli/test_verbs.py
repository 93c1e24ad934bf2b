"""Verbs and options as a user types them: what they print, their exit codes, and that none of it needs torch."""

from pathlib import Path

import pytest
from cli_fixtures import NOTHING_HEAVY, trainer

from trainer import __version__


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--help"], "+experiment=legal_lora"),
        (["help"], "Experiments (+experiment=NAME):"),
        (["--version"], __version__),
        (["+experiment=smoke", "--cfg", "job"], "builtin:tiny"),
        (["-m", "+experiment=smoke", "run.seed=1,2", "--cfg", "job"], "[2 of 2] +experiment=smoke run.seed=2"),
    ],
)
def test_what_only_prints(tmp_path: Path, words: list[str], said: str) -> None:
    ended = trainer(tmp_path, *words)

    assert (ended.code, ended.err.splitlines()) == (0, [NOTHING_HEAVY])
    assert said in ended.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evalute", "+experiment=smoke"], ["unknown verb", "got: evalute", "did you mean 'evaluate'?"]),
        (["train", "outputs/none"], ["not a run folder", "got: outputs/none"]),
        (["--cfgg", "job"], ["unrecognized arguments: --cfgg"]),
        (["+experiment=smoke", "launch.processes=3"], ["the global batch does not divide among the ranks"]),
        (["verify", "+experiment=smoke"], ["the stage 'export' comes first", "python -m trainer export "]),
    ],
)
def test_what_is_refused(tmp_path: Path, words: list[str], said: list[str]) -> None:
    ended = trainer(tmp_path, *words)

    assert (ended.code, ended.out) == (2, "")
    *message, imported = ended.err.splitlines()
    assert message[0].startswith("error: ")
    assert imported == NOTHING_HEAVY
    assert "Traceback" not in ended.err
    for part in said:
        assert part in ended.err
