"""A drafter that asks for hidden states sees those of the target's own pass over the text."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from runtime.core import limits
from runtime.draft.draft_engine import DraftEngine
from runtime.models.base import OutputSpec, PassInput, PassOutput
from runtime.models.sampler import choose
from runtime.schedulers.fixed import Fixed
from tests.contracts.link_contract import TRANSPORTS, Attach, soon
from tests.support.families import VOCABULARY, hf_model
from tests.support.features import LAYERS, PROMPT, Watching, check_seen, lockstep, misled
from tests.support.harness import (
    Known,
    answer,
    asking,
    attached,
    continued,
    hosted,
    output,
    plain,
    running,
)

FAMILY = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])


def test_the_pass_of_rows_is_the_pass_of_a_text() -> None:
    """The oracle itself: rows and layers that differ are told apart."""
    model, drafter = hf_model("llama"), Watching([])
    lockstep(model, drafter).run(asking(PROMPT[:9], max_tokens=3))
    tokens, found = drafter.complete()[-1]
    with pytest.raises(AssertionError):
        check_seen(model, [((tokens[0] + 1, *tokens[1:]), found)])
    with pytest.raises(AssertionError):
        check_seen(model, [(tokens, found)], (0, 2))


@FAMILY
@pytest.mark.parametrize("length", [1, 2, 20, 90])
def test_each_text_comes_with_the_states_of_all_its_tokens_but_the_last(
    family: str, length: int
) -> None:
    model, prompt = hf_model(family), PROMPT[:length]
    drafter = Watching(misled(model, prompt, 40))
    request = asking(prompt, max_tokens=40)
    (found,) = lockstep(model, drafter).run(request)
    assert found.said() == plain(model, request, chooser=choose).said()
    assert 0 < found.stats.accepted < 40
    assert check_seen(model, drafter.seen) > 40 * length / 2
    assert all(rows.start == 0 for _, rows in drafter.complete())
    assert all(len(tokens) == 1 for tokens, rows in drafter.seen if rows is None)
    assert max(len(tokens) for tokens, _ in drafter.complete()) > length + 30


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_link_carries_them(transport: str, family: str) -> None:
    attach: Attach = TRANSPORTS[transport]
    model = hf_model(family)
    texts = [PROMPT, PROMPT[:40], PROMPT[50:80]]
    drafter = Watching(continued(model, PROMPT, 20, chooser=choose))

    async def main() -> None:
        async with (
            running(model, Fixed(4, 0.02), chooser=choose) as target,
            hosted(drafter, width=4) as host,
            attach(host) as link,
        ):
            await attached(target, "d", link)
            requests = [asking(text, f"s{n}", max_tokens=20) for n, text in enumerate(texts)]
            found = await asyncio.gather(*(answer(target, request) for request in requests))
            for one, request in zip(found, requests, strict=True):
                assert one.said() == plain(model, request, chooser=choose).said()
            await soon(lambda: not host.draft_engine.states)
            assert host.draft_engine.counters == {}
            assert target.report().guesses["d"].feature_bytes > 0
            assert target.report().guesses["d"].accepted > 0

    asyncio.run(main())
    assert check_seen(model, drafter.seen) > 0
    assert len({tokens[0] for tokens, _ in drafter.complete()}) == 2


def test_prompts_in_chunks_beside_texts_that_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message holds 7 tokens here."""
    model, drafter = hf_model("llama"), Watching([])
    monkeypatch.setattr(limits, "FEATURE_BYTES", 7 * 2 * 32 * len(LAYERS))
    prompts = [PROMPT[:4], PROMPT * 2, [*PROMPT[30:], *PROMPT]]
    both = lockstep(model, drafter)
    chunks = both.admit(asking(prompts[0], "a", max_tokens=60))
    for n, prompt in enumerate(prompts[1:]):
        both.round()
        both.admit(asking(prompt, f"b{n}", max_tokens=30))
    while both.engine.requests.running:
        both.round()
    assert output(chunks).reason == "length"
    assert check_seen(model, drafter.seen) > 1000
    seen = {len(tokens): rows.start for tokens, rows in drafter.complete()}
    assert seen[2 * len(PROMPT) + 4] == 0
    assert all(start == 0 for start in seen.values())


@pytest.mark.parametrize("asked", ["before", "after"])
def test_a_cached_prefix_brings_its_states_along(asked: str) -> None:
    """If the drafter came after the prefix was read, nobody has kept them."""
    model, drafter = hf_model("llama"), Watching([])
    both = lockstep(model, *([drafter] if asked == "before" else []))
    both.run(asking(PROMPT, "first", max_tokens=8))
    if asked == "after":
        both.join(DraftEngine(drafter, "d-0", 4))
    drafter.seen.clear()
    (found,) = both.run(asking([*PROMPT[:60], 5, 6, 7], "second", max_tokens=8))
    assert found.stats.reused == 60
    assert check_seen(model, drafter.seen) > 0
    assert {rows.start for _, rows in drafter.complete()} == {0 if asked == "before" else 60}


def test_a_running_text_that_is_copied_brings_its_states_along() -> None:
    model, drafter = hf_model("llama"), Watching([])
    both = lockstep(model, drafter)
    both.admit(asking(PROMPT, "first", max_tokens=50))
    both.round()
    chunks = both.admit(asking([*PROMPT[:70], 9], "second", max_tokens=8))
    while both.engine.requests.running:
        both.round()
    assert output(chunks).stats.reused == 70
    assert check_seen(model, drafter.seen) > 0
    assert {rows.start for _, rows in drafter.complete()} == {0}


@pytest.mark.parametrize("others", [True, False])
def test_a_drafter_that_joins_in_mid_text(others: bool) -> None:
    """It gets all states if another drafter had asked for them, else those to come."""
    model, late = hf_model("llama"), Watching([])
    both = lockstep(model, *([Watching([])] if others else [Known([], VOCABULARY)]))
    both.admit(asking(PROMPT[:30], max_tokens=40))
    for _ in range(5):
        both.round()
    both.join(DraftEngine(late, "late", 4))
    while both.engine.requests.running:
        both.round()
    assert check_seen(model, late.seen) > 30
    starts = {rows.start for _, rows in late.complete()}
    assert starts == {0} if others else len(starts) == 1 and min(starts) > 30


def test_a_drafter_that_reconnects_gets_them_again() -> None:
    model, first, again = hf_model("llama"), Watching([]), Watching([])
    both = lockstep(model, first)
    both.admit(asking(PROMPT[:30], max_tokens=40))
    for _ in range(5):
        both.round()
    both.leave(both.draft_engines[0])
    for _ in range(5):
        both.round()
    both.join(DraftEngine(again, "d-0", 4))
    while both.engine.requests.running:
        both.round()
    assert check_seen(model, again.seen) > 30
    assert {rows.start for _, rows in again.complete()} == {0}


def test_two_drafters_get_the_layers_that_each_asked_for() -> None:
    model, one, two = hf_model("llama"), Watching([], (0, 2)), Watching([], (1, 2))
    found = lockstep(model, one, two)
    found.run(asking(PROMPT[:30], max_tokens=20))
    assert check_seen(model, one.seen, (0, 2)) > 30
    assert check_seen(model, two.seen, (1, 2)) > 30
    assert {rows.start for _, rows in (*one.complete(), *two.complete())} == {0}


def test_a_text_that_another_target_began_brings_all_its_states() -> None:
    """The target that takes it over reads the committed tokens again."""
    model, drafter = hf_model("llama"), Watching([])
    request = asking(PROMPT[:20], max_tokens=30)
    expected = plain(model, request, chooser=choose)
    taken_over = replace(request, committed=expected.tokens[:12], epoch=3)
    (found,) = lockstep(model, drafter).run(taken_over)
    assert found.tokens[:18] == expected.tokens[12:]
    assert check_seen(model, drafter.seen) > 32
    assert {rows.start for _, rows in drafter.complete()} == {0}
    assert min(len(tokens) for tokens, _ in drafter.complete()) == 32


def test_a_head_and_a_drafter_share_a_pass() -> None:
    """Each picks its layers from those that the pass shows for both."""
    model, drafter = hf_model("llama"), Watching([], (0, 2))
    both = lockstep(model, drafter)
    both.admit(asking(PROMPT[:20], max_tokens=9))
    shown: list[tuple[int, ...]] = []
    heads, forward = both.engine.heads, both.engine.heads.forward
    heads.output_spec = OutputSpec(hidden=True, features=(1,))

    def watched(parts: Sequence[PassInput], layers: tuple[int, ...] = ()) -> list[PassOutput]:
        found = forward(parts, layers)
        for one in found:
            assert one.features is not None
            assert one.hidden is not None
            shown.append(one.features.layers)
        return found

    heads.forward = watched  # type: ignore[method-assign]
    heads.activate = lambda: None  # type: ignore[method-assign]
    while both.engine.requests.running:
        both.round()
    assert set(shown) == {(0, 1, 2)}
    assert check_seen(model, drafter.seen, (0, 2)) > 20
