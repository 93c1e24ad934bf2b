"""Markers: a stage is skipped for exactly the inputs it was finished for, and never because of a damaged file."""

from pathlib import Path

import pytest

from trainer.markers import STAGES, Marker, is_current, marker_path, read_marker, write_marker
from trainer.paths import RunFolder

MARKER = Marker(
    stage="train",
    inputs="abc",
    seconds=1.5,
    finished="2026-01-01T00:00:00Z",
    summary={"loss": 0.25, "steps": 3, "best": "x"},
)


def test_round_trip(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert read_marker(folder, "train") is None
    write_marker(folder, MARKER)
    assert read_marker(folder, "train") == MARKER
    assert is_current(folder, "train", "abc")
    assert not is_current(folder, "train", "abd")
    assert not is_current(folder, "evaluate", "abc")
    assert marker_path(folder, "train") == tmp_path / "run/stages/train.json"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"stage": "train"}', '{"stage": "train", "inputs": 1}'])
def test_a_damaged_marker_counts_as_absent(tmp_path: Path, text: str) -> None:
    folder = RunFolder(tmp_path)
    write_marker(folder, MARKER)
    marker_path(folder, "train").write_text(text)
    assert read_marker(folder, "train") is None
    assert not is_current(folder, "train", "abc")


def test_a_marker_under_another_name_counts_as_absent(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_marker(folder, MARKER)
    marker_path(folder, "train").rename(marker_path(folder, "export"))
    assert read_marker(folder, "export") is None


def test_a_marker_of_a_later_version_is_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_marker(folder, MARKER)
    path = marker_path(folder, "train")
    path.write_text(path.read_text().replace("{", '{"new": 1,', 1))
    assert read_marker(folder, "train") == MARKER


def test_only_known_stages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no stage 'tune'; stages are prepare, baseline, train"):
        read_marker(RunFolder(tmp_path), "tune")
    assert STAGES == ("prepare", "baseline", "train", "evaluate", "export", "verify", "card")
