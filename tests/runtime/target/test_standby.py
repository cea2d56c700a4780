"""A target that was told a text has little to read when it takes the text over."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.messages import Request, StandbyText, Tokens
from runtime.core.sampler_reference import reference_sample
from runtime.kv.prefix_cache import PrefixCache
from runtime.models.base import PassInput
from runtime.models.toy import ToyCache, ToyModel
from runtime.schedulers.fixed import Fixed
from runtime.target.commands import StandbyOver, StandbyReceived
from runtime.target.engine import Engine
from runtime.target.standby import (
    BUSY_SHARE,
    MAX_ROWS,
    MIN_PASS_S,
    MIN_ROWS,
    StandbyTexts,
    next_rows,
)
from runtime.target.verifier import Verifier
from tests.runtime.target.test_batching import Desk, Watched, desk
from tests.support.harness import NOBODY, asking, plain

PROMPT = tuple((7 * n + n // 5) % 24 for n in range(200))
MODEL = ToyModel(24, memory=3, context=600)


def tell(at: Desk, *texts: StandbyText, source: int = 0) -> None:
    at.engine.handle(StandbyReceived(source, texts))


def rest(at: Desk) -> None:
    """Steps until nothing is left to do."""
    for _ in range(1000):
        if at.engine.step() is None:
            return
    pytest.fail("it never rests")


def read_by(model: Watched, at: Desk, request: Request) -> int:
    """The rows that are read before the first token of this request, beside its step."""
    at.admit(request)
    passes = len(model.passes)
    at.engine.step()
    assert at.chunks[request.session]
    return sum(map(sum, model.passes[passes:-1]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("lag", [0, 1, 7])
def test_a_text_that_was_told_is_not_read_again(temperature: float, lag: int) -> None:
    asked = asking(PROMPT, max_tokens=40, temperature=temperature, seed=5)
    whole = plain(MODEL, asked).tokens
    cut = 20
    text = (*PROMPT, *whole[: cut - lag])
    taken = replace(asked, committed=whole[:cut], epoch=1)
    for told in (True, False):
        model = Watched()
        at = desk(model)
        if told:
            tell(at, StandbyText("1", 0, text[:190]), StandbyText("1", 190, text[190:]))
            rest(at)
            assert at.engine.requests.standby.read == len(text)
        # All but the last token, which is the root of the first step
        expected = max(0, lag - 1) if told else len(PROMPT) + cut - 1
        assert read_by(model, at, taken) == expected
        assert at.run()["s"].tokens == whole[cut:]


def test_a_hundred_texts_that_were_told_are_taken_over_in_one_pass() -> None:
    """Beside others that go on. What is read is what the target was not told yet."""
    model = Watched()
    at = desk(model)
    prompts = [(number % 23, number // 23, *PROMPT[:60]) for number in range(100)]
    tell(at, *(StandbyText(str(n), 0, prompt[:-3]) for n, prompt in enumerate(prompts)))
    rest(at)
    at.admit(asking(PROMPT, "here", max_tokens=30))
    at.engine.step()
    passes = len(model.passes)
    for number, prompt in enumerate(prompts):
        at.admit(replace(asking(prompt, f"s{number}", max_tokens=9), committed=(1,), epoch=1))
    at.engine.step()
    assert all(at.chunks[f"s{number}"] for number in range(100))
    assert [sum(rows) for rows in model.passes[passes:-1]] == [300]


def test_texts_with_a_common_beginning_share_what_is_read() -> None:
    model = Watched()
    at = desk(model)
    tell(at, *(StandbyText(str(n), 0, (*PROMPT, n, n)) for n in range(5)))
    rest(at)
    assert sum(map(sum, model.passes)) < 2 * len(PROMPT)
    assert all(not text.unread for text in at.engine.requests.standby.texts.values())


class Slow(ToyModel):
    """Its passes take time: a fixed part, and one for each row."""

    def __init__(self, base_s: float, row_s: float) -> None:
        super().__init__(24, memory=3, context=600)
        self.base_s, self.row_s, self.now = base_s, row_s, 0.0
        self.unasked = 0.0  # seconds of passes whose logits nobody wants

    def forward_all(self, parts: Sequence[PassInput]) -> Any:
        seconds = self.base_s + self.row_s * sum(len(part.rows.tokens) for part in parts)
        self.now += seconds
        if all(part.last == 0 for part in parts):
            self.unasked += seconds
        return super().forward_all(parts)


@pytest.mark.parametrize(("base_s", "row_s"), [(0.03, 0.0), (0.0, 0.001), (0.002, 0.0001)])
def test_sessions_lose_no_more_than_a_small_share_of_their_time(
    base_s: float, row_s: float
) -> None:
    model = Slow(base_s, row_s)
    at = Desk(Engine(model, Verifier(reference_sample, NOBODY), Fixed(8), lambda: model.now))
    for number in range(4):
        at.admit(asking(PROMPT[number : number + 20], f"s{number}", max_tokens=500))
    at.engine.step()
    began, model.unasked = model.now, 0.0
    tell(at, *(StandbyText(str(n), 0, (n, *PROMPT)) for n in range(20)))
    at.run()
    read = at.engine.requests.standby.read
    assert read > 0
    longest = max(MIN_PASS_S, base_s + 4 * row_s) + base_s + MIN_ROWS * row_s
    # The last pass beside them, and the first one after them
    assert model.unasked <= BUSY_SHARE * (model.now - began) + 2 * longest
    rest(at)
    assert at.engine.requests.standby.read > read, "the rest is read when nobody is there"


def test_nothing_is_read_in_advance_while_a_prompt_is_read() -> None:
    model = Watched()
    at = desk(model)
    at.admit(asking(PROMPT[:5], "here", max_tokens=40))
    at.engine.step()
    tell(at, StandbyText("1", 0, PROMPT))
    at.admit(asking(tuple(n % 24 for n in range(400)), "long"))
    while not at.chunks["long"]:
        assert at.engine.requests.standby.read == 0
        at.engine.step()
    rest(at)
    assert at.engine.requests.standby.read == len(PROMPT)


@given(st.integers(MIN_ROWS, MAX_ROWS), st.floats(0.0, 10.0), st.floats(0.001, 1.0))
def test_a_pass_grows_to_the_time_that_it_may_take(rows: int, seconds: float, most: float) -> None:
    found = next_rows(rows, seconds, most)
    assert MIN_ROWS <= found <= min(MAX_ROWS, 2 * rows)
    if seconds > most:
        assert found <= max(MIN_ROWS, rows)
    if found > MIN_ROWS and seconds > 0:
        assert found * seconds / rows <= most * (1 + 1e-9)


# What is kept

UPDATES = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from("abc"),
        st.sampled_from(["more", "anew", "gap", "over"]),
        st.lists(st.integers(0, 23), max_size=20),
    ),
    max_size=30,
)


@given(UPDATES, st.integers(0, 60))
def test_texts_are_as_they_were_told_and_within_the_budget(
    updates: list[tuple[int, str, str, list[int]]], budget: int
) -> None:
    texts, prefixes = StandbyTexts(MODEL, lambda: 0.0, budget), PrefixCache(10**6)
    known: dict[tuple[int, str], Tokens] = {}
    for source, name, kind, tokens in updates:
        before = known.pop((source, name), ())
        start = {"more": len(before), "anew": 0, "gap": len(before) + 3, "over": 0}[kind]
        texts.update(source, StandbyText(name, start, tuple(tokens), over=kind == "over"))
        after = (*before, *tokens)
        kept = sum(map(len, known.values()))
        if kind != "over" and start == len(before) and kept + len(after) <= budget:
            known[source, name] = after
        texts.read_idle(prefixes)
        assert {name: tuple(text.tokens) for name, text in texts.texts.items()} == known
        assert texts.tokens == sum(map(len, known.values())) <= budget
        for text in texts.texts.values():
            assert isinstance(text.cache, ToyCache)
            assert text.cache.tokens == text.tokens[: text.cache.length]
    while texts.read_idle(prefixes):
        pass
    assert texts.slots == texts.tokens
    texts.forget(0)
    assert {source for source, _ in texts.texts} <= {1}


def test_they_share_the_memory_of_finished_texts_and_take_none_of_sessions() -> None:
    kv_slots = 1600
    at = desk(Watched(), kv_slots)
    requests = at.engine.requests
    for number in range(8):
        at.admit(asking((number, *PROMPT[:80]), f"s{number}", max_tokens=2))
    at.run()
    before = requests.prefixes.slots
    assert before > kv_slots // 8
    tell(at, *(StandbyText(str(n), 0, (n, *PROMPT[:98])) for n in range(3)))
    rest(at)
    standby = requests.standby
    assert standby.slots == 198, "a third one does not fit"
    assert requests.prefixes.slots + standby.slots <= kv_slots // 4
    assert requests.prefixes.slots < before
    report = at.engine.report()
    at.engine.requests.publish()
    report = at.engine.report()
    assert (report.standby_slots, report.standby_tokens) == (198, 198)
    assert requests.admission.budget == kv_slots - kv_slots // 4
    at.engine.handle(StandbyOver(0))
    assert (standby.slots, standby.tokens, requests.prefixes.reserved) == (0, 0, 0)


def test_a_text_longer_than_the_context_is_dropped() -> None:
    at = desk(Watched())
    tell(at, StandbyText("1", 0, (1,) * 600))
    tell(at, StandbyText("1", 600, (1,)))
    rest(at)
    assert not at.engine.requests.standby.texts


def test_a_pass_that_fails_costs_its_texts_alone() -> None:
    model = Watched(most=20)
    at = desk(model)
    standby = at.engine.requests.standby
    standby.rows = 64
    tell(at, StandbyText("long", 0, PROMPT), StandbyText("short", 0, PROMPT[:10]))
    rest(at)
    assert [name for _, name in standby.texts] == ["short"]
    at.admit(asking(PROMPT[:12], max_tokens=4))
    assert at.run()["s"].said() == plain(MODEL, asking(PROMPT[:12], max_tokens=4)).said()
