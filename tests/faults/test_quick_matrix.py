"""A short subset of ``make faults``: kills inside saves, a full disk, damaged files."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (apt-get install strace)")
def test_nothing_is_lost_at_a_few_points_of_every_row_that_injects() -> None:
    words = [sys.executable, str(HERE / "matrix.py"), "--quick", "--rows", "1,5,6,8"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()[2:]]
    points = {row[1].strip(): int(row[3]) for row in rows}
    assert min(points.values()) >= 4, points
    assert sum(points.values()) >= 50, points
