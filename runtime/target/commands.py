"""Defines the commands of an engine's inbox, which any thread may send."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.core.messages import Chunk, Event, Reply, Request, StandbyText
from runtime.core.sampler_reference import GrammarState
from runtime.schedulers.base import Scheduler
from runtime.target.stop_checker import StopChecker

Send = Callable[[Event], None]
# Counts a message that no honest drafter sends against its sender; the argument says what is wrong
Strike = Callable[[str], object]
DeliverChunk = Callable[[Chunk], None]


def ignore_strike(why: str) -> bool:
    """A Strike that counts nothing and never ends the link, for drafters in this process."""
    return False


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Starts a request, or queues it."""

    request: Request
    stop_checker: StopChecker
    deliver: DeliverChunk
    received_at: float = 0.0  # clock reading
    grammar: GrammarState | None = None  # state after the committed tokens

    @property
    def expires(self) -> float:
        """Return the clock reading at which the request expires."""
        deadline = self.request.deadline
        return math.inf if deadline is None else self.received_at + deadline


@dataclass(frozen=True, slots=True)
class ReplyReceived:
    """A drafter's reply, and the clock reading of its arrival."""

    reply: Reply
    at: float


@dataclass(frozen=True, slots=True)
class Cancel:
    """Ends a session, running or waiting."""

    session: str


@dataclass(frozen=True, slots=True)
class Join:
    """Adds a drafter."""

    drafter: str
    send: Send
    strike: Strike = ignore_strike


@dataclass(frozen=True, slots=True)
class Leave:
    """Removes a drafter. One that has joined under the same name since then stays."""

    drafter: str
    send: Send  # the one given at Join


@dataclass(frozen=True, slots=True)
class SetScheduler:
    """Changes the scheduler, and the heads to use; None: all heads."""

    scheduler: Scheduler
    heads: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class StandbyReceived:
    """More of texts that other targets write, from one caller."""

    source: int
    texts: Sequence[StandbyText]


@dataclass(frozen=True, slots=True)
class StandbyOver:
    """Drops all texts of this caller."""

    source: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Ends the engine's loop."""


Command = (
    AddRequest
    | Cancel
    | ReplyReceived
    | Join
    | Leave
    | SetScheduler
    | StandbyReceived
    | StandbyOver
    | Stop
)
