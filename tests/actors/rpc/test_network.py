"""A network that loses, repeats, reorders and invents messages changes nothing but speed."""

import itertools
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core import limits
from runtime.core.messages import Chunk, Close, Commit, Draft, Event, Open, Reply, Resync, Share
from runtime.core.sampling_params import SamplingParams
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.base import Drafter
from runtime.drafters.model import ModelDrafter
from runtime.drafters.noisy import NoisyDrafter
from runtime.target.commands import AddRequest
from tests.runtime.target.test_engine import EOS, PROMPT, TEXT, TOY, alone, perfect
from tests.support.harness import Lockstep, asking, engine_of, lettering, output, plain

# A network that loses, repeats, reorders and invents


class Adversary:
    """Does to each message on the way what its dice say; forges others from what it has seen."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.held: list[tuple[bool, Any]] = []
        self.keys: list[int] = [0, 2**64 - 1]
        self.worst = self.random.choice([0.1, 0.5, 0.9])
        self.fates: set[str] = set()

    def __call__(self, message: Event | Reply) -> list[Event | Reply]:
        inbound = isinstance(message, Draft | Resync)
        if isinstance(message, Commit):
            self.keys.append(message.key)
        elif isinstance(message, Draft):
            self.keys.extend(message.parents.tolist())
        fate = (
            self.random.choice(["lose", "repeat", "hold", "forge", "forge"])
            if self.random.random() < self.worst
            else "deliver"
        )
        self.fates.add(fate)
        passed: list[Any] = {"lose": [], "repeat": [message, message], "hold": []}.get(
            fate, [message]
        )
        if fate == "hold":
            self.held.append((inbound, message))
        if fate == "forge":
            passed.insert(
                self.random.randint(0, 1), self.forged_reply() if inbound else self.forged_event()
            )
        mine = [place for place, kept in enumerate(self.held) if kept[0] == inbound]
        if mine and self.random.random() < 0.5:
            passed.append(self.held.pop(self.random.choice(mine))[1])
        return passed

    def forged_reply(self) -> Reply:
        n = self.random.choice([0, 1, 3, 40, limits.DRAFT_NODES + 1])
        if self.random.random() < 0.2:
            return Resync(self.random.choice(["s", "ghost"]), "x")
        return Draft(
            self.random.choice(["s", "s", "s", "ghost"]),
            self.random.choice([0, 0, 0, 1]),
            "x",
            np.array([self.random.choice(self.keys) for _ in range(n)], np.uint64),
            np.array(
                [self.random.choice([0, 5, 23, 24, -1, 2**31 - 1]) for _ in range(n)], np.int32
            ),
            np.array(
                [
                    self.random.choice(
                        [0.0, -0.1, -99.0, 1.0, float("nan"), -float("inf"), float("inf")]
                    )
                    for _ in range(n)
                ],
                np.float32,
            ),
        )

    def forged_event(self) -> Event:
        session = self.random.choice(["s", "s", "s", "ghost"])
        tokens = tuple(self.random.randrange(24) for _ in range(self.random.choice([0, 1, 3])))
        share = Share(session, self.random.choice([0, 1, 9]), self.random.choice([0, 1, 2]))
        forged: list[Event] = [
            Commit(
                session,
                self.random.choice([0, 1]),
                self.random.choice([0, 5, 6, 20, 10**9]),
                tokens,
                self.random.choice(self.keys),
            ),
            Open(session, 0, (*PROMPT, *tokens), 5, SamplingParams(max_tokens=24), share),
            Open(session, 0, (), 0, SamplingParams(), share),
            share,
            Close(session),
        ]
        return self.random.choice(forged)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@given(seed=st.integers(0, 10**9))
@settings(max_examples=60)
def test_the_network_changes_nothing_but_speed(temperature: float, seed: int) -> None:
    adversary = Adversary(seed)
    drafters: list[Drafter] = [
        ModelDrafter(TOY, branches=2),
        NoisyDrafter(ModelDrafter(TOY), TOY.vocabulary, 0.3),
    ]
    draft_engines = [DraftEngine(drafter, f"d{n}", 3) for n, drafter in enumerate(drafters)]
    request = asking(PROMPT, temperature=temperature, seed=seed, max_tokens=20)
    (found,) = Lockstep(engine_of(TOY), *draft_engines, tamper=adversary).run(request)
    assert found.said() == alone(request)
    assert found.stats.rounds <= 20


def test_the_adversary_does_all_it_can_and_some_drafts_get_through() -> None:
    fates: set[str] = set()
    accepted, ignored = 0, set()
    for seed in range(60):
        adversary = Adversary(seed)
        (found,) = Lockstep(
            engine_of(TOY), DraftEngine(ModelDrafter(TOY), "d", 3), tamper=adversary
        ).run(asking(PROMPT))
        fates |= adversary.fates
        ignored |= set(found.stats.ignored)
        accepted += found.stats.accepted
    assert fates == {"deliver", "lose", "repeat", "hold", "forge"}
    assert ignored == {"stale", "late", "repeated", "invalid", "oversize"}
    assert accepted > 200


def test_a_lost_commit_costs_a_question_and_then_all_is_well() -> None:
    """Everything towards the drafter is lost for five rounds."""
    sent = itertools.count()

    def lossy(message: Event | Reply) -> list[Event | Reply]:
        return [] if isinstance(message, Commit) and next(sent) in range(1, 6) else [message]

    draft_engine = perfect()
    lockstep = Lockstep(engine_of(TOY, rows=4), draft_engine, passes=4, tamper=lossy)
    (found,) = lockstep.run(asking(PROMPT, max_tokens=60))
    assert found.tokens == tuple(TEXT[5:65])
    assert draft_engine.counters["resync"] >= 1
    assert found.stats.rounds <= 12 + 8


def test_what_was_decided_before_is_gone_on_from() -> None:
    whole = asking(
        PROMPT, temperature=0.9, seed=5, presence_penalty=0.5, repetition_penalty=1.3, min_tokens=20
    )
    expected = plain(TOY, whole, EOS)
    for cut in (1, 7, 20):
        request = replace(whole, committed=expected.tokens[:cut])
        finish = lettering(EOS)(request)
        before = "".join(finish.feed(token).text for token in request.committed)
        chunks: list[Chunk] = []
        engine = engine_of(TOY, eos=EOS)
        lockstep = Lockstep(engine, DraftEngine(ModelDrafter(TOY), "d", 2))
        engine.handle(AddRequest(request, finish, chunks.append))
        while engine.requests.running:
            lockstep.round()
        found = output(chunks)
        assert (before + found.text, (*request.committed, *found.tokens)) == (
            expected.text,
            expected.tokens,
        )
        assert (found.reason, found.stats.completion_tokens) == (
            expected.reason,
            expected.stats.completion_tokens,
        )
