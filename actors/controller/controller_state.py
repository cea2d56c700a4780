"""Saves what a controller must know of its fleet after a restart."""

from dataclasses import dataclass

from pydantic import TypeAdapter
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from actors.controller.reconciler import Member
from runtime.config import Deployment

STATE_KEY = b"outrider-fleet"


@dataclass(frozen=True, slots=True)
class ControllerState:
    """Field names are those of the saved form.

    lives  number of lives of each name, so that no incarnation repeats
    """

    deployment: Deployment
    counts: dict[str, int]
    members: tuple[Member, ...]
    lives: dict[str, int]
    replaced: int


FORMAT = TypeAdapter(ControllerState)


def encode(state: ControllerState) -> bytes:
    return FORMAT.dump_json(state)


def decode(data: bytes) -> ControllerState:
    return FORMAT.validate_json(data)


class StateStore:
    """Keeps the state in Ray's key-value store, which lives as long as the actors."""

    def __init__(self) -> None:
        self._saved = b""

    def load(self) -> ControllerState | None:
        """Returns the state of the controller before this one; None if there was none."""
        data = _internal_kv_get(STATE_KEY)
        return None if data is None else decode(data)

    def save(self, state: ControllerState) -> None:
        """Writes the state if it has changed."""
        data = encode(state)
        if data != self._saved:
            _internal_kv_put(STATE_KEY, data, overwrite=True)
            self._saved = data

    def clear(self) -> None:
        _internal_kv_del(STATE_KEY)
