"""The router tells a second target what the first one writes, and goes on there when it is lost."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.routing.routed_session import RoutedSession
from actors.routing.router import Router
from actors.routing.standby_feed import MAX_UPDATE_TOKENS, STANDBY_PERIOD_S, StandbyFeed
from runtime.core.errors import Unavailable
from runtime.core.messages import Chunk, Request, StandbyText, Tokens
from runtime.core.sampling_params import SamplingParams
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from runtime.target.target import Target
from tests.contracts.link_contract import soon
from tests.support.harness import running
from tests.support.router_harness import (
    ANSWER,
    ASKED,
    PLAIN,
    PROMPT,
    Bare,
    Scripted,
    all_of,
    finish_of,
    heard,
    played,
    stage,
    there,
)

WHOLE = (*PROMPT, *PLAIN.tokens)


@dataclass(eq=False)
class Standby(Scripted):
    """Says a token each `pace` seconds, and notes the texts that it is told.

    With `ends` it hears one update.
    """

    pace: float = 1.0
    ends: bool = False
    texts: dict[str, Tokens] = field(default_factory=dict)
    updates: list[Sequence[StandbyText]] = field(default_factory=list)

    async def standby(self, updates: AsyncGenerator[Sequence[StandbyText], None]) -> None:
        self.texts.clear()
        async for texts in updates:
            self.updates.append(texts)
            for text in texts:
                if text.over:
                    del self.texts[text.session]
                    continue
                assert text.start == len(self.texts.get(text.session, ()))
                self.texts[text.session] = (*self.texts.get(text.session, ()), *text.tokens)
            if self.ends:
                raise Unavailable("an older version")

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        async for chunk in super().generate(request):
            yield chunk
            await asyncio.sleep(self.pace)


def test_the_next_target_was_told_all_that_is_older_than_one_period() -> None:
    """The busier of two: it is the one that knows the text."""

    async def main() -> None:
        lives = [Standby(ANSWER, cut=11, pace=0.2), Standby(ANSWER), Standby(ANSWER)]
        router, named = stage(*lives)
        stream = router.generate(ASKED)
        said = [await anext(stream) for _ in range(11)]
        (knows,) = [life for life in lives if life.texts]
        assert knows is not lives[0]
        assert [text == WHOLE[: len(text)] for text in knows.texts.values()] == [True]
        busier = named[lives.index(knows)]
        router.update([replace(busier, sessions=50), *(one for one in named if one is not busier)])
        said.append(await anext(stream))
        (asked,) = knows.asked
        assert len(asked.committed) == 11
        unknown = len(asked.prompt) + len(asked.committed) - len(knows.texts["1"])
        assert 0 < unknown <= STANDBY_PERIOD_S / 0.2 + 1, "tokens that it must read"
        said += await all_of(stream)
        assert heard(said) == PLAIN
        await asyncio.sleep(2 * STANDBY_PERIOD_S)
        assert not any(life.texts for life in lives), "the session is over"
        assert not any(link.feed.texts for link in router._links.values())
        await router.close()

    played(main())


def test_a_single_target_is_told_nothing() -> None:
    async def main() -> None:
        alone = Standby(ANSWER)
        router, _ = stage(alone)
        assert heard(await all_of(router.generate(ASKED))) == PLAIN
        assert not alone.updates
        await router.close()

    played(main())


def test_a_client_that_leaves_ends_the_text() -> None:
    async def main() -> None:
        first, second = Standby(ANSWER), Standby(ANSWER)
        router, _ = stage(first, second)
        stream = router.generate(ASKED)
        for _ in range(5):
            await anext(stream)
        assert second.texts
        await stream.aclose()
        await asyncio.sleep(2 * STANDBY_PERIOD_S)
        assert not second.texts
        await router.close()

    played(main())


def test_a_target_that_drains_is_told_no_more_and_another_one_takes_its_place() -> None:
    async def main() -> None:
        lives = [Standby(ANSWER), Standby(ANSWER), Standby(ANSWER)]
        router, named = stage(*lives)
        stream = router.generate(ASKED)
        for _ in range(5):
            await anext(stream)
        (knows,) = [life for life in lives if life.texts]
        place = lives.index(knows)
        named[place] = replace(named[place], state="draining")
        router.update(named)
        for _ in range(3):
            await anext(stream)
        (now,) = [life for life in lives if life.texts]
        assert now not in (knows, lives[0])
        await stream.aclose()
        await router.close()

    played(main())


def test_a_target_that_does_not_listen_is_told_all_when_it_is_asked_again() -> None:
    async def main() -> None:
        first, second = Standby(ANSWER), Standby(ANSWER, ends=True)
        router, named = stage(first, second)
        stream = router.generate(ASKED)
        for _ in range(5):
            await anext(stream)
        assert len(second.updates) == 1
        second.ends = False
        router.update(named)
        for _ in range(3):
            await anext(stream)
        assert tuple(second.texts.values()) == (WHOLE[: len(PROMPT) + 7],)
        await stream.aclose()
        await router.close()

    played(main())


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from(["tokens", "over", "take", "anew"]),
            st.integers(0, 9),
        ),
        max_size=60,
    )
)
def test_what_is_told_is_the_beginning_of_each_text(steps: list[tuple[int, str, int]]) -> None:
    async def main() -> None:
        feed, known = StandbyFeed(), dict[str, Tokens]()
        sessions: dict[int, RoutedSession] = {}

        def take() -> None:
            for text in feed.take():
                if text.over:
                    del known[text.session]
                else:
                    assert text.start == len(known.get(text.session, ()))
                    known[text.session] = (*known.get(text.session, ()), *text.tokens)

        for number, what, count in steps:
            session = sessions.setdefault(number, RoutedSession(ASKED, 0.0, 0.0))
            match what:
                case "tokens":
                    session.output.extend([number] * count)
                    feed.update(session)
                case "over":
                    feed.remove(sessions.pop(number))
                case "take":
                    take()
                    running = {told.name: session for session, told in feed.texts.items()}
                    assert known == {
                        name: (*PROMPT, *session.output) for name, session in running.items()
                    } or all(session not in feed.texts for session in sessions.values())
                case _:
                    known.clear()
                    feed.restart()
        take()
        assert known == {
            told.name: (*PROMPT, *session.output) for session, told in feed.texts.items()
        }

    asyncio.run(main())


def test_an_update_is_bounded_and_the_rest_follows() -> None:
    async def main() -> None:
        feed, length = StandbyFeed(), MAX_UPDATE_TOKENS * 2 // 3
        for _ in range(3):
            feed.update(RoutedSession(replace(ASKED, prompt=(1,) * length), 0.0, 0.0))
        sizes = [[len(text.tokens) for text in feed.take()] for _ in range(3)]
        assert sizes == [
            [length, MAX_UPDATE_TOKENS - length],
            [2 * length - MAX_UPDATE_TOKENS, length],
            [],
        ]

    asyncio.run(main())


# Real targets

LONG = PROMPT * 20
MODEL = ToyModel(vocabulary=1024, sharpness=3.0)


@dataclass(eq=False)
class Mortal(Bare):
    """A target in this process that is lost before its next piece, once `doomed` is set."""

    body: Target
    doomed: bool = False

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        async for chunk in self.body.generate(request):
            if self.doomed:
                raise Unavailable("killed by the test")
            yield chunk

    async def standby(self, updates: AsyncGenerator[Sequence[StandbyText], None]) -> None:
        await self.body.standby(updates)

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_survivor_copies_what_it_was_told_and_goes_on_exactly(temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, seed=7, max_tokens=60)
    request = Request("s", LONG, sampling)

    async def main() -> None:
        async with (
            running(MODEL, Fixed(4), finish=finish_of) as first,
            running(MODEL, Fixed(4), finish=finish_of) as second,
        ):
            plain = heard(await all_of(first.generate(replace(request, speculation=False))))
            lives = {"t0/0": Mortal(first), "t1/0": Mortal(second)}
            router = Router(lives.__getitem__)
            router.update([there("t0"), there("t1")])
            stream = router.generate(request)
            said = [await anext(stream) for _ in range(10)]
            known = len(LONG) + sum(len(chunk.tokens) for chunk in said)
            await soon(lambda: second.engine.requests.standby.read >= known)
            lives["t0/0"].doomed = True
            said += await all_of(stream)
            assert heard(said) == plain
            assert sum(router.lost.values()) == 1
            assert second.report().reused_tokens >= known - 1, "all but the root was copied"
            await router.close()

    asyncio.run(main())
