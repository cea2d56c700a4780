"""One Ray for all tests here; those of the command's own Ray start that one beside it."""

from collections.abc import Iterator

import pytest

from actors.fleet.ray_session import ray_cluster

CPUS = 16  # Ray's, not the machine's: enough for all actors that any test here wants at one time


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """Joins a Ray of its own. A test stops what it starts; actor names begin with its prefix."""
    with ray_cluster(None, cpus=CPUS):
        yield
