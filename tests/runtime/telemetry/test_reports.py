"""Reports of target and drafter add up and can be read from any thread."""

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest

from runtime.core.errors import Unavailable
from runtime.core.messages import Draft, Event, Resync
from runtime.core.sampler_reference import reference_sample
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.model import ModelDrafter
from runtime.drafters.noisy import NoisyDrafter
from runtime.models.base import PassInput
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from runtime.scoring.drafter_utility import TRIAL_COMMITS
from runtime.target.commands import AddRequest, Cancel, Join, ReplyReceived, Stop
from runtime.target.engine import Engine
from runtime.target.verifier import Verifier
from runtime.telemetry.reports import DrafterReport, GuessReport, TargetReport
from tests.contracts.link_contract import soon
from tests.runtime.target.test_engine import draft
from tests.support.harness import (
    NOBODY,
    Known,
    Lockstep,
    Mute,
    Output,
    Patient,
    answer,
    asking,
    attached,
    continued,
    engine_of,
    hosted,
    lettering,
    output,
    running,
)

PROMPT = (3, 1, 4, 1, 5)
TOY = ToyModel(vocabulary=24, memory=3, context=2000)
TEXT = continued(TOY, PROMPT, 200)


def reported(engine: Engine) -> TargetReport:
    engine.requests.publish()
    return engine.report()


def adds_up(report: TargetReport, outputs: Sequence[Output]) -> None:
    """At rest every node that arrived has ended, and the sums are those of the sessions."""
    assert report.drafted == report.accepted + report.rejected + report.expired
    assert min(report.accepted, report.rejected, report.expired) >= 0
    assert (report.live, report.waiting) == (0, 0)
    stats = [found.stats for found in outputs]
    assert report.drafted == sum(one.drafted for one in stats)
    assert report.verified == sum(one.verified for one in stats)
    assert report.accepted == sum(one.accepted for one in stats) == sum(report.accepted_at)
    assert report.completion_tokens == sum(one.completion_tokens for one in stats)
    assert report.rounds == sum(one.rounds for one in stats)
    assert report.rows == report.rounds + report.verified
    assert report.finished == Counter(found.reason for found in outputs)
    assert sum(report.finished.values()) == len(outputs)
    by_drafter = sum((Counter(one.by_drafter) for one in stats), Counter())
    assert {
        name: guess.accepted for name, guess in report.guesses.items() if guess.accepted
    } == by_drafter
    assert sum(guess.proposed for guess in report.guesses.values()) == report.drafted


def test_what_was_drafted_was_accepted_or_rejected_or_expired() -> None:
    """Several drafters, several ends: by length, by a stop, cancelled, too late, by a fault."""

    class Failing(ToyModel):
        def logits(self, tokens: Any) -> Any:
            if tokens[0] == 23 and len(tokens) > 14:
                raise RuntimeError("not this text")
            return super().logits(tokens)

    requests = [
        asking(PROMPT, "length"),
        asking(PROMPT, "stop", max_tokens=60, stop=(chr(97 + TEXT[17] % 26),)),
        asking(PROMPT, "cancelled", max_tokens=100),
        replace(asking(PROMPT, "deadline", max_tokens=400), deadline=300.0),
        asking((23, *PROMPT), "error", max_tokens=40),
        asking(PROMPT, "sampled", temperature=0.9, seed=3),
        asking(PROMPT, "silent", speculation=False),
    ]
    draft_engines = (
        DraftEngine(Known(TEXT, 24, 3), "known", 2),
        DraftEngine(NoisyDrafter(Known(TEXT, 24, 2), 24, 0.5), "noisy", 2),
        DraftEngine(ModelDrafter(TOY, branches=2), "model", 2),
    )
    lockstep = Lockstep(engine_of(Failing(24, 2000, memory=3)), *draft_engines, passes=3)
    chunks = [lockstep.admit(request) for request in requests]
    while lockstep.engine.requests.running:
        if len(chunks[2]) == 3:
            lockstep.engine.handle(Cancel("cancelled"))
        lockstep.round()
    outputs = [output(of_one) for of_one in chunks]
    assert [found.reason for found in outputs] == [
        "length",
        "stop",
        "cancelled",
        "deadline",
        "error",
        "length",
        "length",
    ]
    report = reported(lockstep.engine)
    adds_up(report, outputs)
    assert min(report.accepted, report.rejected, report.expired) > 0
    assert report.guesses.keys() == {"known", "noisy", "model"}
    assert (report.prompt_tokens, report.kv_slots) == (5 * 6 + 6, 1 << 20)
    assert report.steps < report.rounds
    assert asdict(report)["finished"]["length"] == 3


def test_a_report_is_a_value_of_its_moment() -> None:
    lockstep = Lockstep(engine_of(TOY), DraftEngine(Known(TEXT, 24), "d"))
    lockstep.admit(asking(PROMPT))
    before = reported(lockstep.engine)
    lockstep.round()
    assert (before.live, before.steps, before.guesses) == (1, 0, {})
    after = reported(lockstep.engine)
    assert (after.live, after.steps, after.kv_used) == (1, 1, 5 + 24 + 64)
    assert after.guesses["d"].proposed == 2


def test_who_has_brought_what() -> None:
    """A perfect chain of three, of which two are verified in each step."""
    engine = engine_of(TOY, rows=2)
    (found,) = Lockstep(engine, DraftEngine(Known(TEXT, 24), "d"), passes=3).run(
        asking(PROMPT, max_tokens=30)
    )
    guess = reported(engine).guesses["d"]
    assert (guess.proposed, guess.accepted, guess.resting) == (29, 20, False)
    assert guess.accepted == found.stats.accepted
    assert guess.lead == pytest.approx(
        29 / 10
    )  # three ahead at each step, and what is left at the last
    assert guess.round_trip > 0.0
    assert (guess.late, guess.stale) == (0, 0)


class Told:
    """An engine whose growth is given by hand, with a clock set by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.engine = Engine(TOY, Verifier(reference_sample, NOBODY), Fixed(8), lambda: self.now)
        self.events: list[Event] = []
        self.engine.handle(Join("d", self.events.append))
        request = asking(PROMPT, max_tokens=60)
        self.engine.handle(AddRequest(request, lettering()(request), lambda chunk: None))
        self.engine.step()

    def hear(self, growth: Draft, at: float = 0.0) -> None:
        self.engine.handle(ReplyReceived(growth, at))

    def guess(self) -> GuessReport:
        return reported(self.engine).guesses["d"]


def test_late_growth_and_stale_growth() -> None:
    told = Told()
    assert told.engine.requests.running["s"].session.tokens == TEXT[:6]
    told.hear(draft([(PROMPT, TEXT[5]), (TEXT[:6], TEXT[6])]))  # the first was decided meanwhile
    told.hear(draft([((*PROMPT, 99), 7), (TEXT[:6], TEXT[6])]))
    told.hear(draft([(PROMPT, 1)], session="gone"))
    told.hear(replace(draft([(PROMPT, 1)]), epoch=3))
    guess = told.guess()
    assert (guess.proposed, guess.late, guess.stale) == (1, 1, 3)


def test_a_round_trip_ends_with_the_first_growth_on_the_new_root() -> None:
    told = Told()
    told.hear(draft([(TEXT[:5], 7)]), at=0.125)  # on the old one
    assert told.guess().round_trip == 0.0
    told.hear(draft([(TEXT[:6], TEXT[6])]), at=0.25)
    told.hear(draft([(TEXT[:6], 9)]), at=9.0)  # not the first
    assert told.guess().round_trip == 0.25
    told.now = 1.0
    told.engine.step()
    told.hear(draft([(TEXT[: len(told.engine.requests.running["s"].session.tokens)], 3)]), at=2.25)
    assert told.guess().round_trip == pytest.approx(0.25 + 0.1 * (1.25 - 0.25))


def test_what_a_target_goes_without_is_counted_by_cause() -> None:
    class Moody(ToyModel):
        def forward_all(self, parts: Sequence[PassInput]) -> Any:
            if len(parts) > 1:
                raise RuntimeError("one at a time")
            return super().forward_all(parts)

    engine = engine_of(TOY)
    Lockstep(engine).run(
        asking(PROMPT, max_tokens=5), asking(PROMPT, "t", max_tokens=5, speculation=False)
    )
    assert reported(engine).fallbacks == {"no drafter": 4}  # with the last token nobody could help
    engine = engine_of(TOY)
    Lockstep(engine, DraftEngine(Mute(), "d")).run(asking(PROMPT, max_tokens=TRIAL_COMMITS + 10))
    assert reported(engine).fallbacks == {"empty tree": TRIAL_COMMITS, "all resting": 9}
    assert reported(engine).guesses["d"] == GuessReport(resting=True)
    engine = engine_of(Moody(24, memory=3))
    outputs = Lockstep(engine, DraftEngine(Known(TEXT, 24), "d")).run(
        asking(PROMPT, "s", max_tokens=6), asking(PROMPT, "t", max_tokens=6)
    )
    assert [found.tokens for found in outputs] == [tuple(TEXT[5:11])] * 2
    assert reported(engine).fallbacks == {"alone": 2}
    adds_up(reported(engine), outputs)


def test_prompts_that_were_in_a_cache_are_counted_apart() -> None:
    engine = engine_of(TOY)
    prompt = tuple(n % 24 for n in range(40))
    Lockstep(engine).run(asking(prompt, max_tokens=2))
    Lockstep(engine).run(asking((*prompt, 3), "t", max_tokens=2))
    report = reported(engine)
    assert (report.prompt_tokens, report.reused_tokens) == (81, 40)
    assert report.kv_used > 40  # kept for texts that begin alike
    assert report.prefilled > 0.0


def test_asked_from_another_thread_while_it_works() -> None:
    engine = Engine(TOY, Verifier(reference_sample, NOBODY), Fixed(4), lambda: 0.0)
    thread = threading.Thread(target=engine.run)
    thread.start()
    ended = threading.Event()
    request = asking(PROMPT, max_tokens=600)
    engine.inbox.put(
        AddRequest(
            request,
            lettering()(request),
            lambda chunk: ended.set() if chunk.finish_reason else None,
        )
    )
    seen = [engine.report()]
    while not ended.wait(0.001):
        seen.append(engine.report())
    engine.inbox.put(Stop())
    thread.join(20.0)
    assert not thread.is_alive()
    last = engine.report()
    assert (last.completion_tokens, last.live, last.finished) == (600, 0, {"length": 1})
    assert all(a.steps <= b.steps for a, b in zip(seen, [*seen[1:], last], strict=True))
    assert all(
        one.completion_tokens == one.rounds == one.rows for one in seen
    )  # of one moment, always


# The drafter


def test_a_drafter_reports_passes_and_nodes() -> None:
    ticks = iter(range(10**6))
    draft_engine = DraftEngine(Known(TEXT, 24, 3), "d", clock=lambda: float(next(ticks)))
    assert draft_engine.report() == DrafterReport()
    lockstep = Lockstep(engine_of(TOY), draft_engine, passes=2)
    (found,) = lockstep.run(asking(PROMPT, max_tokens=12))
    report = draft_engine.report()
    assert (report.sessions, report.nodes) == (
        0,
        found.stats.drafted + sum(found.stats.ignored.values()),
    )
    assert 0 < report.passes <= 2 * found.stats.rounds
    assert report.computed >= report.passes
    draft_engine.counters["unknown session"] += 1
    assert (report.counters, draft_engine.report().counters) == ({}, {"unknown session": 1})


# At the target


def test_a_drained_target_ends_what_it_has_and_takes_nothing_new() -> None:
    async def main() -> None:
        async with running(TOY, Patient(3)) as asked, hosted(Mute()) as host:
            await attached(asked, "d", host)  # holds the session up until it is let go
            reading = asyncio.create_task(answer(asked, asking(PROMPT)))
            await soon(lambda: asked.report().live == 1)
            draining = asyncio.create_task(asked.drain())
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="the target is draining: use another one"):
                await anext(asked.generate(asking(PROMPT, "late")))
            assert not draining.done()
            await asked.detach("d")
            await draining
            assert reading.done()
            assert (await reading).tokens == tuple(TEXT[5:29])
            report = asked.report()
            assert (report.live, report.waiting, report.finished, report.lost_links) == (
                0,
                0,
                {"length": 1},
                {"d": 1},
            )
            await asked.drain()

    asyncio.run(main())


# A drafter that asks for the text again and again


def test_a_text_is_sent_again_once_for_each_commit_at_most() -> None:
    told = Told()
    told.events.clear()
    for _ in range(3):
        told.engine.handle(ReplyReceived(Resync("s", "d"), 0.0))
    assert len(told.events) == 1
    told.engine.step()
    told.events.clear()
    for _ in range(3):
        told.engine.handle(ReplyReceived(Resync("s", "d"), 0.0))
    assert len(told.events) == 1
