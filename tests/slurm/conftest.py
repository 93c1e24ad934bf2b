"""A cluster for all tests of a file, and the commands of Slurm pointed at it."""

from collections.abc import Iterator

import pytest
from slurm_cluster import Cluster, cluster, why_not


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    """A cluster of four nodes."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with cluster() as made:
        yield made


@pytest.fixture
def lab(running: Cluster) -> Iterator[Cluster]:
    """The same, for this test's process too."""
    with running.commands():
        yield running
