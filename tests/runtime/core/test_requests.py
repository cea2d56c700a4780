"""A request can ask for logprobs, few rows, an epoch and a deadline."""

import asyncio
import math
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from runtime.core.errors import InvalidRequest
from runtime.core.messages import Chunk, Commit, Draft, Event, Logprob, Open, Request
from runtime.core.sampler_reference import reference_sample
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.model import ModelDrafter
from runtime.models.base import PassInput
from runtime.models.toy import ToyModel
from runtime.schedulers.amusd import Amusd
from runtime.schedulers.base import Scheduler
from runtime.schedulers.fixed import Fixed
from runtime.schedulers.sync import Sync
from runtime.target.chunked_prefill import CHUNK_TOKENS
from runtime.target.commands import Join, ReplyReceived
from runtime.target.engine import Engine
from runtime.target.target import check
from runtime.target.verifier import Verifier
from tests.contracts.link_contract import soon
from tests.runtime.target.test_batching import Desk
from tests.support.harness import (
    NOBODY,
    Known,
    Lockstep,
    Mute,
    Patient,
    asking,
    attached,
    continued,
    engine_of,
    hosted,
    letter,
    output,
    plain,
    running,
)

PROMPT = (3, 1, 4, 1, 5)
TOY = ToyModel(vocabulary=24, memory=3)
TEXT = continued(TOY, PROMPT, 100)
EOS = frozenset({TEXT[15]})


# Logprobs


def by_hand(text: Sequence[int], token: int, k: int) -> Logprob:
    """From the definition, in float64."""
    weights = np.exp(TOY.logits(text).astype(np.float64))
    logs = np.log(weights / weights.sum())
    return Logprob(
        float(logs[token]),
        tuple((int(best), float(logs[best])) for best in np.argsort(-logs, kind="stable")[:k]),
    )


def close(found: Logprob, expected: Logprob) -> bool:
    same = [token for token, _ in found.top] == [token for token, _ in expected.top]
    values = zip(
        (found.chosen, *(log for _, log in found.top)),
        (expected.chosen, *(log for _, log in expected.top)),
        strict=True,
    )
    return same and all(math.isclose(a, b, abs_tol=1e-9) for a, b in values)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {
            "temperature": 0.9,
            "seed": 4,
            "top_p": 0.7,
            "repetition_penalty": 1.3,
            "logit_bias": ((3, 5.0),),
        },
    ],
)
@pytest.mark.parametrize("k", [0, 3, 20])
def test_logprobs_are_the_targets_own_whoever_guessed_the_token(
    k: int, sampling: dict[str, Any]
) -> None:
    request = asking(PROMPT, logprobs=k, **sampling)
    alone = plain(TOY, request)
    text = [*PROMPT, *alone.tokens]
    expected = [by_hand(text[: 5 + place], token, k) for place, token in enumerate(alone.tokens)]
    for drafter in (Known(text, 24, 3), ModelDrafter(TOY, branches=2)):
        (found,) = Lockstep(engine_of(TOY), DraftEngine(drafter, "d", 2), passes=3).run(request)
        assert found.said() == alone.said()
        assert found.stats.accepted > 0
        assert found.logprobs == alone.logprobs
        assert all(map(close, found.logprobs, expected))


@pytest.mark.parametrize(
    "sampling",
    [
        {"max_tokens": 60},
        {"max_tokens": 7},
        {
            "max_tokens": 60,
            "ignore_eos": True,
            "stop": ("".join(chr(97 + token % 26) for token in TEXT[9:12]),),
        },
    ],
)
def test_text_ids_and_logprobs_are_cut_at_the_same_token(sampling: dict[str, Any]) -> None:
    request = asking(PROMPT, logprobs=1, **sampling)
    (found,) = Lockstep(engine_of(TOY, 30, EOS), DraftEngine(Known(TEXT, 24), "d"), passes=30).run(
        request
    )
    assert found.said() == plain(TOY, request, EOS).said()
    assert len(found.logprobs) == len(found.tokens) == found.stats.completion_tokens
    assert found.stats.rounds == 1  # one run of guesses reaches beyond the end


def test_who_does_not_ask_gets_none() -> None:
    assert plain(TOY, asking(PROMPT)).logprobs == ()


# Rows


@pytest.mark.parametrize("most", [0, 1, 3])
def test_a_request_bounds_its_rows(most: int) -> None:
    requests = [replace(asking(PROMPT, "few"), max_rows=most), asking(PROMPT, "many")]
    few, many = Lockstep(engine_of(TOY), DraftEngine(Known(TEXT, 24), "d"), passes=9).run(*requests)
    assert few.said() == many.said()
    assert few.stats.rounds == -(-24 // (most + 1))
    assert few.stats.verified == 24 - few.stats.rounds
    assert many.stats.rounds == 3


@pytest.mark.parametrize("scheduler", [Fixed(8, 1e9), Sync(1, 1, 4, 4, 1e9), Amusd(1e9)])
def test_nobody_is_waited_for_by_who_wants_no_rows(scheduler: Scheduler) -> None:
    engine = Engine(TOY, Verifier(reference_sample, NOBODY), scheduler, lambda: 0.0)
    (found,) = Lockstep(engine, DraftEngine(Mute(), "d")).run(replace(asking(PROMPT), max_rows=0))
    assert found.tokens == tuple(TEXT[5:29])


# Epochs


def test_the_epoch_of_a_request_is_that_of_its_session_and_growth_of_another_is_dropped() -> None:
    heard: list[Event] = []
    engine = engine_of(TOY)
    engine.handle(Join("d", heard.append))
    lockstep = Lockstep(engine)
    lockstep.admit(replace(asking(PROMPT), epoch=7))
    engine.step()
    assert [event.epoch for event in heard if isinstance(event, Open | Commit)] == [7, 7]
    session = engine.requests.running["s"].session
    for epoch, taken in ((6, 0), (8, 0), (7, 1)):
        growth = Draft(
            "s",
            epoch,
            "d",
            np.array([session.tree.key[0]], np.uint64),
            np.array([3], np.int32),
            np.array([-1], np.float32),
        )
        engine.handle(ReplyReceived(growth, 0.0))
        assert len(session.tree) == 1 + taken


# Deadlines


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(ToyModel):
    """Each token that it reads takes a second."""

    def __init__(self, clock: Hand, context: int = 2000) -> None:
        super().__init__(vocabulary=24, memory=3, context=context)
        self.clock = clock

    def read(self, part: PassInput) -> Any:
        self.clock.now += len(part.rows.tokens)
        return super().read(part)


def desk(clock: Hand, scheduler: Scheduler | None = None, kv_slots: int = 10**6) -> Desk:
    return Desk(
        Engine(
            Slow(clock),
            Verifier(reference_sample, NOBODY),
            scheduler or Fixed(8),
            clock,
            kv_slots=kv_slots,
        )
    )


def test_a_session_ends_with_its_deadline_and_keeps_what_it_has() -> None:
    clock = Hand()
    at = desk(clock)
    at.admit(replace(asking(PROMPT, "hasty"), deadline=10.0))
    at.admit(asking(PROMPT, "patient"))
    found = at.run()
    hasty, patient = found["hasty"], found["patient"]
    assert (hasty.reason, patient.reason) == ("deadline", "length")
    assert 0 < len(hasty.tokens) < 10
    assert hasty.tokens == patient.tokens[: len(hasty.tokens)]
    assert hasty.stats.completion_tokens == len(hasty.tokens)
    assert hasty.stats.elapsed >= 10.0
    assert at.engine.requests.admission.reserved == 0


def test_text_that_is_held_back_comes_at_the_deadline() -> None:
    """It may have become a stop string; its tokens count, so the client gets it."""
    clock = Hand()
    at = desk(clock)
    stop = "".join(map(letter, TEXT[len(PROMPT) : len(PROMPT) + 20])) + "never"
    at.admit(replace(asking(PROMPT, stop=(stop,)), deadline=10.0))
    found = at.run()["s"]
    assert found.reason == "deadline"
    assert 0 < len(found.tokens) < 10
    assert found.text == "".join(map(letter, found.tokens))


def test_the_earliest_of_several_deadlines_is_looked_at_first_and_then_the_next() -> None:
    clock = Hand()
    at = desk(clock)
    for name, deadline in (("late", 60.0), ("early", 20.0), ("never", None), ("later", 1e9)):
        at.admit(replace(asking(PROMPT, name, max_tokens=40), deadline=deadline))
    found = at.run()
    assert {name: one.reason for name, one in found.items()} == {
        "late": "deadline",
        "early": "deadline",
        "never": "length",
        "later": "length",
    }
    assert len(found["early"].tokens) < len(found["late"].tokens) < 40


def test_a_request_that_waits_too_long_is_not_begun() -> None:
    clock, heard = Hand(), list[Event]()
    at = desk(clock, kv_slots=4 * 100 // 3)
    at.engine.handle(Join("d", heard.append))
    at.admit(asking(PROMPT, "first"))
    at.admit(replace(asking(PROMPT, "hasty"), deadline=5.0))
    at.admit(asking(PROMPT, "last"))
    found = at.run()
    assert [found[name].reason for name in ("first", "hasty", "last")] == [
        "length",
        "deadline",
        "length",
    ]
    assert (found["hasty"].tokens, found["hasty"].stats.prompt_tokens) == ((), 5)
    assert found["hasty"].stats.elapsed >= 5.0
    assert {event.session for event in heard if isinstance(event, Open)} == {"first", "last"}


@pytest.mark.parametrize("deadline", [0.0, -1.0, -math.inf])
def test_what_comes_too_late_is_not_begun(deadline: float) -> None:
    clock = Hand()
    at = desk(clock)
    at.admit(replace(asking(PROMPT), deadline=deadline))
    assert at.engine.requests.running == {}
    assert at.run()["s"].reason == "deadline"
    assert clock.now == 0.0


def test_a_long_prompt_is_left_when_its_deadline_is_over() -> None:
    clock = Hand()
    at = desk(clock)
    at.admit(replace(asking((7,) * (2 * CHUNK_TOKENS + 9)), deadline=CHUNK_TOKENS - 1.0))
    found = at.run()["s"]
    assert (found.reason, found.tokens, clock.now) == ("deadline", (), CHUNK_TOKENS)


def test_a_wait_for_drafters_is_no_longer_than_the_deadline() -> None:
    clock = Hand()
    at = desk(clock, Fixed(8, patience=50.0))
    heard: list[Event] = []
    at.engine.handle(Join("mute", heard.append))
    at.admit(replace(asking(PROMPT), deadline=20.0))
    assert at.engine.step() == 16.0  # four seconds went into the prompt
    clock.now = 20.0
    assert at.engine.step() is None
    assert at.run()["s"].reason == "deadline"


def test_at_the_target_a_deadline_ends_the_wait_for_a_mute_drafter() -> None:
    async def main() -> None:
        async with running(TOY, Patient(3)) as asked, hosted(Mute()) as host:
            await attached(asked, "d", host)  # the target would wait for it for very long
            chunks: list[Chunk] = []
            async with aclosing(asked.generate(replace(asking(PROMPT), deadline=0.05))) as stream:
                chunks = [chunk async for chunk in stream]
            assert output(chunks).reason == "deadline"
            await soon(lambda: not host.draft_engine.states)
            assert (
                output(
                    [
                        chunk
                        async for chunk in asked.generate(replace(asking(PROMPT), deadline=-1.0))
                    ]
                ).tokens
                == ()
            )

    asyncio.run(main())


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (replace(asking((3,)), deadline=math.nan), "deadline"),
        (replace(asking((3,)), max_rows=-1), "max_rows"),
    ],
)
def test_what_makes_no_sense_is_refused(request_: Request, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(request_, 32, 64)
    assert caught.value.param == param
