"""One Ray for all tests here; those of the command's own Ray start that one beside it."""

from collections.abc import Iterator

import pytest

from actors.fleet.ray_session import ray_cluster

CPUS = 16  # Ray's, not the machine's: enough for all actors that any test here wants at one time


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """This process is in a Ray of its own. What a test starts in it, it stops; names of actors begin with a prefix of the test's."""
    with ray_cluster(None, cpus=CPUS):
        yield
