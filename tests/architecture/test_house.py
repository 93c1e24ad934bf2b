"""The rules of the house that a machine can keep: layers, the torch-free driver, links, the test folders."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_import_contracts_hold() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([str(lint), "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_driver_starts_without_torch() -> None:
    code = (
        "import sys\n"
        "import trainer.__main__\n"
        "heavy = [n for n in ('torch', 'transformers', 'peft', 'datasets', 'numba') if n in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_every_module_says_why_it_exists() -> None:
    sources = [path for folder in ("trainer", "kernels", "launch", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 40
    silent = [
        str(path.relative_to(ROOT)) for path in sources if not path.read_text().lstrip().startswith(('"""', 'r"""'))
    ]
    assert not silent


def test_relative_links_in_the_documents_lead_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")]
    assert len(documents) >= 4
    broken = [
        f"{document.name}: {target}"
        for document in documents
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert not broken


def test_one_basename_per_test_file_and_no_package_in_tests() -> None:
    """importmode=importlib would otherwise hide a test behind its namesake; tests/kernels would shadow a package."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "tests" / "kernels").exists()
