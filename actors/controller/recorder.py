"""Calls all targets and drafters at once: for recordings, and to save calibrations."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from actors.controller.actor_handles import ActorHandle
from actors.controller.reconciler import ANSWER_TIMEOUT_S
from runtime.telemetry.tracing import Recording


def set_recording(handles: Sequence[ActorHandle], on: bool) -> None:
    """Switches recording on or off; returns when all have answered or timed out."""
    ask_all(handles, "recording", on, timeout_s=ANSWER_TIMEOUT_S)


def take_recordings(handles: Sequence[ActorHandle]) -> list[Recording]:
    """Returns the recordings of the actors since the last call.

    Actors that are lost or do not answer in time are omitted.
    """
    found: list[Recording] = []
    for answer in ask_all(handles, "trace", timeout_s=ANSWER_TIMEOUT_S):
        try:
            found.append(ray.get(answer))
        except RayError:
            continue
    return found


def save_calibrations(handles: Sequence[ActorHandle], timeout_s: float = 0.0) -> None:
    """Lets the actors save their calibrations; waits at most `timeout_s` seconds."""
    ask_all(handles, "save_calibrations", timeout_s=timeout_s)


def ask_all(
    handles: Sequence[ActorHandle], method: str, *arguments: object, timeout_s: float
) -> list[Any]:
    """Calls a method of all actors; returns the answers that arrive within `timeout_s` seconds."""
    answers = [getattr(handle.actor, method).remote(*arguments) for handle in handles]
    if not answers or not timeout_s:
        return []
    answered, _ = ray.wait(answers, num_returns=len(answers), timeout=timeout_s)
    return list(answered)
