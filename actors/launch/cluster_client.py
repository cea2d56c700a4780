"""Reaches what is served: joins the cluster, and asks the controller in it."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from actors.controller import client
from actors.controller.fleet_view import Fleet
from actors.launch import local_ray
from actors.launch.local_ray import LocalRay
from actors.ray_session import joined
from runtime.core.errors import Unavailable


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
        raise Unavailable(
            "nothing is served on this machine: start it with `outrider serve`, or give --address of a cluster"
        )
    with local_ray.joining(local), joined(local.address):
        yield local


class Controller:
    """The controller of the cluster that this process has joined."""

    def ask(
        self, method: str, *arguments: object, timeout_s: float | None = client.ANSWER_TIMEOUT_S
    ) -> Any:
        """Returns its answer; raises as `client.ask`."""
        return client.ask(method, *arguments, timeout_s=timeout_s)

    def fleet(self) -> Fleet:
        found: Fleet = self.ask("fleet")
        return found


@contextlib.contextmanager
def controller(address: str | None) -> Iterator[Controller]:
    """Yields the controller of the cluster. Raises as `cluster`."""
    with cluster(address):
        yield Controller()
