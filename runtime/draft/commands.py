"""What may be put into a draft engine's inbox, from any thread."""

from collections.abc import Callable
from dataclasses import dataclass

from runtime.core.messages import Event, Reply

Send = Callable[[Reply], None]


@dataclass(frozen=True, slots=True)
class EventReceived:
    """An event that came in on one stream; the names of its sessions are the stream's own."""

    stream: int
    event: Event
    send: Send


@dataclass(frozen=True, slots=True)
class GrowthDropped:
    """Growth of a session was dropped on the way: what hangs on it means nothing to the target."""

    stream: int
    session: str


@dataclass(frozen=True, slots=True)
class StreamClosed:
    """A stream is over, and with it all its sessions."""

    stream: int


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Command = EventReceived | GrowthDropped | StreamClosed | Stop
