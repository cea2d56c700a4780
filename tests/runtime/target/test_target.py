"""A target with its thread on an event loop: requests, and the rounds drafts save."""

import asyncio
from contextlib import aclosing
from typing import cast

import pytest

from runtime.core import limits
from runtime.core.errors import InvalidRequest, Overloaded, Unavailable
from runtime.core.messages import Request
from runtime.core.sampling_params import SamplingParams
from runtime.drafters.model import ModelDrafter
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from runtime.target.engine import Engine
from runtime.target.target import Target, check
from runtime.target.verifier import Verifier
from tests.contracts.link_contract import Attach, soon
from tests.support.harness import (
    Known,
    Mute,
    Patient,
    answer,
    asking,
    attached,
    continued,
    hosted,
    lettering,
    plain,
    running,
)

PROMPT = (3, 1, 4, 1, 5)
TOY = ToyModel(vocabulary=24, memory=3, context=2048)
TEXT = continued(TOY, PROMPT, 100)


# Speed, where it can be asserted: rounds


@pytest.mark.parametrize("depth", [1, 4, 9])
def test_a_perfect_chain_of_depth_d_saves_d_of_d_plus_one_steps(attach: Attach, depth: int) -> None:
    async def main() -> None:
        async with (
            running(TOY, Patient(depth)) as asked,
            hosted(Known(TEXT, 24)) as host,
            attach(host) as link,
        ):
            await attached(asked, "d", link)
            found = await answer(asked, asking(PROMPT, max_tokens=6 * (depth + 1)))
        assert found.tokens == tuple(TEXT[5 : 5 + 6 * (depth + 1)])
        assert (found.stats.rounds, found.stats.accepted) == (6, 6 * depth)
        assert found.stats.hits <= 6
        assert set(found.stats.ignored) <= {"stale", "late"}

    asyncio.run(main())


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_target_drafting_for_itself_is_perfect(attach: Attach, temperature: float) -> None:
    """Uses real caches, trees, noise, calibration and threads, over both transports."""

    async def main() -> None:
        request = asking(PROMPT, max_tokens=40, temperature=temperature, seed=3)
        async with (
            running(TOY, Patient(3)) as asked,
            hosted(ModelDrafter(TOY, branches=1)) as host,
            attach(host) as link,
        ):
            await attached(asked, "d", link)
            found = await answer(asked, request)
        assert found.said() == plain(TOY, request).said()
        assert found.stats.rounds == 10

    asyncio.run(main())


# Requests


def test_what_is_generated_is_streamed_and_the_name_is_free_again() -> None:
    async def main() -> None:
        async with running(TOY, Fixed(4)) as asked:
            for _ in range(2):
                chunks = [chunk async for chunk in asked.generate(asking(PROMPT, max_tokens=5))]
                assert [chunk.tokens for chunk in chunks] == [(token,) for token in TEXT[5:10]]
                assert [chunk.finish_reason for chunk in chunks] == [None] * 4 + ["length"]
                assert [chunk.stats is None for chunk in chunks] == [True] * 4 + [False]

    asyncio.run(main())


def test_chunks_wait_in_order_for_a_reader_that_is_slow() -> None:
    async def main() -> None:
        async with (
            running(TOY, Fixed(4)) as asked,
            aclosing(asked.generate(asking(PROMPT, max_tokens=90))) as chunks,
        ):
            found = [await anext(chunks)]
            await soon(lambda: not asked.engine.requests.running)
            found += [chunk async for chunk in chunks]
        assert tuple(token for chunk in found for token in chunk.tokens) == tuple(TEXT[5:95])
        assert len(found) > 2

    asyncio.run(main())


def test_requests_beside_each_other_are_as_alone() -> None:
    async def main() -> None:
        requests = [
            asking((*PROMPT, n), f"s{n}", temperature=0.3 * (n % 3), seed=n, speculation=n != 4)
            for n in range(8)
        ]
        async with (
            running(TOY, Fixed(4, 0.01)) as asked,
            hosted(ModelDrafter(TOY), width=2) as host,
        ):
            await attached(asked, "d", host)
            found = await asyncio.gather(*(answer(asked, request) for request in requests))
        assert [one.said() for one in found] == [plain(TOY, request).said() for request in requests]

    asyncio.run(main())


def test_closing_the_iterator_frees_the_session_here_and_at_the_drafter(attach: Attach) -> None:
    async def main() -> None:
        async with (
            running(TOY, Patient(3)) as asked,
            hosted(ModelDrafter(TOY, branches=1)) as host,
            attach(host) as link,
        ):
            await attached(asked, "d", link)
            async with aclosing(asked.generate(asking(PROMPT, max_tokens=1000))) as chunks:
                await anext(chunks)
                assert asked.engine.requests.running.keys() == {"s"}
                with pytest.raises(InvalidRequest, match="is running"):
                    await anext(asked.generate(asking(PROMPT)))
            await soon(lambda: not asked.engine.requests.running and not host.draft_engine.states)
            assert cast(ModelDrafter, host.draft_engine.drafter).kept == {}
            assert (await answer(asked, asking(PROMPT))).tokens == tuple(TEXT[5:29])

    asyncio.run(main())


def test_cancelling_the_reader_frees_the_session() -> None:
    async def main() -> None:
        async with running(TOY, Patient(3)) as asked, hosted(Mute()) as host:
            await attached(asked, "d", host)  # the target waits for it
            reading = asyncio.create_task(answer(asked, asking(PROMPT)))
            await soon(lambda: bool(host.draft_engine.states))
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await soon(lambda: not asked.engine.requests.running and not host.draft_engine.states)

    asyncio.run(main())


def test_sessions_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SESSIONS", 1)
    monkeypatch.setattr(limits, "QUEUED_REQUESTS", 1)

    async def main() -> None:
        async with running(TOY, Patient(3)) as asked, hosted(Mute()) as host:
            await attached(asked, "d", host)
            readers = [
                asyncio.create_task(answer(asked, asking(PROMPT, f"s{n}"))) for n in range(2)
            ]
            await soon(
                lambda: (
                    len(asked.engine.requests.running)
                    == len(asked.engine.requests.admission.waiting)
                    == 1
                )
            )
            with pytest.raises(Overloaded, match="the limit is 2; try again later"):
                await anext(asked.generate(asking(PROMPT, "more")))
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            await asked.detach("d")
            assert (await answer(asked, asking(PROMPT, "more"))).reason == "length"

    asyncio.run(main())


def test_stopping_ends_what_is_under_way_and_refuses_what_comes() -> None:
    async def main() -> None:
        async with running(TOY, Patient(3)) as asked, hosted(Mute()) as host:
            await attached(asked, "d", host)
            reading = asyncio.create_task(answer(asked, asking(PROMPT, max_tokens=1000)))
            await soon(lambda: bool(host.draft_engine.states))
            await asked.stop()
            assert (await reading).reason == "cancelled"
            with pytest.raises(Unavailable, match="has stopped"):
                await anext(asked.generate(asking(PROMPT)))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("request_", "says", "param"),
    [
        (asking(()), "the prompt is empty", "prompt"),
        (asking((3, 32)), "token id 32 is not in the vocabulary: ids go from 0 to 31", "prompt"),
        (asking((3, -1)), "token id -1 ", "prompt"),
        (Request("s", (3,), SamplingParams(), committed=(99,)), "token id 99 ", "prompt"),
        (asking((3,), logit_bias=((32, 1.0),)), "logit_bias token 32 ", "logit_bias"),
        (
            asking((3,) * 64, max_tokens=1),
            "the prompt has 64 tokens, the model's context 64: shorten the prompt",
            "prompt",
        ),
        (asking((3,) * 60, max_tokens=5), "lower max_tokens to 4", "max_tokens"),
        (asking((3,), max_tokens=64), "lower max_tokens to 63", "max_tokens"),
    ],
)
def test_what_cannot_be_served_is_refused(request_: Request, says: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(request_, 32, 64)
    assert says in str(caught.value)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "request_",
    [asking((3,), max_tokens=63), asking((0, 31)), asking((3,), logit_bias=((31, 1.0),))],
)
def test_what_can_be_served_is_not(request_: Request) -> None:
    check(request_, 32, 64)


def test_a_text_may_fill_the_context() -> None:
    small = ToyModel(vocabulary=24, memory=3, context=30)

    async def main() -> None:
        async with (
            running(small, Fixed(8, 0.01)) as asked,
            hosted(ModelDrafter(small), width=4) as host,
        ):
            await attached(asked, "d", host)
            assert (await answer(asked, asking(PROMPT, max_tokens=25))).tokens == tuple(TEXT[5:30])
            with pytest.raises(InvalidRequest):
                await answer(asked, asking(PROMPT, max_tokens=26))

    asyncio.run(main())


def test_a_text_decided_in_part_is_gone_on_with() -> None:
    async def main() -> None:
        whole = plain(TOY, asking(PROMPT))
        async with (
            running(TOY, Fixed(8, 0.01)) as asked,
            hosted(ModelDrafter(TOY), width=4) as host,
        ):
            await attached(asked, "d", host)
            for cut in (1, 10, 23):
                request = Request(
                    "s", PROMPT, SamplingParams(max_tokens=24), committed=whole.tokens[:cut]
                )
                found = await answer(asked, request)
                assert (found.tokens, found.text, found.reason) == (
                    whole.tokens[cut:],
                    whole.text[cut:],
                    "length",
                )
                assert found.stats.completion_tokens == 24
            with pytest.raises(InvalidRequest, match="ended with committed token 24") as caught:
                await answer(
                    asked,
                    Request("s", PROMPT, SamplingParams(max_tokens=24), committed=whole.tokens),
                )
            assert caught.value.param == "committed"

    asyncio.run(main())


def test_no_request_hangs_on_a_target_whose_thread_is_gone() -> None:
    async def main() -> None:
        engine = Engine(TOY, Verifier(cast("object", None), frozenset()), Fixed(4), lambda: 0.0)  # type: ignore[arg-type]
        asked = Target(engine, lettering())
        with pytest.raises(Unavailable):
            await anext(asked.generate(asking(PROMPT)))

    asyncio.run(main())
