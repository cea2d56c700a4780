"""A target that stops is left after a silence that its own heartbeats have made unusual."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.routing.router import Router
from actors.routing.silence import (
    CHECK_PERIOD_S,
    KNOWN_HEARTBEATS,
    MAX_CHECK_S,
    MAX_SILENCE_S,
    MIN_HEARTBEATS,
    MIN_SILENCE_S,
    SILENCE_FACTOR,
    Silence,
)
from actors.routing.target_link import TargetLink, next_chunk
from actors.rpc.common import HEARTBEAT_PERIOD_S
from runtime.core.errors import TargetDied
from runtime.core.messages import Chunk, Request
from tests.support.router_harness import (
    ANSWER,
    ASKED,
    PLAIN,
    Scripted,
    all_of,
    heard,
    played,
    stage,
    there,
)

INTERVALS = st.lists(st.floats(0.01, 2.0), min_size=1, max_size=80)
ROUNDING_S = 1e-6


def listened(intervals: list[float]) -> tuple[Silence, float]:
    """The silence after heartbeats with these intervals, and the clock reading."""
    now = 0.0
    silence = Silence(now)
    for interval in intervals:
        now = waited(silence, now, interval)
        silence.heartbeat(now)
    return silence, now


def waited(silence: Silence, now: float, seconds: float) -> float:
    """Looks at the clock as often as a listener does."""
    until = now + seconds
    while now + CHECK_PERIOD_S < until:
        now += CHECK_PERIOD_S
        silence.look(now)
    silence.look(until)
    return until


@given(INTERVALS)
def test_a_loss_is_silent_for_twice_as_long_as_ever_within_bounds(intervals: list[float]) -> None:
    silence, now = listened(intervals)
    expected = min(MAX_SILENCE_S, max(MIN_SILENCE_S, SILENCE_FACTOR * max(intervals)))
    if len(intervals) < MIN_HEARTBEATS:
        expected = MAX_SILENCE_S
    assert silence.limit == pytest.approx(expected)
    now = waited(silence, now, expected - ROUNDING_S)
    assert not silence.is_loss
    waited(silence, now, 2 * ROUNDING_S)
    assert silence.is_loss


@given(INTERVALS, st.integers(0, 79), st.floats(0.0, 2.0))
def test_who_was_silent_for_longer_gets_no_less_time(
    intervals: list[float], place: int, more: float
) -> None:
    place %= len(intervals)
    uneven = [each + more * (number == place) for number, each in enumerate(intervals)]
    assert listened(uneven)[0].limit >= listened(intervals)[0].limit - ROUNDING_S


@given(st.lists(st.floats(0.01, MIN_SILENCE_S), min_size=1, max_size=80))
def test_a_target_is_never_lost_at_an_interval_that_it_has_shown_before(
    intervals: list[float],
) -> None:
    silence, now = listened(intervals)
    waited(silence, now, max(intervals))
    assert not silence.is_loss


@given(st.floats(0.0, 3600.0))
def test_a_pause_of_the_listener_is_no_silence_of_the_target(pause: float) -> None:
    """Its process was stopped: heartbeats wait in its socket, and it looks at the clock first."""
    silence, now = listened([HEARTBEAT_PERIOD_S] * MIN_HEARTBEATS)
    silence.look(now + pause)
    assert not silence.is_loss
    silence.heartbeat(now + pause)
    assert silence.limit == MIN_SILENCE_S
    assert max(silence.intervals) <= MAX_CHECK_S + ROUNDING_S


def test_an_old_silence_is_forgotten() -> None:
    silence, _ = listened([1.0, *[HEARTBEAT_PERIOD_S] * (KNOWN_HEARTBEATS - 1)])
    assert silence.limit == MAX_SILENCE_S
    silence.heartbeat(silence.looked + HEARTBEAT_PERIOD_S)
    assert silence.limit == MIN_SILENCE_S


# In the router


@dataclass(eq=False)
class Beating(Scripted):
    """Sends heartbeats, until it is stopped."""

    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    resumed: asyncio.Event = field(default_factory=asyncio.Event)

    async def heartbeats(self) -> AsyncGenerator[None, None]:
        while True:
            if self.stopped.is_set():
                await self.resumed.wait()
            yield
            await asyncio.sleep(HEARTBEAT_PERIOD_S)


async def settled() -> None:
    await asyncio.sleep(HEARTBEAT_PERIOD_S * (MIN_HEARTBEATS + 2))


async def stopped(router: Router, target: Beating) -> tuple[asyncio.Future[list[Chunk]], float]:
    """Stops a target in the middle of a session; returns what the client hears, and when."""
    asking = asyncio.ensure_future(all_of(router.generate(ASKED)))
    await target.silent.wait()
    target.stopped.set()
    return asking, asyncio.get_running_loop().time()


def test_a_session_leaves_a_target_that_is_silent() -> None:
    async def main() -> float:
        first, second = Beating(ANSWER, cut=9, death="silent"), Beating(ANSWER)
        router, _ = stage(first, second)
        await settled()
        asking, at = await stopped(router, first)
        assert heard(await asking) == PLAIN
        found = asyncio.get_running_loop().time() - at
        assert [request.epoch for request in (*first.asked, *second.asked)] == [0, 1]
        assert first.open == 0
        await router.close()
        return found

    assert MIN_SILENCE_S - HEARTBEAT_PERIOD_S < played(main()) <= MIN_SILENCE_S + 2 * CHECK_PERIOD_S


def test_no_new_session_is_given_to_a_target_that_is_silent() -> None:
    async def main() -> None:
        first, second = Beating(ANSWER), Beating(ANSWER)
        router, named = stage(first, second)
        await settled()
        first.stopped.set()
        await asyncio.sleep(MAX_SILENCE_S)
        router.update([named[0], replace(named[1], sessions=50)])
        assert heard(await all_of(router.generate(ASKED))) == PLAIN
        assert not first.asked
        first.resumed.set()
        await asyncio.sleep(HEARTBEAT_PERIOD_S)
        assert heard(await all_of(router.generate(replace(ASKED, session="next")))) == PLAIN
        assert first.asked, "it is heard again"
        await router.close()

    played(main())


def test_where_all_are_silent_nobody_is_left() -> None:
    """The network or the router itself has stopped: the session goes on where it was."""

    async def main() -> None:
        release = asyncio.Event()

        @dataclass(eq=False)
        class Late(Beating):
            async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
                async for chunk in super().generate(request):
                    if self.stopped.is_set():
                        await release.wait()
                    yield chunk

        both = Late(ANSWER), Late(ANSWER)
        router, _ = stage(*both)
        await settled()
        stream = router.generate(ASKED)
        said = [await anext(stream)]
        for one in both:
            one.stopped.set()
        following = asyncio.ensure_future(all_of(stream))
        await asyncio.sleep(3 * MAX_SILENCE_S)
        release.set()
        assert heard([*said, *await following]) == PLAIN
        assert sum(len(one.asked) for one in both) == 1
        await router.close()

    played(main())


def test_a_target_that_is_heard_again_at_once_has_lost_the_call() -> None:
    """It speaks in the very moment in which it is given up. No deadline has passed by that."""

    async def main() -> None:
        target = Scripted(ANSWER, cut=0, death="silent")
        state = there("t0")
        link = TargetLink((state.name, 0, state.address), target, state)
        call = target.generate(ASKED)
        reading = asyncio.ensure_future(next_chunk(link, call, 1000.0))
        await target.silent.wait()
        link.silent = True
        link.wake_readers()
        link.silent = False
        with pytest.raises(TargetDied, match="silent"):
            await reading

    played(main())


def test_a_target_without_heartbeats_is_judged_by_its_connection_alone() -> None:
    async def main() -> None:
        first, second = Scripted(ANSWER, cut=9, death="silent"), Beating(ANSWER)
        router, _ = stage(first, second)
        await settled()
        asking = asyncio.ensure_future(all_of(router.generate(ASKED)))
        await first.silent.wait()
        await asyncio.sleep(10 * MAX_SILENCE_S)
        assert not asking.done()
        router.update([there("t1")])
        assert heard(await asking) == PLAIN
        await router.close()

    played(main())
