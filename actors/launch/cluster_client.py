"""Reaches what is served: joins the cluster, and asks the controller in it."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from actors.fleet import Fleet
from actors.launch import local_ray
from actors.launch.local_ray import LocalRay
from actors.ray_edge import NAMESPACE, joined
from runtime.errors import Unavailable

PATIENCE = 10.0  # seconds for the controller's answer


def chosen(address: str | None) -> str | None:
    """The cluster that the user names, by --address or in the environment; None where the local one is meant."""
    return address or os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def cluster(address: str | None, start: bool = False) -> Iterator[LocalRay | None]:
    """This process in the cluster; yields the local one if it is that. With `start`, a local one is started where there is none.

    Raises Unavailable where there is none, or it does not answer.
    """
    if named := chosen(address):
        with joined(named):
            yield None
        return
    local = local_ray.find() or (local_ray.start() if start else None)
    if local is None:
        raise Unavailable("nothing is served on this machine: start it with `outrider serve`, or give --address of a cluster")
    with local_ray.joining(local), joined(local.address):
        yield local


class Controller:
    """The one that serves in the cluster that this process has joined. Raises Unavailable where there is none."""

    def __init__(self) -> None:
        import ray

        from actors.controller import NAME

        try:
            self.handle: Any = ray.get_actor(NAME, namespace=NAMESPACE)
        except ValueError as error:
            raise Unavailable("nothing is served in this cluster: start it with `outrider serve`") from error

    def ask(self, method: str, *arguments: object, patience: float | None = PATIENCE) -> Any:
        """Its answer. Raises what it raises; Unavailable where it does not answer in so many seconds."""
        import ray
        from ray.exceptions import GetTimeoutError

        try:
            return ray.get(getattr(self.handle, method).remote(*arguments), timeout=patience)
        except GetTimeoutError as error:
            raise Unavailable(f"the controller does not answer within {patience:g} s: see `outrider logs controller`") from error

    def fleet(self) -> Fleet:
        found: Fleet = self.ask("fleet")
        return found


@contextlib.contextmanager
def controller(address: str | None) -> Iterator[Controller]:
    """That of the cluster. Raises as `cluster` and `Controller`."""
    with cluster(address):
        yield Controller()
