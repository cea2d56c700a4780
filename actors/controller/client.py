"""The controller that serves, as other processes of its cluster find and ask it."""

from typing import Any

from actors.controller.fleet_view import Fleet
from actors.ray_session import NAMESPACE, translate_ray_errors
from runtime.core.errors import Unavailable

NAME = "controller"
ANSWER_TIMEOUT_S = 10.0
NOT_SERVED = "nothing is served in this cluster: start it with `outrider serve`"


def find_controller() -> Any | None:
    """Returns the controller's Ray handle; None if nothing is served in this cluster.

    Callers find it anew each time: a controller that was lost comes back under its name.
    """
    import ray

    try:
        return ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        return None


def ask_controller(
    method: str, *arguments: object, timeout_s: float | None = ANSWER_TIMEOUT_S
) -> Any:
    """Returns the controller's answer; waits for ever if `timeout_s` is None.

    Raises what the controller raises; Unavailable if there is none, or it does not answer in time.
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
                f"the controller does not answer within {timeout_s:g} s: see `outrider logs controller`"
            ) from error


def fetch_fleet() -> Fleet:
    """Returns the controller's view of its fleet. Raises as `ask_controller`."""
    fleet: Fleet = ask_controller("fleet")
    return fleet
