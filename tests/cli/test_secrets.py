"""A secret of the environment is in no file that a run leaves, and in nothing that it prints."""

from pathlib import Path
from unittest.mock import patch

import cli_fixtures
import pytest
from cli_fixtures import CANARIES, places_of, trainer


def test_no_file_of_a_run_and_no_line_of_it_holds_a_secret(tmp_path: Path) -> None:
    words = ["train", "+experiment=smoke", "launch.device=cpu", "optim.max_steps=2", "run.dir=run", "run.cache=cache"]
    with patch.dict(cli_fixtures.ENVIRONMENT, CANARIES):
        ended = trainer(tmp_path, *words)
    assert ended.code == 0, ended.out + ended.err
    for secret in CANARIES.values():
        assert secret not in ended.out + ended.err
        assert places_of(secret, tmp_path) == []


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY"])
def test_the_search_would_find_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0.log").write_text(f"env: {name}={CANARIES[name]}\n")
    assert len(places_of(CANARIES[name], tmp_path)) == 1
