"""Targets that refuse a session: another one is asked, or the same one later."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise

import pytest

from actors.openai.errors import to_api_error
from actors.routing.router import (
    MAX_RETRY_DELAY_S,
    RETRY_DELAY_S,
)
from runtime.core.errors import InvalidRequest, OutriderError, Overloaded, Unavailable
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


def test_what_is_wrong_with_a_request_reaches_the_caller_at_once() -> None:
    async def main() -> None:
        wrong, other = (
            Scripted(ANSWER, refuses=InvalidRequest("top_k is wrong", "top_k")),
            Scripted(ANSWER),
        )
        router, _ = stage(wrong, other)
        with pytest.raises(InvalidRequest, match="top_k"):
            await all_of(router.generate(ASKED))
        assert other.asked == []

    played(main())


def test_a_target_that_has_not_noticed_the_end_of_our_last_call_is_asked_again() -> None:
    async def main() -> None:
        target = Scripted(ANSWER, cut=5)
        router, _ = stage(target)
        reading = asyncio.ensure_future(all_of(router.generate(ASKED)))
        await asyncio.sleep(RETRY_DELAY_S / 2)
        target.cut, target.refuses = None, InvalidRequest("session 's' is under way", "session")
        await asyncio.sleep(10 * RETRY_DELAY_S)
        target.refuses = None
        assert heard(await reading) == PLAIN

    played(main())


@pytest.mark.parametrize(("others", "asked"), [(0, 1), (1, 2), (3, 2)])
def test_an_overloaded_target_is_replaced_by_one_other(others: int, asked: int) -> None:
    async def main() -> None:
        targets = [Scripted(ANSWER, refuses=Overloaded("full")) for _ in range(1 + others)]
        router, _ = stage(*targets)
        with pytest.raises(Overloaded, match="full"):
            await all_of(router.generate(ASKED))
        assert sum(len(target.asked) for target in targets) == asked

    played(main())


def test_the_other_target_takes_what_an_overloaded_one_refuses() -> None:
    async def main() -> None:
        router, _ = stage(Scripted(ANSWER, refuses=Overloaded("full")), Scripted(ANSWER))
        assert heard(await all_of(router.generate(ASKED))) == PLAIN

    played(main())


def test_a_session_that_has_begun_waits_until_an_overloaded_target_has_room() -> None:
    async def main() -> None:
        full = Scripted(ANSWER, refuses=Overloaded("full"))
        router, _ = stage(Scripted(ANSWER, cut=9), full)
        reading = asyncio.ensure_future(all_of(router.generate(ASKED)))
        await asyncio.sleep(10 * RETRY_DELAY_S)
        assert len(full.asked) > 2
        full.refuses = None
        assert heard(await reading) == PLAIN

    played(main())


def asked_at(target: Scripted) -> list[float]:
    """Records when the target is asked from now on."""
    times: list[float] = []
    generate = target.generate

    def recorded(request: Request) -> AsyncGenerator[Chunk, None]:
        times.append(asyncio.get_running_loop().time())
        return generate(request)

    target.generate = recorded  # type: ignore[method-assign]
    return times


@pytest.mark.parametrize(
    "refusal",
    [
        Overloaded("full"),
        InvalidRequest("session 's' is under way", "session"),
        Unavailable("connection refused"),
    ],
)
def test_a_session_that_has_begun_does_not_wait_for_ever(refusal: OutriderError) -> None:
    """Each wait counts, and each is twice the one before."""

    async def main() -> None:
        first, full = Scripted(ANSWER, cut=9), Scripted(ANSWER, refuses=refusal)
        router, named = stage(first, full)
        router.target_wait_s, times = 60.0, asked_at(full)
        chunks = router.generate(ASKED)
        said = [await anext(chunks) for _ in range(9)]
        router.update(named[1:])
        began = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable, match="no target accepted the session within 60") as found:
            await anext(chunks)
        assert asyncio.get_running_loop().time() - began == pytest.approx(60.0)
        waits = [later - earlier for earlier, later in pairwise(times)]
        assert waits[:5] == pytest.approx([RETRY_DELAY_S, 1.0, 2.0, 4.0, MAX_RETRY_DELAY_S])
        assert waits[5:] == pytest.approx([MAX_RETRY_DELAY_S] * 5)
        assert tuple(token for chunk in said for token in chunk.tokens) == PLAIN.tokens[:9]
        answer = to_api_error(found.value)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")

    played(main())


def test_a_token_renews_what_a_session_waits() -> None:
    async def main() -> None:
        full = Scripted(ANSWER, cut=9)
        router, _ = stage(full)
        router.target_wait_s, times = 40.0, asked_at(full)
        reading = asyncio.ensure_future(all_of(router.generate(ASKED)))
        for cut in (12, 15, None):
            await asyncio.sleep(1.0)
            full.refuses = Overloaded("full")
            await asyncio.sleep(20.0)
            full.cut, full.refuses = cut, None
            await asyncio.sleep(MAX_RETRY_DELAY_S)
        assert heard(await reading) == PLAIN
        assert len(times) > 12

    played(main())


def test_a_target_that_refused_a_session_is_asked_again_once_another_is_lost() -> None:
    async def main() -> None:
        full, other = Scripted(ANSWER, refuses=Overloaded("full")), Scripted(ANSWER, cut=5)
        router, named = stage(full, other)
        reading = asyncio.ensure_future(all_of(router.generate(ASKED)))
        await asyncio.sleep(RETRY_DELAY_S / 2)
        assert (len(full.asked), len(other.asked)) == (1, 1)
        router.update(named[:1])
        full.refuses = None
        assert heard(await reading) == PLAIN

    played(main())


def test_draining_targets_keep_their_sessions_and_get_no_new_ones() -> None:
    async def main() -> None:
        first, second = Scripted(ANSWER), Scripted(ANSWER)
        router, named = stage(first, second)
        chunks = router.generate(ASKED)
        said = [await anext(chunks)]
        router.update([there("t0", state="draining"), named[1]])
        await all_of(router.generate(replace(ASKED, session="new")))
        async with aclosing(chunks):
            said += [chunk async for chunk in chunks]
        assert heard(said) == PLAIN
        assert (len(first.asked), len(second.asked)) == (1, 1)

    played(main())


class Slow(Scripted):
    """Takes a second for each token."""

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                await asyncio.sleep(1.0)
                yield chunk


def test_a_session_that_loses_its_target_late_ends_by_its_deadline_all_the_same() -> None:
    """Time with a target counts: what is left is what it may wait for another one."""

    async def main() -> None:
        router, _ = stage(Slow(ANSWER, cut=6))
        chunks = await all_of(router.generate(replace(ASKED, deadline=9.0)))
        assert chunks[-1].finish_reason == "deadline"
        assert sum(len(chunk.tokens) for chunk in chunks) == 6
        assert asyncio.get_running_loop().time() == 9.0

    played(main())
