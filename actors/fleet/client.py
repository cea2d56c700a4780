"""Finds and calls the controller from other processes of its cluster."""

from typing import Any

from actors.fleet.fleet_state import Fleet
from actors.fleet.ray_session import NAMESPACE, translate_ray_errors
from runtime.core.errors import Unavailable

NAME = "controller"
ANSWER_TIMEOUT_S = 10.0
NOT_SERVED = "nothing is served in this cluster: start it with `outrider serve`"


def find_controller() -> Any | None:
    """Returns the controller's Ray handle; None if nothing is served in this cluster.

    Callers look it up each time: a restarted controller has the same name and another handle.
    """
    import ray

    try:
        return ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        return None


def ask_controller(
    method: str, *arguments: object, timeout_s: float | None = ANSWER_TIMEOUT_S
) -> Any:
    """Calls a method of the controller and returns its answer.

    Waits forever if `timeout_s` is None. Raises what the controller raises, and Unavailable if
    there is none or it does not answer in time.
    """
    import ray
    from ray.exceptions import GetTimeoutError

    with translate_ray_errors():
        if (controller := find_controller()) is None:
            raise Unavailable(NOT_SERVED)
        try:
            return ray.get(getattr(controller, method).remote(*arguments), timeout=timeout_s)
        except GetTimeoutError as error:
            raise Unavailable(
                f"no answer from the controller within {timeout_s:g} s: see `outrider logs "
                "controller`"
            ) from error


def fetch_fleet() -> Fleet:
    """Returns the controller's view of its fleet. Raises as `ask_controller`."""
    fleet: Fleet = ask_controller("fleet")
    return fleet
