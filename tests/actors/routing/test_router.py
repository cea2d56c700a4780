"""On scripted targets and a virtual clock, the client cannot see that its target was lost."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.routing.router import (
    DEADLINE_GRACE_S,
    MAX_DEATHS,
    Router,
)
from runtime.core.errors import Unavailable
from runtime.core.messages import Chunk, Request
from tests.support.router_harness import (
    ANSWER,
    ASKED,
    COUNT,
    DEATHS,
    PLAIN,
    PROMPT,
    TEXT,
    Death,
    Scripted,
    all_of,
    heard,
    played,
    spoken,
    stage,
    there,
)


def test_the_answer_has_what_makes_a_border_hard() -> None:
    assert PLAIN.reason == "stop"
    assert "".join(PLAIN.pieces) == TEXT.partition("STOP!")[0]
    assert COUNT >= 30
    assert PLAIN.pieces.count("") >= 8, "characters of several tokens, and text that is held back"
    assert len(PLAIN.logprobs) == COUNT


# Losses


@pytest.mark.parametrize("death", DEATHS)
def test_a_target_lost_before_any_token_changes_nothing_that_a_client_sees(death: Death) -> None:
    async def main(cut: int, sizes: tuple[int, ...]) -> None:
        first, second = Scripted(ANSWER, sizes, cut, death), Scripted(ANSWER, (3, 1, 2))
        router, named = stage(first, second)
        reading = asyncio.ensure_future(all_of(router.generate(ASKED)))
        if death == "silent":
            await first.silent.wait()
            router.update(named[1:])
        assert heard(await reading) == PLAIN
        assert first.open == second.open == 0
        assert [request.epoch for request in (*first.asked, *second.asked)] == [0, 1]
        assert second.asked[0].committed == PLAIN.tokens[: len(second.asked[0].committed)]
        assert cut - max(sizes) < len(second.asked[0].committed) <= cut
        await router.close()
        assert first.closed
        assert second.closed

    for cut in range(COUNT):
        played(main(cut, (1,)))
        played(main(cut, (2, 4, 1)))


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.sampled_from(DEATHS[:1] + DEATHS[2:]), st.integers(1, 4)),
        max_size=12,
    )
)
def test_life_after_life_the_figures_add_up(deaths: list[tuple[int, Death, int]]) -> None:
    """Each life of the target sends some tokens and dies; then the next life is named."""

    async def main() -> None:
        lives = {
            f"t/{life}": Scripted(ANSWER, (size,), None, death)
            for life, (_, death, size) in enumerate(deaths)
        }
        lives[f"t/{len(deaths)}"] = Scripted(ANSWER, (2,))
        router = Router(lives.__getitem__, target_wait_s=1e6)
        reading = asyncio.ensure_future(all_of(router.generate(ASKED)))
        place = 0
        for life, (more, _, size) in enumerate(deaths):
            lives[f"t/{life}"].cut = place = place + max(
                more, size if life % MAX_DEATHS == 0 else 0
            )
            router.update([there("t", life)])
            await asyncio.wait(
                [reading, asyncio.ensure_future(asyncio.sleep(1.0))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        router.update([there("t", len(deaths))])
        chunks = await reading
        assert heard(chunks) == PLAIN
        stats = chunks[-1].stats
        assert stats is not None
        assert (
            stats.by_drafter.get("d", 0)
            == stats.accepted
            == sum(name == "d" for chunk in chunks for name in chunk.drafters)
        )
        assert stats.accepted <= stats.verified <= stats.drafted
        assert sum(life.open for life in lives.values()) == 0

    played(main())


class Brimming(Scripted):
    """Cancels with the tokens that it has not delivered yet."""

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                if chunk.finish_reason == "cancelled":
                    _, more = next(spoken(ANSWER, replace(request, committed=ANSWER[:9]), (2,)))
                    yield replace(more, finish_reason="cancelled", stats=chunk.stats)
                else:
                    yield chunk


def test_tokens_that_come_with_a_cancellation_are_generated_again() -> None:
    async def main() -> None:
        first, second = Brimming(ANSWER, cut=9, death="cancelled"), Scripted(ANSWER)
        router, _ = stage(first, second)
        assert heard(await all_of(router.generate(ASKED))) == PLAIN
        assert second.asked[0].committed == ANSWER[:9]

    played(main())


def test_the_parts_figures_are_joined() -> None:
    async def main() -> None:
        router, _ = stage(
            Scripted(ANSWER, (2,), 6),
            Scripted(ANSWER, (4,), 14, "cancelled"),
            Scripted(ANSWER, (COUNT,)),
        )
        stats = (await all_of(router.generate(ASKED)))[-1].stats
        assert stats is not None
        # Of the first life, three rounds with a guessed token each were seen. The second life
        # reported two of them, the third one.
        assert (stats.rounds, stats.histogram) == (3 + 2 + 1, (2 + 1, 3))
        assert (stats.prompt_tokens, stats.completion_tokens) == (len(PROMPT), COUNT)
        assert stats.verified == stats.drafted == 3 + (6 + 2) + (COUNT - 15 + 1)

    played(main())


def test_a_session_on_one_target_keeps_its_figures() -> None:
    async def main() -> None:
        router, _ = stage(Scripted(ANSWER))
        assert await all_of(router.generate(ASKED)) == [
            chunk for _, chunk in spoken(ANSWER, ASKED, (1,))
        ]

    played(main())


def test_a_target_that_comes_back_goes_on_where_the_lost_life_was() -> None:
    async def main() -> None:
        lives = {"t/0": Scripted(ANSWER, cut=9, death="silent"), "t/1": Scripted(ANSWER)}
        router = Router(lives.__getitem__)
        router.update([there("t")])
        reading = asyncio.ensure_future(all_of(router.generate(ASKED)))
        await lives["t/0"].silent.wait()
        router.update([there("t", 0, "starting")])
        await asyncio.sleep(30.0)
        router.update([there("t", 1, "starting")])
        assert lives["t/0"].closed
        assert lives["t/0"].open == 0
        assert not router.ready
        assert not reading.done()
        router.update([there("t", 1)])
        assert heard(await reading) == PLAIN

    played(main())


def test_a_session_that_was_decided_in_part_before_goes_on_in_a_later_epoch() -> None:
    async def main() -> None:
        first, second = Scripted(ANSWER, cut=12), Scripted(ANSWER)
        router, _ = stage(first, second)
        found = await all_of(router.generate(replace(ASKED, committed=ANSWER[:7], epoch=4)))
        assert tuple(token for chunk in found for token in chunk.tokens) == PLAIN.tokens[7:]
        assert [request.epoch for request in (*first.asked, *second.asked)] == [4, 5]
        assert found[-1].stats is not None
        assert found[-1].stats.completion_tokens == COUNT

    played(main())


def test_a_loss_is_logged_once_and_without_what_was_said(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        router, _ = stage(Scripted(ANSWER, cut=9), Scripted(ANSWER))
        await asyncio.gather(
            *(all_of(router.generate(replace(ASKED, session=f"s{number}"))) for number in range(6))
        )

    with caplog.at_level(logging.INFO):
        played(main())
    assert [record.getMessage() for record in caplog.records] == [
        "target t0 is lost or refuses sessions, which continue elsewhere: connection reset"
    ]


# Deadlines


def test_a_session_waits_for_the_first_target() -> None:
    async def main() -> None:
        router = Router({"t/0": Scripted(ANSWER)}.__getitem__)
        reading = asyncio.ensure_future(all_of(router.generate(replace(ASKED, deadline=100.0))))
        await asyncio.sleep(99.0)
        before = router.ready
        router.update([there("t")])
        assert (before, router.ready) == (False, True)
        assert heard(await reading) == PLAIN

    played(main())


@pytest.mark.parametrize(("deadline", "after"), [(7.0, 7.0), (None, 50.0), (0.0, 0.0)])
def test_without_a_target_a_session_ends_in_time(deadline: float | None, after: float) -> None:
    async def main() -> None:
        router, now = (
            Router(lambda _: Scripted(ANSWER), target_wait_s=50.0),
            asyncio.get_running_loop().time,
        )
        began = now()
        with pytest.raises(Unavailable, match="no target accepted the session"):
            await all_of(router.generate(replace(ASKED, deadline=deadline)))
        assert now() - began == pytest.approx(after)

    played(main())


def test_the_next_target_gets_the_rest_of_the_deadline() -> None:
    async def main() -> None:
        first, second = Scripted(ANSWER, cut=9, death="silent"), Scripted(ANSWER)
        router, named = stage(first, second)
        reading = asyncio.ensure_future(all_of(router.generate(replace(ASKED, deadline=60.0))))
        await asyncio.sleep(45.0)
        router.update(named[1:])
        await reading
        assert first.asked[0].deadline == pytest.approx(60.0)
        assert second.asked[0].deadline == pytest.approx(15.0)

    played(main())


@pytest.mark.parametrize("gone", [False, True])
def test_what_has_said_something_ends_by_its_deadline(gone: bool) -> None:
    """The target says nothing any more, or there is none."""

    async def main() -> None:
        target = Scripted(ANSWER, cut=9, death="killed" if gone else "silent")
        router, _ = stage(target)
        began = asyncio.get_running_loop().time()
        said = heard(await all_of(router.generate(replace(ASKED, deadline=20.0))))
        assert asyncio.get_running_loop().time() - began == pytest.approx(
            20.0 if gone else 20.0 + DEADLINE_GRACE_S
        )
        assert (said.reason, said.tokens, said.pieces) == (
            "deadline",
            PLAIN.tokens[:9],
            PLAIN.pieces[:9],
        )
        assert said.usage == (len(PROMPT), 9)
        assert target.open == 0

    played(main())


# Cancellation


def test_a_reader_cancelled_at_any_step_leaves_nothing_behind() -> None:
    async def main(steps: int) -> bool:
        first, second = Scripted(ANSWER, cut=3), Scripted(ANSWER, cut=6)
        router, named = stage(first, second)
        reading = asyncio.ensure_future(all_of(router.generate(ASKED)))
        if steps > 40:
            router.update(named)
        for _ in range(steps):
            await asyncio.sleep(0)
        waiting = not reading.done()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert first.open == second.open == 0
        assert [link.sessions for link in router._links.values()] == [0, 0]
        assert [len(link.reading) for link in router._links.values()] == [0, 0]
        await router.close()
        return bool(second.asked) and waiting

    waiting = [played(main(steps)) for steps in range(80)]
    assert any(waiting), "some were cancelled on the second target"


def test_a_client_that_closes_ends_the_call_at_once() -> None:
    async def main() -> None:
        for count in range(1, COUNT):
            first, second = Scripted(ANSWER, cut=COUNT // 2), Scripted(ANSWER)
            router, _ = stage(first, second)
            chunks = router.generate(ASKED)
            for _ in range(count):
                await anext(chunks)
            assert first.open + second.open == 1
            await chunks.aclose()
            assert first.open + second.open == 0

    played(main())


def test_a_target_that_leaves_is_closed_though_a_client_does_not_read() -> None:
    async def main() -> None:
        first, second = Scripted(ANSWER), Scripted(ANSWER)
        router, named = stage(first, second)
        chunks = router.generate(ASKED)
        said = [await anext(chunks)]
        router.update(named[1:])
        await asyncio.sleep(0)
        assert first.closed
        assert not second.closed
        async with aclosing(chunks):
            said += [chunk async for chunk in chunks]
        assert heard(said) == PLAIN

    played(main())
