"""A connection to one life of a target: its load, its heartbeats, and the chunks that it sends."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from actors.fleet.fleet_state import TargetState
from actors.routing.routed_session import TargetLife
from actors.routing.silence import CHECK_PERIOD_S, Silence
from actors.routing.standby_feed import StandbyFeed
from runtime.core.errors import InvalidRequest, TargetDied, Unavailable
from runtime.core.messages import Chunk, Request, StandbyText

log = logging.getLogger(__name__)

Key = TypeVar("Key")


class RemoteTarget(Protocol):
    """A target in another process, as actors.rpc.client.GrpcTarget."""

    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]: ...

    def heartbeats(self) -> AsyncGenerator[None, None]:
        """Yields at each heartbeat; ends, or raises Unavailable, where there are none."""
        ...

    async def standby(self, updates: AsyncGenerator[Sequence[StandbyText], None]) -> None:
        """Tells it texts that other targets write. Raises Unavailable if it is lost, or does not
        listen.
        """
        ...

    async def close(self) -> None:
        """Closes the connection and ends every call on it."""
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """A target's load.

    sessions       running and waiting
    capacity       slots of KV memory, 0 if unknown
    suspect        silent, or lost a moment ago
    last_assigned  number of the session that it got last; rises with every assignment
    """

    sessions: int
    capacity: int = 0
    suspect: bool = False
    last_assigned: int = 0


def least_loaded(loads: Mapping[Key, Load]) -> Key | None:
    """Returns the target with the fewest sessions for its capacity; None without targets.

    Of equals it is the one that has waited longest for a session. Suspects come last. An unknown
    capacity counts as the largest known one.
    """
    most = max((load.capacity for load in loads.values()), default=0) or 1

    def rank(key: Key) -> tuple[bool, float, int]:
        load = loads[key]
        return load.suspect, (load.sessions + 1) / (load.capacity or most), load.last_assigned

    return min(loads, key=rank, default=None)


@dataclass(slots=True, eq=False)
class TargetLink:
    """A connection to one incarnation of a target.

    sessions  this router's
    others    those of other callers, when `state` was reported
    reading   timeouts of the readers of its next chunk, rescheduled to wake them when it is lost
    feed      texts of other targets, which it could take over
    tasks     what runs as long as the connection: its heartbeats and its feed
    silence   what its heartbeats tell, None without heartbeats
    silent    its silence is a loss, and another target is heard: sessions leave it
    """

    life: TargetLife
    remote: RemoteTarget
    state: TargetState
    sessions: int = 0
    others: int = 0
    last_assigned: int = 0
    suspect_until: float = -math.inf
    removed: bool = False
    reading: set[asyncio.Timeout] = field(default_factory=set)
    feed: StandbyFeed = field(default_factory=StandbyFeed)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    silence: Silence | None = None
    silent: bool = False

    def wake_readers(self) -> None:
        now = asyncio.get_running_loop().time()
        for scope in self.reading:
            scope.reschedule(now)

    async def close(self) -> None:
        """Closes the connection, which ends the calls that nobody reads right now."""
        for task in self.tasks.values():
            task.cancel()
        await self.remote.close()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)

    def load(self, now: float) -> Load:
        report = self.state.report
        return Load(
            self.sessions + self.others,
            report.kv_slots if report else 0,
            self.silent or now < self.suspect_until,
            self.last_assigned,
        )


async def listen(link: TargetLink, hears_another: Callable[[TargetLink], bool]) -> None:
    """Follows the heartbeats of a target until they end, which is not its silence."""
    loop = asyncio.get_running_loop()
    checking: asyncio.Task[None] | None = None
    try:
        async with aclosing(link.remote.heartbeats()) as heartbeats:
            async for _ in heartbeats:
                if link.silence is None:
                    link.silence = Silence(loop.time())
                    checking = loop.create_task(check_silence(link, link.silence, hears_another))
                link.silence.heartbeat(loop.time())
                link.silent = False
    except Unavailable as error:
        log.debug("no heartbeats of target %s: %s", link.state.name, error)
    finally:
        if checking is not None:
            checking.cancel()
        link.silence, link.silent = None, False


async def feed_standby(link: TargetLink) -> None:
    """Tells a target the texts of its feed until it does not listen any more."""
    try:
        async with aclosing(link.feed.updates()) as updates:
            await link.remote.standby(updates)
    except (Unavailable, InvalidRequest) as error:
        log.debug("target %s keeps no texts of others: %s", link.state.name, error)


async def check_silence(
    link: TargetLink, silence: Silence, hears_another: Callable[[TargetLink], bool]
) -> None:
    """Lets sessions leave the target when its silence is a loss, if another one is heard.

    If all are silent, it is the network or this process, and there is nowhere to go.
    """
    while True:
        await asyncio.sleep(CHECK_PERIOD_S)
        silence.look(asyncio.get_running_loop().time())
        if silence.is_loss and not link.silent and hears_another(link):
            link.silent = True
            link.wake_readers()


async def next_chunk(
    link: TargetLink, call: AsyncGenerator[Chunk, None], until: float
) -> Chunk | None:
    """Returns the call's next chunk; None if it does not arrive by `until`.

    Raises Unavailable if the target is removed, TargetDied if its stream ends early or it is
    silent.
    """
    if link.removed:
        raise Unavailable("it has left the cluster")
    if link.silent:
        raise TargetDied("it is silent")
    scope = asyncio.timeout_at(until if until < math.inf else None)
    try:
        async with scope:
            link.reading.add(scope)
            try:
                return await anext(call)
            finally:
                link.reading.discard(scope)
    except StopAsyncIteration as error:
        raise TargetDied("its stream ended early") from error
    except TimeoutError as error:
        if link.removed:
            raise Unavailable("it has left the cluster") from error
        if not scope.expired():
            raise
        if (when := scope.when()) is not None and when < until:
            # Woken for its silence. It may be heard again by now, but the call is over.
            raise TargetDied("it is silent") from error
        return None
