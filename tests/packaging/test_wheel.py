"""sdist -> wheel -> install -> run from an empty folder, beside a stand-in for Hugging Face's `kernels` package.

The stand-in is what breaks a repository that has an importable top-level `kernels`: transformers imports it.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDIN = """
__version__ = "0.18.2"
STANDIN = True
def __getattr__(name):  # whatever transformers imports by name and uses as a decorator while it is imported
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *positional, **named: lambda decorated: decorated
"""


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sdist and the wheel that was built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    result = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which only the wheel (and a stand-in `kernels`) provides our packages."""
    site = tmp_path_factory.mktemp("site")
    wheel = next(built.glob("*.whl"))
    result = run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel), cwd=site
    )
    assert result.returncode == 0, result.stderr
    standin = site / "kernels"
    standin.mkdir()
    (standin / "__init__.py").write_text(STANDIN)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # noqa: TID251
    return environment | {"PYTHONPATH": str(site), "SITE": str(site)}


def test_the_wheel_has_three_packages_and_the_config(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"trainer", "trainer_kernels", "trainer_launch"}
    for needed in (
        "trainer/conf/config.yaml",
        "trainer/slurm/job.sbatch",
        "trainer/conf/experiment/legal_lora.yaml",
        "trainer/py.typed",
        "trainer_kernels/py.typed",
        "trainer_launch/py.typed",
    ):
        assert needed in names
    assert any(name.endswith(".jinja") for name in names), "the built-in chat templates are missing"


def test_the_sdist_has_the_tests_and_the_licence(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {"LICENSE", "Makefile", "constraints.txt", "tests/packaging/test_wheel.py"} <= names


def test_the_installed_command_composes_from_an_empty_folder(installed: dict[str, str], tmp_path: Path) -> None:
    result = run(sys.executable, "-m", "trainer", "--cfg", "job", "+experiment=legal_lora", cwd=tmp_path, env=installed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "name: legal_lora" in result.stdout
    where = run(sys.executable, "-c", "import trainer; print(trainer.__file__)", cwd=tmp_path, env=installed)
    assert where.stdout.startswith(installed["SITE"])


def test_transformers_still_imports_from_the_root_beside_the_real_kernels_name(installed: dict[str, str]) -> None:
    code = (
        "import kernels; assert kernels.STANDIN, kernels\n"
        "import trainer_kernels, trainer_launch\n"
        "from transformers import LlamaForCausalLM\n"
    )
    result = run(sys.executable, "-c", code, cwd=ROOT, env=installed)
    assert result.returncode == 0, result.stderr


def test_no_source_root_is_an_importable_package() -> None:
    for folder in ("kernels", "launch", "conf", "slurm", "tests"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would shadow other packages"
