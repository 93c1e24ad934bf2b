"""Data that the runs of one file share: every run has a folder of its own with links to it."""

from pathlib import Path

import pytest
from train_fixtures import make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arenas of both splits."""
    return make_data(tmp_path_factory.mktemp("data"))
