"""Many sessions share a target's passes without noticing each other."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from runtime.core.errors import InvalidRequest
from runtime.core.messages import Chunk, Commit, Event, Open, Request, Resync, Share, Style
from runtime.core.node_keys import text_key
from runtime.core.sampler_reference import reference_sample
from runtime.models.base import PassInput
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from runtime.schedulers.sync import Sync
from runtime.scoring.drafter_utility import REST_COMMITS, TRIAL_COMMITS
from runtime.target.chunked_prefill import BUSY_CHUNK_TOKENS, CHUNK_TOKENS, MIN_SHARED_TOKENS
from runtime.target.commands import AddRequest, Cancel, Join, ReplyReceived, SetScheduler, Stop
from runtime.target.engine import Engine
from runtime.target.target import resume_stop_checker
from runtime.target.verifier import Verifier
from tests.runtime.target.test_engine import draft
from tests.support.harness import NOBODY, Output, asking, engine_of, lettering, output, plain

PROMPT = (3, 1, 4, 1, 5)


class Watched(ToyModel):
    """Records the rows of each part of a pass; a part of more than `most` rows fails it."""

    def __init__(self, most: int = 10**6) -> None:
        super().__init__(vocabulary=24, memory=3, context=600)
        self.passes: list[list[int]] = []
        self.most = most

    def forward_all(self, parts: Sequence[PassInput]) -> Any:
        self.passes.append([len(part.rows.tokens) for part in parts])
        if max(self.passes[-1]) > self.most:
            raise RuntimeError("no room on the device")
        return super().forward_all(parts)


class Desk:
    """An engine and its callers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.chunks: dict[str, list[Chunk]] = {}

    def admit(self, request: Request) -> None:
        self.chunks[request.session] = []
        finish = resume_stop_checker(lettering()(request), request)
        self.engine.handle(
            AddRequest(request, finish, self.chunks[request.session].append, self.engine.clock())
        )

    def run(self) -> dict[str, Output]:
        while self.engine.requests.running or self.engine.requests.admission.waiting:
            self.engine.step()
        return {name: output(chunks) for name, chunks in self.chunks.items()}


def desk(model: ToyModel, kv_slots: int = 10**6) -> Desk:
    ticks = iter(range(10**9))
    return Desk(
        Engine(
            model,
            Verifier(reference_sample, NOBODY),
            Fixed(8),
            lambda: float(next(ticks)),
            kv_slots=kv_slots,
        )
    )


def test_one_pass_serves_all_sessions_and_none_notices_the_others() -> None:
    model = Watched()
    requests = [
        asking((*PROMPT, n), f"s{n}", max_tokens=10 + 3 * n, temperature=0.5 * (n % 2), seed=n)
        for n in range(5)
    ]
    at = desk(model)
    for request in requests:
        at.admit(request)
    found = at.run()
    assert [found[request.session].said() for request in requests] == [
        plain(ToyModel(24, memory=3), request).said() for request in requests
    ]
    steps = [rows for rows in model.passes if len(rows) > 1 or rows == [1]]
    assert max(map(len, steps)) == 5
    assert len(steps) < sum(request.sampling.max_tokens for request in requests) / 2


def test_a_long_prompt_does_not_stall_the_others() -> None:
    model = Watched()
    at = desk(model)
    at.admit(asking(PROMPT, "short", max_tokens=40))
    at.engine.step()
    before = len(at.chunks["short"])
    at.admit(asking(tuple(n % 24 for n in range(5 * BUSY_CHUNK_TOKENS + 2)), "long"))
    for n in range(1, 6):
        at.engine.step()
        assert len(at.chunks["short"]) == before + n
        assert len(at.chunks["long"]) == 0
    assert [rows for rows in model.passes if rows[0] > 5] == [[BUSY_CHUNK_TOKENS]] * 5
    at.engine.step()
    assert len(at.chunks["long"]) == 1


def test_several_prompts_are_read_in_one_pass_but_not_what_a_cache_will_have() -> None:
    model, alike = Watched(), tuple(n % 23 for n in range(MIN_SHARED_TOKENS + 8))
    at = desk(model)
    for number, prompt in enumerate([(1, *alike), (2, *alike), (2, *alike, 5), (3,) * 6]):
        at.admit(asking(prompt, f"s{number}", max_tokens=4))
    at.engine.step()
    assert model.passes[0] == [MIN_SHARED_TOKENS + 8, MIN_SHARED_TOKENS + 8, 5]
    at.engine.step()
    assert [len(at.chunks[f"s{number}"]) > 0 for number in range(4)] == [True] * 4
    assert (
        at.run()["s2"].stats.reused == MIN_SHARED_TOKENS + 9
    )  # all that the two have in common: a step has added the last token


def test_what_a_cache_has_already_is_waited_for_by_nobody() -> None:
    """Sessions from a lost target read their prompts in one pass, whatever they share."""
    model, alike = Watched(), tuple(n % 23 for n in range(MIN_SHARED_TOKENS + 8))
    at = desk(model)
    at.admit(asking(alike, "here", max_tokens=40))
    at.engine.step()
    moved = [(*alike, number, 1, 2) for number in range(5)]
    for number, prompt in enumerate(moved):
        at.admit(asking(prompt, f"s{number}", max_tokens=4))
    at.engine.step()
    assert model.passes[-2] == [2] * 5
    assert all(at.chunks[f"s{number}"] for number in range(5))
    found = at.run()
    for number, prompt in enumerate(moved):
        assert found[f"s{number}"].stats.reused == MIN_SHARED_TOKENS + 8
        assert (
            found[f"s{number}"].said()
            == plain(ToyModel(24, memory=3), asking(prompt, f"s{number}", max_tokens=4)).said()
        )


def test_many_short_texts_and_those_begun_elsewhere_wait_for_no_step_between_their_passes() -> None:
    """Each text gets one piece before the others' step, so a longer one delays no more."""
    model = Watched()
    at = desk(model)
    at.admit(asking(PROMPT, "here", max_tokens=40))
    at.engine.step()
    before, passes = len(at.chunks["here"]), len(model.passes)
    prompts = [
        (number, *((7 * n + number) % 23 for n in range(BUSY_CHUNK_TOKENS - 8)))
        for number in range(CHUNK_TOKENS // BUSY_CHUNK_TOKENS + 8)
    ]
    requests = [asking(prompt, f"s{number}") for number, prompt in enumerate(prompts)]
    whole = [plain(ToyModel(24, memory=3), request) for request in requests]
    cuts = [4 * (number % 2) for number in range(len(requests))]
    at.admit(asking([n % 24 for n in range(CHUNK_TOKENS)], "long"))
    at.admit(
        replace(asking([n % 23 for n in range(CHUNK_TOKENS)], "long and begun"), committed=(1, 2))
    )
    for request, answer, cut in zip(requests, whole, cuts, strict=True):
        at.admit(replace(request, committed=answer.tokens[:cut], epoch=1))
    at.engine.step()
    assert all(at.chunks[request.session] for request in requests)
    assert len(at.chunks["here"]) == before + 1
    *read, step = model.passes[passes:]
    assert len(step) == 1 + len(requests)
    assert max(map(sum, read)) <= CHUNK_TOKENS
    assert sum(map(sum, read)) < (len(requests) + 1) * BUSY_CHUNK_TOKENS + CHUNK_TOKENS
    for name in ("long", "long and begun"):
        at.engine.handle(Cancel(name))
    found = at.run()
    assert [found[request.session].tokens for request in requests] == [
        answer.tokens[cut:] for answer, cut in zip(whole, cuts, strict=True)
    ]


def test_a_prompt_that_cannot_be_read_ends_alone() -> None:
    at = desk(Watched(most=20))
    for number, length in enumerate((10, 30, 12)):
        at.admit(
            asking(tuple((number + n) % 24 for n in range(length)), f"s{number}", max_tokens=4)
        )
    found = at.run()
    assert [found[f"s{number}"].reason for number in range(3)] == ["length", "error", "length"]


def test_who_does_not_fit_waits_for_its_turn() -> None:
    """Each needs 5 + 24 + 64 slots; there is room for two at a time."""
    model = Watched()
    at = desk(model, kv_slots=4 * 200 // 3)
    requests = [asking((*PROMPT[:4], n), f"s{n}", seed=n) for n in range(5)]
    for request in requests:
        at.admit(request)
    found = at.run()
    assert max(map(len, model.passes)) == 2
    assert [found[request.session].said() for request in requests] == [
        plain(ToyModel(24, memory=3), request).said() for request in requests
    ]
    assert at.engine.requests.admission.reserved == 0


def test_a_waiting_request_can_be_cancelled() -> None:
    at = desk(Watched(), kv_slots=4 * 100 // 3)
    for name in ("first", "second", "third"):
        at.admit(asking(PROMPT, name))
    at.engine.step()
    at.engine.handle(Cancel("second"))
    found = at.run()
    assert [found[name].reason for name in ("first", "second", "third")] == [
        "length",
        "cancelled",
        "length",
    ]
    assert found["second"].stats.prompt_tokens == 5


def test_what_waits_when_the_target_stops_ends_as_cancelled() -> None:
    at = desk(Watched(), kv_slots=4 * 100 // 3)
    at.engine.inbox.put(Stop())
    for name in ("first", "second"):
        at.admit(asking(PROMPT, name, max_tokens=20))
    at.engine.run()
    assert [output(chunks).reason for chunks in at.chunks.values()] == ["cancelled", "cancelled"]


def test_what_would_never_fit_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="raise the target's kv_tokens"):
        desk(Watched(), kv_slots=100).engine.requests.admission.check(asking(PROMPT), 600)


def test_a_beginning_that_is_in_a_cache_is_not_read_again() -> None:
    model = Watched()
    at = desk(model)
    prompt = tuple((7 * n + n // 5) % 24 for n in range(60))
    at.admit(asking(prompt, "first"))
    at.admit(asking((*prompt[:40], 1, 2, 3), "beside"))
    beside = at.run()
    at.admit(asking((*prompt, *beside["first"].tokens, 5), "after"))
    found = at.run()
    assert [found[name].stats.reused for name in ("first", "beside", "after")] == [
        0,
        40,
        60 + 24 - 1,
    ]
    assert sorted(rows[0] for rows in model.passes if rows[0] > 1) == [2, 59]
    for name, request in (
        ("beside", (*prompt[:40], 1, 2, 3)),
        ("after", (*prompt, *beside["first"].tokens, 5)),
    ):
        assert found[name].said() == plain(ToyModel(24, memory=3), asking(request, name)).said()


def test_a_session_whose_part_fails_ends_alone() -> None:
    model = Watched(most=40)
    at = desk(model)
    at.admit(asking(PROMPT, "good"))
    at.admit(asking(tuple(range(20)) * 5, "bad"))
    at.admit(asking((*PROMPT, 2), "late"))
    found = at.run()
    assert found["bad"].reason == "error"
    assert "no room on the device" in found["bad"].error
    assert found["good"].said() == plain(ToyModel(24, memory=3), asking(PROMPT)).said()
    assert found["late"].reason == "length"


def test_a_step_in_which_one_part_fails_is_made_by_the_others_alone() -> None:
    class Moody(Watched):
        def forward_all(self, parts: Sequence[PassInput]) -> Any:
            if any(part.rows.tokens[0] == 23 for part in parts):
                raise RuntimeError("not this token")
            return super().forward_all(parts)

    at = desk(Moody())
    at.admit(asking(PROMPT, "good"))
    at.admit(asking((*PROMPT, 23), "bad"))
    found = at.run()
    assert (found["bad"].reason, found["bad"].tokens) == ("error", ())
    assert found["good"].said() == plain(ToyModel(24, memory=3), asking(PROMPT)).said()


def test_patience_is_counted_as_waiting() -> None:
    ticks = iter(range(10**9))
    at = Desk(
        Engine(
            Watched(),
            Verifier(reference_sample, NOBODY),
            Fixed(8, patience=10.0),
            lambda: float(next(ticks)),
        )
    )
    send: Callable[[Event], None] = lambda event: None  # noqa: E731
    at.engine.handle(Join("mute", send))
    at.admit(asking(PROMPT, max_tokens=3))
    waits: list[float] = []
    while not at.chunks["s"]:
        waits.append(at.engine.step() or 0.0)
    assert waits[0] == 10.0
    assert waits[:-1] == sorted(waits[:-1], reverse=True)
    found = at.run()["s"].stats
    assert 2 * 10.0 <= found.waited <= 2 * 13.0  # the last token is not waited for
    assert found.elapsed >= found.waited + found.computed + found.bookkeeping


def test_a_drafter_that_brings_nothing_rests_and_is_tried_again() -> None:
    events: list[Event] = []
    engine = engine_of(ToyModel(24, memory=3, context=4000))
    at = Desk(engine)
    engine.handle(Join("mute", events.append))
    at.admit(asking(PROMPT, max_tokens=TRIAL_COMMITS + REST_COMMITS + 10))
    at.run()
    assert [event for event in events if isinstance(event, Share)] == [
        Share("s", 0, 0),
        Share("s", 0, 1),
    ]
    assert isinstance(events[0], Open)
    assert events[0].share == Share("s", 0, 1)


def test_a_resting_drafter_that_asks_for_the_text_gets_it_when_its_rest_is_over() -> None:
    """Once, however often it asks: until then it has no use for it."""
    events: list[Event] = []
    engine = engine_of(ToyModel(24, memory=3, context=4000))
    at = Desk(engine)
    at.admit(asking(PROMPT, max_tokens=TRIAL_COMMITS + REST_COMMITS + 10))
    engine.handle(Join("mute", events.append))
    while engine.requests.running:
        if engine.drafter_manager.utility.resting:
            engine.inbox.put(ReplyReceived(Resync("s", "mute"), 0.0))
        engine.receive(0.0)
        at.engine.step()
    rested = events.index(Share("s", 0, 0))
    again = events[rested + 1]
    assert isinstance(again, Open)
    assert again.share == Share("s", 0, 1)
    assert len(again.tokens) == len(PROMPT) + TRIAL_COMMITS + REST_COMMITS
    assert sum(isinstance(event, Open) for event in events) == 2


def test_a_resting_drafter_is_told_at_its_end_what_it_has_missed() -> None:
    """In one message: each commit would cost the target time."""
    events: list[Event] = []
    engine = engine_of(ToyModel(24, memory=3, context=4000))
    at = Desk(engine)
    engine.handle(Join("mute", events.append))
    at.admit(asking(PROMPT, max_tokens=TRIAL_COMMITS + REST_COMMITS + 10))
    tokens = at.run()["s"].tokens
    rested = events.index(Share("s", 0, 0))
    missed, share = events[rested + 1 : rested + 3]
    assert isinstance(missed, Commit)
    assert missed.base == len(PROMPT) + TRIAL_COMMITS
    assert missed.tokens == tokens[TRIAL_COMMITS : TRIAL_COMMITS + REST_COMMITS]
    assert missed.key == text_key([*PROMPT, *tokens[: TRIAL_COMMITS + REST_COMMITS]])
    assert share == Share("s", 0, 1)


def test_a_new_policy_holds_from_the_next_step_and_its_style_for_new_sessions() -> None:
    events: list[Event] = []
    engine = engine_of(ToyModel(24, memory=3))
    at = Desk(engine)
    engine.handle(Join("d", events.append))
    at.admit(asking(PROMPT, "old", max_tokens=3))
    at.engine.step()
    engine.handle(SetScheduler(Sync(2, 3, 4, 16, 0.001)))
    at.admit(asking(PROMPT, "new", max_tokens=3))
    while at.engine.requests.running or at.engine.requests.admission.waiting:
        at.engine.step()
    assert [event.style for event in events if isinstance(event, Open)] == [Style(), Style(2, 3, 4)]


def test_replies_for_sessions_that_wait_are_counted() -> None:
    at = desk(Watched(), kv_slots=4 * 100 // 3)
    at.admit(asking(PROMPT, "first"))
    at.admit(asking(PROMPT))
    at.engine.handle(ReplyReceived(draft([(PROMPT, 1)]), 0.0))
    assert at.engine.metrics.guesses["d"].stale == 1
