"""What goes wrong with hidden states costs speed only, and what cannot be served is refused."""

import asyncio
import itertools
import logging
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.features import FeatureSpec
from runtime.core.messages import FeatureRequest, Features, Reply
from runtime.core.sampler_reference import reference_sample
from runtime.draft.draft_engine import DraftEngine
from runtime.models.base import OutputSpec, PassInput, PassOutput
from runtime.models.hf import HFModel
from runtime.models.sampler import choose
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from runtime.target import feature_sender
from runtime.target.admission import Admission
from runtime.target.commands import AddRequest, ReplyReceived
from runtime.target.engine import Engine
from runtime.target.verifier import Verifier
from tests.contracts.link_contract import TRANSPORTS, soon
from tests.support.families import VOCABULARY, hf_model, tiny
from tests.support.features import LAYERS, PROMPT, Watching, check_seen, lockstep, misled
from tests.support.harness import (
    Known,
    Lockstep,
    answer,
    asking,
    continued,
    hosted,
    lettering,
    plain,
    running,
)


@pytest.mark.parametrize("seed", range(6))
def test_lost_repeated_and_late_messages_never_show_wrong_states(seed: int) -> None:
    model, rng, kept = hf_model("llama"), random.Random(seed), list[Any]()

    def tamper(message: Any) -> Iterable[Any]:
        if isinstance(message, FeatureRequest):
            return [message]
        kind = rng.random()
        if kind < 0.08:
            return []
        if kind < 0.16:
            return [message, message]
        if kind < 0.24 and isinstance(message, Features):
            kept.append(message)
            return []
        if kind < 0.30 and isinstance(message, Features):
            return [message, *kept]
        return [message]

    prompt = PROMPT[:40]
    drafter = Watching(misled(model, prompt, 60))
    request = asking(prompt, max_tokens=60)
    both = lockstep(model, drafter, tamper=tamper)
    (found,) = both.run(request)
    assert found.said() == plain(model, request, chooser=choose).said()
    assert check_seen(model, drafter.seen) > 40
    assert drafter.complete()
    assert both.draft_engines[0].counters["failed"] == 0


def test_lost_states_are_asked_for_again() -> None:
    model, drafter, lose = hf_model("llama"), Watching([]), [False]

    def tamper(message: Any) -> Iterable[Any]:
        return [] if lose[0] and isinstance(message, Features) else [message]

    both = lockstep(model, drafter, tamper=tamper)
    both.admit(asking(PROMPT[:20], max_tokens=30))
    both.round()
    lose[0] = True
    both.round()
    lose[0] = False
    while both.engine.requests.running:
        both.round()
    assert both.draft_engines[0].counters["resync"] == 1
    assert check_seen(model, drafter.seen) > 20
    assert len(drafter.complete()[-1][0]) > 45
    assert drafter.complete()[-1][1].start == 0


class Breaking:
    """A model whose passes with hidden states fail from the `at`-th on."""

    def __init__(self, inner: HFModel, at: int) -> None:
        self.inner, self.left, self.asked = inner, at, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward_outputs(self, parts: list[PassInput], output_spec: OutputSpec) -> list[PassOutput]:
        self.asked += 1
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("no memory for states")
        return self.inner.forward_outputs(parts, output_spec)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_pass_that_cannot_show_them_costs_only_them(
    at: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = hf_model("llama")
    breaking: Any = Breaking(model, at)
    drafter = Watching(misled(model, PROMPT, 30))
    request = asking(PROMPT, max_tokens=30)
    both = lockstep(breaking, drafter)
    (found,) = both.run(request)
    assert found.said() == plain(model, request, chooser=choose).said()
    assert breaking.asked == at + 1
    assert both.engine.metrics.fallbacks["features lost"] == 1
    assert "no features any more" in caplog.text
    check_seen(model, drafter.seen)
    (found,) = both.run(replace(request, session="t"))
    assert found.said() == plain(model, request, chooser=choose).said()
    assert breaking.asked == at + 1


def test_without_a_request_nothing_is_shown() -> None:
    model = hf_model("llama")
    breaking: Any = Breaking(model, 0)
    text = continued(model, PROMPT, 20, chooser=choose)
    both = lockstep(breaking, Known(text, VOCABULARY))
    both.run(asking(PROMPT, max_tokens=20))
    assert breaking.asked == 0
    both.join(DraftEngine(Watching([]), "w", 1))
    both.run(asking(PROMPT, speculation=False, max_tokens=20))
    assert breaking.asked == 0


def test_states_that_are_no_numbers_begin_anew_after_them() -> None:
    """Token 7 overflows in the layers below, but it does not spoil the logits of later rows."""
    model, drafter = hf_model("llama"), Watching([])
    both = lockstep(model, drafter)
    sender, real = both.engine.drafter_manager.features, feature_sender.FeatureSender.record

    def record(state: Any, start: int, shown: Any, rows: Any = slice(None)) -> None:
        bits = shown.rows.copy()
        if start <= 34 < start + len(bits):
            bits[34 - start] = 0x7FC0
        real(sender, state, start, replace(shown, rows=bits), rows)

    sender.record = record  # type: ignore[method-assign]
    both.run(asking(PROMPT[:60], max_tokens=10))
    assert check_seen(model, drafter.seen) > 10
    assert {rows.start for _, rows in drafter.complete()} == {35}


def test_a_backlog_is_sent_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token a message, and 5 such messages a step beside the new ones."""
    model, late = hf_model("llama"), Watching([])
    monkeypatch.setattr(limits, "FEATURE_BYTES", 2 * 32 * len(LAYERS))
    monkeypatch.setattr(feature_sender, "BACKLOG_MESSAGES", 5)
    counts: list[int] = []

    def tamper(message: Any) -> Iterable[Any]:
        counts[-1] += isinstance(message, Features) and "late" in both.sends
        return [message]

    counts.append(0)
    both = lockstep(model, Watching([]), tamper=tamper, rows=1)
    both.admit(asking(PROMPT[:30], max_tokens=60))
    both.round()
    both.join(DraftEngine(late, "late", 4))
    while both.engine.requests.running:
        counts.append(0)
        both.round()
    assert max(counts[1:]) <= 5 + 2 + 2  # two rows each of the other drafter's and of its own
    assert check_seen(model, late.seen) > 30
    assert {rows.start for _, rows in late.complete()} == {0}


# Requests that cannot be served


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("model", "layers", "says"),
    [
        (hf_model("llama"), (0, 3), "features of layers [0, 3] of a model with 2 layers"),
        (hf_model("llama"), (2**32 - 1,), "[4294967295]"),
        (ToyModel(VOCABULARY), (1,), "shows no hidden states"),
        (HFModel(tiny("llama", hidden_size=128), "wide"), LAYERS, "are 768 bytes a token"),
    ],
)
def test_a_link_that_asks_for_what_is_not_there_is_refused(
    transport: str,
    model: Any,
    layers: tuple[int, ...],
    says: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "FEATURE_BYTES", 600)
    caplog.set_level(logging.WARNING)
    request = asking(PROMPT[:9], max_tokens=9)
    chooser: Any = reference_sample if isinstance(model, ToyModel) else choose

    async def main() -> None:
        async with (
            running(model, Fixed(2, 0.0), chooser=chooser) as target,
            hosted(Watching([], layers)) as host,
            TRANSPORTS[transport](host) as link,
        ):
            target.attach("d", link)
            await soon(lambda: target.lost["d"] == 1)
            assert not target.drafters
            found = await answer(target, request)
            assert found.said() == plain(model, request, chooser=chooser).said()

    asyncio.run(main())
    assert says in caplog.text
    assert "drafter d lost" in caplog.text


def test_asking_twice_is_a_strike() -> None:
    strikes: list[str] = []

    class Insisting:
        async def speculate(self, events: Any) -> Any:
            for _ in range(3):
                yield FeatureRequest(FeatureSpec((1,)), "x")
            async for _ in events:
                pass

    async def main() -> None:
        async with running(hf_model("llama"), Fixed(2, 0.0), chooser=choose) as target:
            target.attach("d", Insisting(), lambda why: strikes.append(why) or False)  # type: ignore[func-returns-value]
            await soon(lambda: len(strikes) == 2)
            assert target.engine.drafter_manager.features.specs == {"d": FeatureSpec((1,))}

    asyncio.run(main())
    assert set(strikes) == {"features asked for twice"}


def test_a_request_of_a_drafter_that_has_left_is_ignored() -> None:
    both = lockstep(hf_model("llama"), Watching([]))
    both.leave(both.draft_engines[0])
    both.engine.handle(ReplyReceived(FeatureRequest(FeatureSpec((1,)), "d-0"), 0.0))
    assert both.engine.drafter_manager.features.specs == {}
    both.join(DraftEngine(Known([], VOCABULARY), "d-0", 4))
    both.admit(asking(PROMPT))
    assert both.engine.requests.running["s"].features is None


def test_replies_beside_features_are_as_before() -> None:
    """A host without a request says nothing before its first event."""

    async def main(drafter: Any) -> list[Reply]:
        async with hosted(drafter) as host:

            async def none() -> Any:
                return
                yield

            return [reply async for reply in host.speculate(none())]

    assert asyncio.run(main(Known([], 9))) == []
    assert asyncio.run(main(Watching([]))) == [FeatureRequest(FeatureSpec(LAYERS), "d")]


def test_features_count_as_kv_memory() -> None:
    """A text of 30 + 34 tokens needs 64 slots and 64 rows of a step, and half as much for features.

    A slot has 256 bytes here, the features of two layers 128.
    """
    model = hf_model("llama")
    ticks = itertools.count()
    engine = Engine(
        model, Verifier(choose, frozenset()), Fixed(2), lambda: float(next(ticks)), kv_slots=440
    )
    both = Lockstep(engine, DraftEngine(Watching([], (0, 1)), "d", 4))
    assert (model.slot_bytes, model.hidden_size) == (2 * 2 * 2 * 8 * 4, 32)
    request = asking(PROMPT[:30], max_tokens=34)
    both.admit(request)
    admission = engine.requests.admission
    assert admission.reserved == 64 + 64 + 32
    both.run(replace(request, session="t"))
    assert admission.reserved == 0
    assert engine.requests.kv_kept >= 63 + 31
    longer = replace(request, prompt=tuple(PROMPT * 2)[:146])
    with pytest.raises(InvalidRequest, match="need 334 slots"):
        admission.check(longer, model.context)
    both.leave(both.draft_engines[0])
    admission.check(longer, model.context)


def test_a_request_that_waits_while_features_are_asked_for_does_not_starve() -> None:
    admission = Admission(200)
    request = asking(PROMPT[:30], max_tokens=90)
    admission.check(request, 512)
    admission.waiting.append(AddRequest(request, lettering()(request), lambda chunk: None))
    admission.feature_slots = 0.5
    with pytest.raises(InvalidRequest):
        admission.check(request, 512)
    assert admission.next(0, 512) is not None
    assert admission.next(0, 512) is None
