"""Defines the commands of a draft engine's inbox, which any thread may send."""

from collections.abc import Callable
from dataclasses import dataclass

from runtime.core.messages import Event, Reply

Send = Callable[[Reply], None]


@dataclass(frozen=True, slots=True)
class EventReceived:
    """An event from one stream. Session names are private to a stream."""

    stream: int
    event: Event
    send: Send


@dataclass(frozen=True, slots=True)
class GrowthDropped:
    """A draft of a session was dropped on the way, so the target cannot place later ones."""

    stream: int
    session: str


@dataclass(frozen=True, slots=True)
class StreamClosed:
    """A stream has ended, and all its sessions with it."""

    stream: int


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Command = EventReceived | GrowthDropped | StreamClosed | Stop
