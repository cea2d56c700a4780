"""EAGLE with a target that sends its features: same output, and guesses that come true."""

import asyncio

import numpy as np
import pytest

from runtime.core.messages import Draft
from runtime.draft.draft_engine import DraftEngine
from runtime.models.hf import HFModel
from runtime.models.loader import load_model
from runtime.models.sampler import choose
from runtime.schedulers.fixed import Fixed
from tests.support.eagles import Tiny, drafter, greedy_texts, tiny, trained
from tests.support.harness import Lockstep, answer, asking, engine_of, hosted, plain, running

VOCABULARY = 16


def target_of(found: Tiny) -> HFModel:
    return load_model(str(found.target))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("passes", [1, 5])
def test_the_output_is_the_targets(temperature: float, passes: int) -> None:
    """Several texts in one batch, with a drafter that has learned nothing."""
    found = tiny(VOCABULARY)
    model = target_of(found)
    requests = [
        asking(range(1, 12 - n), f"s{n}", max_tokens=40, temperature=temperature, seed=n)
        for n in range(3)
    ]
    engine = engine_of(model, chooser=choose)
    outputs = Lockstep(engine, DraftEngine(drafter(found), "d", 4), passes=passes).run(*requests)
    assert [one.said() for one in outputs] == [
        plain(model, request, chooser=choose).said() for request in requests
    ]
    assert sum(one.stats.accepted for one in outputs) > 0
    assert engine.metrics.guesses["d"].feature_bytes > 0


def test_the_output_is_the_targets_through_a_link() -> None:
    found = tiny(VOCABULARY)
    model, request = target_of(found), asking(range(1, 12), max_tokens=40)

    async def main() -> None:
        async with (
            running(model, Fixed(8, 0.005), chooser=choose) as target,
            hosted(drafter(found), width=4) as host,
        ):
            target.attach("d", host)
            expected = plain(model, request, chooser=choose).said()
            assert (await answer(target, request)).said() == expected

    asyncio.run(main())


def test_what_it_has_learned_comes_true() -> None:
    """On texts that it knows, most steps bring several tokens; without features none would."""
    found = tiny(VOCABULARY)
    texts = greedy_texts(found, 6, 32)
    known, model = drafter(trained(found, texts)), target_of(found)
    for text in texts.tolist():
        engine = engine_of(model, chooser=choose)
        lockstep = Lockstep(engine, DraftEngine(known, "d", 4), passes=4)
        (one,) = lockstep.run(asking(text[:10], max_tokens=20))
        assert list(one.tokens) == text[10:30]
        assert one.stats.rounds <= 12


def test_after_a_commit_the_root_is_guessed_again() -> None:
    """A hit leaves guesses from the layer's own states; new ones come from the new features."""
    found = tiny(VOCABULARY)
    sent: list[Draft] = []
    engine = engine_of(target_of(found), chooser=choose)
    draft_engine = DraftEngine(drafter(found), "d", 4)
    lockstep = Lockstep(engine, draft_engine, passes=3)
    lockstep.admit(asking(range(1, 12), max_tokens=40))
    lockstep.round()
    lockstep.round()
    (state,) = draft_engine.states.values()
    draft_engine.receive(block=False)
    root = state.tree.key[0]
    assert len(state.tree) == 1
    assert not state.tree.expanded[0]
    state.send = lambda message: sent.append(message) if isinstance(message, Draft) else None
    draft_engine.step()
    draft_engine.send_unsent(())
    assert np.unique(sent[0].parents).tolist() == [root]
