"""Joins the Ray cluster of the deployment: the one that the user names, or the local one."""

import contextlib
import os
from collections.abc import Iterator

from actors.fleet.ray_session import ray_cluster
from actors.launch import local_ray
from actors.launch.local_ray import LocalRay
from runtime.core.errors import Unavailable


def chosen_address(address: str | None) -> str | None:
    """Returns the address from --address or RAY_ADDRESS; None for the local cluster."""
    return address or os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def join_cluster(address: str | None, start: bool = False) -> Iterator[LocalRay | None]:
    """Joins the cluster inside the block; yields the local one if it is that, else None.

    With `start`, a local cluster is started if there is none. Raises Unavailable if there is none,
    or it does not answer.
    """
    if named := chosen_address(address):
        with ray_cluster(named):
            yield None
        return
    local = local_ray.find() or (local_ray.start() if start else None)
    if local is None:
        raise Unavailable(
            "no deployment on this machine: start one with `outrider serve`, or give --address of "
            "a cluster"
        )
    with local_ray.join_environment(local), ray_cluster(local.address):
        yield local
