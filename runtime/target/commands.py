"""What may be put into an engine's inbox, from any thread."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from runtime.core.messages import Chunk, Event, Reply, Request
from runtime.core.sampler_reference import GrammarState
from runtime.schedulers.base import Scheduler
from runtime.target.stop_checker import StopChecker

Send = Callable[[Event], None]
Strike = Callable[
    [str], object
]  # counts a message that no honest drafter sends against its sender; says what is wrong with it
DeliverChunk = Callable[[Chunk], None]


def ignore_strike(why: str) -> bool:
    """A Strike that counts nothing and never ends the link: a drafter in this very process is trusted as far as that."""
    return False


@dataclass(frozen=True, slots=True)
class AddRequest:
    request: Request
    stop_checker: StopChecker
    deliver: DeliverChunk
    received_at: float = 0.0  # clock when the target took the request
    grammar: GrammarState | None = None  # the request's constraint, after what is committed

    @property
    def expires(self) -> float:
        """Clock from which on nobody wants the rest."""
        deadline = self.request.deadline
        return math.inf if deadline is None else self.received_at + deadline


@dataclass(frozen=True, slots=True)
class ReplyReceived:
    """A drafter's reply, and the clock when it arrived."""

    reply: Reply
    at: float


@dataclass(frozen=True, slots=True)
class Cancel:
    session: str


@dataclass(frozen=True, slots=True)
class Join:
    drafter: str
    send: Send
    strike: Strike = ignore_strike


@dataclass(frozen=True, slots=True)
class Leave:
    drafter: str
    send: Send  # as at Join: who has joined under the same name since then stays


@dataclass(frozen=True, slots=True)
class SetScheduler:
    """Schedule like this from now on, and ask these heads; None: all that there are."""

    scheduler: Scheduler
    heads: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Command = AddRequest | Cancel | ReplyReceived | Join | Leave | SetScheduler | Stop
