"""A target's links: they come, are lost, and never hold up the target."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

from runtime.core.messages import Chunk, Event, Reply, Resync
from runtime.models.base import PassInput
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from runtime.target import target
from tests.contracts.link_contract import Attach, soon
from tests.support.harness import (
    HANG_S,
    Dying,
    Known,
    Mute,
    Patient,
    answer,
    asking,
    attached,
    continued,
    hosted,
    running,
)

PROMPT = (3, 1, 4, 1, 5)
TOY = ToyModel(vocabulary=24, memory=3, context=2048)
TEXT = continued(TOY, PROMPT, 100)


def test_a_link_that_is_lost_costs_speed_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with running(TOY, Fixed(4, 0.02)) as asked, hosted(Known(TEXT, 24)) as host:
            await attached(asked, "d", Dying(host, 5))
            found = await answer(asked, asking(PROMPT, max_tokens=40))
            assert found.tokens == tuple(TEXT[5:45])
            assert found.stats.drafted > 0  # five messages came through, of one guess or some
            await soon(lambda: asked.drafters == ())
            assert asked.lost == {"d": 1}
            await soon(lambda: not host.draft_engine.states)

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert "drafter d lost: killed by the test" in caplog.text


class Paced(ToyModel):
    """Makes only as many passes as it may, so a text waits for what happens beside it."""

    def __init__(self) -> None:
        super().__init__(vocabulary=24, memory=3, context=2048)
        self.passes = threading.Semaphore(0)

    def forward_all(self, parts: Sequence[PassInput]) -> list[npt.NDArray[np.float32]]:
        assert self.passes.acquire(timeout=HANG_S)
        return super().forward_all(parts)


def test_a_drafter_joins_and_leaves_in_mid_stream(attach: Attach) -> None:
    async def main() -> None:
        model = Paced()
        async with (
            running(model, Patient(3)) as asked,
            hosted(Known(TEXT, 24)) as host,
            attach(host) as link,
        ):
            async with aclosing(asked.generate(asking(PROMPT, max_tokens=90))) as chunks:

                async def next_chunk() -> Chunk:
                    model.passes.release()
                    return await anext(chunks)

                model.passes.release()  # for the prompt
                found = [await next_chunk()]
                asked.attach("d", link)
                while not any(found[-1].drafters):
                    found.append(await next_chunk())
                await asked.detach("d")
                assert asked.drafters == ()
                model.passes.release(1000)
                found += [chunk async for chunk in chunks]
            assert tuple(token for chunk in found for token in chunk.tokens) == tuple(TEXT[5:95])
            assert found[0].drafters == ("",)
            await asked.detach("d")
            await soon(lambda: not host.draft_engine.states)

    asyncio.run(main())


def test_a_link_that_comes_back_under_its_name() -> None:
    async def main() -> None:
        async with running(TOY, Patient(3)) as asked, hosted(Known(TEXT, 24)) as host:
            for _ in range(3):
                await attached(asked, "d", host)
                asked.attach("d", Dying(host, 0))  # there is one of this name already
                found = await answer(asked, asking(PROMPT))
                assert (found.tokens, found.stats.rounds) == (tuple(TEXT[5:29]), 6)
                await asked.detach("d")
            assert asked.lost == {"d": 3}

    asyncio.run(main())


class Deaf:
    """Never takes an event."""

    def __init__(self) -> None:
        self.over = False

    async def speculate(self, events: AsyncIterator[Event]) -> AsyncIterator[Reply]:
        try:
            await asyncio.Event().wait()
            yield cast(Reply, None)
        finally:
            self.over = True


def test_a_link_whose_events_pile_up_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(target, "MAX_PENDING_EVENTS", 10)

    async def main() -> None:
        deaf = Deaf()
        async with running(TOY, Fixed(4)) as asked:
            await attached(asked, "deaf", deaf)
            found = await answer(asked, asking(PROMPT, max_tokens=90))
            assert found.tokens == tuple(TEXT[5:95])
            await soon(lambda: not asked.drafters)
            assert deaf.over
            assert asked.lost == {"deaf": 1}
            await soon(lambda: not asked.engine.drafters)

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert "drafter deaf lost: it has not taken its last 10 events" in caplog.text


class Flood:
    """Sends guesses one after the other, and counts those that were taken."""

    def __init__(self, count: int) -> None:
        self.count, self.taken = count, 0

    async def speculate(self, events: AsyncIterator[Event]) -> AsyncIterator[Reply]:
        await anext(aiter(events))
        for _ in range(self.count):
            yield Resync("s", "d")
            self.taken += 1
        await asyncio.Event().wait()


def test_a_link_is_not_read_while_the_engine_has_much_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A flood waits at its sender, whatever the engine is at, and is taken in afterwards."""
    monkeypatch.setattr(target, "MAX_INBOX_MESSAGES", 10)

    async def main() -> None:
        model, flood = Paced(), Flood(1000)
        async with running(model, Fixed(4)) as asked:
            try:
                await attached(asked, "d", flood)
                reading = asyncio.create_task(answer(asked, asking(PROMPT)))
                await soon(lambda: flood.taken >= 10)
                for _ in range(100):
                    await asyncio.sleep(0)
                assert 10 <= flood.taken <= asked.engine.inbox.qsize() <= 12
            finally:
                model.passes.release(1000)
            assert (await reading).tokens == tuple(TEXT[5:29])
            await soon(lambda: flood.taken == flood.count)

    asyncio.run(main())


def test_a_mute_drafter_costs_its_patience_alone() -> None:
    async def main() -> None:
        async with running(TOY, Fixed(4, 0.001)) as asked, hosted(Mute()) as host:
            await attached(asked, "d", host)
            found = await answer(asked, asking(PROMPT))
            assert found.tokens == tuple(TEXT[5:29])
            assert (found.stats.rounds, found.stats.drafted) == (24, 0)

    asyncio.run(main())
