"""Joins the Ray cluster that serves: the one that the user names, or the local one."""

import contextlib
import os
from collections.abc import Iterator

from actors.launch import local_ray
from actors.launch.local_ray import LocalRay
from actors.ray_session import ray_cluster
from runtime.core.errors import Unavailable


def chosen_address(address: str | None) -> str | None:
    """The cluster that the user names, by --address or in the environment; None where the local one is meant."""
    return address or os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def join_cluster(address: str | None, start: bool = False) -> Iterator[LocalRay | None]:
    """This process in the cluster; yields the local one if it is that. With `start`, a local one is started where there is none.

    Raises Unavailable where there is none, or it does not answer.
    """
    if named := chosen_address(address):
        with ray_cluster(named):
            yield None
        return
    local = local_ray.find() or (local_ray.start() if start else None)
    if local is None:
        raise Unavailable(
            "nothing is served on this machine: start it with `outrider serve`, or give --address of a cluster"
        )
    with local_ray.join_environment(local), ray_cluster(local.address):
        yield local
