"""The option that rewrites golden files: ``pytest tests/golden --update-golden``. The commit says why they changed."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files instead of comparing")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to rewrite."""
    return bool(request.config.getoption("--update-golden", default=False))
