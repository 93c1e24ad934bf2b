"""The README is true: its commands exist and do what they say, with a tiny model in place of the built-in one.

`make demo` and the legal experiments as they stand take minutes: `make proofs` runs them.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from cli_fixtures import trainer

from trainer.drive.run import VERBS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
TRAINER = [
    command.removeprefix("python -m trainer ") for command in COMMANDS if command.startswith("python -m trainer ")
]
OWN_DATA = [command for command in TRAINER if "data.train=my.jsonl" in command]
QUICK = ("model=tiny", "launch.device=cpu", "optim.max_steps=3", "data.over_long=truncate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with rows of their own."""
    folder = tmp_path_factory.mktemp("user")
    rows = [
        {
            "prompt": f"Is clause {n} about payment?",
            "completion": "yes" if n % 2 else "no",
            "label": "yes" if n % 2 else "no",
        }
        for n in range(60)
    ]
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_every_make_target_of_the_readme_exists() -> None:
    targets = [shlex.split(command)[1:] for command in COMMANDS if command.startswith("make ")]
    assert ["demo"] in targets
    assert ["test"] in targets
    for words in targets:
        assert subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True).returncode == 0, words


def test_the_readme_still_shows_how_to_use_own_data() -> None:
    assert len(OWN_DATA) >= 4


@pytest.mark.parametrize("command", OWN_DATA)
def test_own_data_in_one_command(command: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    words = [word for word in shlex.split(command) if not word.startswith("model.path=")]
    ended = trainer(folder, *words, *QUICK, f"run.cache={folder / 'cache'}")
    assert ended.code == 0, ended.out + ended.err


@pytest.mark.parametrize("command", [command for command in TRAINER if command not in OWN_DATA])
def test_every_other_command_composes(command: str, tmp_path: Path) -> None:
    ended = trainer(tmp_path, "--cfg", "job", *shlex.split(command))
    assert ended.code == 0, ended.out + ended.err


def test_every_verb_is_in_the_table() -> None:
    table = README[README.index("| verb |") :]
    for verb in VERBS:
        assert f"`{verb}`" in table


def test_every_experiment_is_in_the_table() -> None:
    shipped = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    assert {name for name in re.findall(r"\+experiment=(\w+)`", README)} >= shipped
