"""A machine without any writable folder still packs, and says that it compiles anew."""

import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

import trainer_kernels
from trainer_kernels.compiled import compiled

PROGRAM = """
import sys
import numpy as np
from trainer_kernels import pack
from trainer_kernels import order
print(order.__file__)
print(pack(np.array([3, 2, 1]), 4).pack(0).tolist())
"""


def _run(package: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM]
    base = {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=base | environment, capture_output=True, text=True, check=False, timeout=300)


def _unwritable_install(folder: Path) -> Path:
    """A copy of the package in which not even root can make ``__pycache__``: a file has that name."""
    source = Path(trainer_kernels.__file__).parent
    shutil.copytree(source, folder / "trainer_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "trainer_kernels" / "__pycache__").write_text("not a folder")
    return folder


def test_a_read_only_install_and_home_compile_in_memory_with_one_warning(tmp_path: Path) -> None:
    install = _unwritable_install(tmp_path / "install")
    (tmp_path / "home").write_text("not a folder")
    result = _run(install, {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")})
    assert result.returncode == 0, result.stderr
    assert str(install) in result.stdout
    assert result.stderr.count("Set NUMBA_CACHE_DIR to a writable folder") == 1, result.stderr


def test_a_given_cache_folder_is_used(tmp_path: Path) -> None:
    install = _unwritable_install(tmp_path / "install")
    (tmp_path / "home").write_text("not a folder")
    result = _run(install, {"HOME": str(tmp_path / "home"), "NUMBA_CACHE_DIR": str(tmp_path / "cache")})
    assert (result.returncode, result.stderr) == (0, "")
    assert list((tmp_path / "cache").rglob("*.nbi"))


def test_other_errors_of_the_compiler_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**options: bool) -> None:
        raise RuntimeError("compiler on fire")

    monkeypatch.setattr(numba, "njit", broken)
    with pytest.raises(RuntimeError, match="compiler on fire"):
        compiled(_nothing)


def _nothing() -> None:
    """Something to compile."""
