"""The target's loop, stepped by hand, decides, informs drafters and survives faults."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from runtime.core.messages import (
    Chunk,
    Close,
    Commit,
    Draft,
    Event,
    Open,
    Reply,
    Request,
    Resync,
    Share,
)
from runtime.core.node_keys import text_key
from runtime.core.sampler_reference import SamplingInput, reference_sample
from runtime.core.sampling_params import SamplingParams
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.base import Drafter
from runtime.drafters.model import ModelDrafter
from runtime.drafters.ngram import NgramDrafter
from runtime.drafters.noisy import NoisyDrafter
from runtime.models.toy import ToyModel
from runtime.target.commands import AddRequest, Join, Leave, ReplyReceived
from tests.support.harness import (
    NOBODY,
    Known,
    Lockstep,
    Mute,
    Output,
    asking,
    continued,
    engine_of,
    lettering,
    output,
    plain,
)

PROMPT = (3, 1, 4, 1, 5)
TOY = ToyModel(vocabulary=24, memory=3)
TEXT = continued(TOY, PROMPT, 100)


def perfect(name: str = "d", width: int = 1, branches: int = 1) -> DraftEngine:
    return DraftEngine(Known(TEXT, TOY.vocabulary, branches), name, width)


def alone(request: Request, eos: frozenset[int] = NOBODY) -> tuple[object, ...]:
    return plain(TOY, request, eos).said()


# Decoding


def test_without_drafters_it_is_plain_decoding() -> None:
    text = list(PROMPT)
    for _ in range(24):
        text.append(
            int(
                reference_sample(
                    TOY.logits(text)[None], SamplingInput(SamplingParams(), 5, text, [[]], NOBODY)
                )[0]
            )
        )
    found = plain(TOY, asking(PROMPT))
    assert (*PROMPT, *found.tokens) == tuple(text)
    assert found.reason == "length"
    assert (found.stats.rounds, found.stats.verified, found.stats.drafted) == (24, 0, 0)
    assert (found.stats.prompt_tokens, found.stats.completion_tokens) == (5, 24)
    assert found.drafters == ("",) * 24


@pytest.mark.parametrize("prompt", [(7,), (7, 7), PROMPT * 20])
def test_prompts_of_any_length(prompt: tuple[int, ...]) -> None:
    request = asking(prompt, max_tokens=6)
    (drafted,) = Lockstep(engine_of(TOY), DraftEngine(ModelDrafter(TOY), "d", 4)).run(request)
    assert drafted.said() == alone(request)
    assert drafted.tokens[0] == int(TOY.logits(prompt).argmax())


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8])
def test_a_perfect_chain_of_depth_d_saves_d_of_d_plus_one_steps(depth: int) -> None:
    (found,) = Lockstep(engine_of(TOY, rows=depth), perfect(), passes=depth).run(
        asking(PROMPT, max_tokens=8 * (depth + 1))
    )
    assert found.tokens == tuple(TEXT[5 : 5 + 8 * (depth + 1)])
    stats = found.stats
    assert (stats.rounds, stats.accepted, stats.verified, stats.drafted) == (
        8,
        8 * depth,
        8 * depth,
        8 * depth,
    )
    assert stats.histogram == (0,) * depth + (8,)
    assert stats.by_drafter == {"d": 8 * depth}
    assert found.drafters == (("d",) * depth + ("",)) * 8


def test_growth_beyond_what_is_verified_makes_hits_and_is_used_later() -> None:
    (found,) = Lockstep(engine_of(TOY, rows=2), perfect(), passes=20).run(
        asking(PROMPT, max_tokens=30)
    )
    assert found.tokens == tuple(TEXT[5:35])
    assert (found.stats.rounds, found.stats.hits) == (
        10,
        9,
    )  # the last commit leaves nothing to hit
    assert found.stats.drafted == 29


def test_a_wrong_drafter_costs_rows_and_nothing_else() -> None:
    wrong = DraftEngine(
        NoisyDrafter(Known(TEXT, TOY.vocabulary, 2), TOY.vocabulary, wrong=1.0), "w", 4
    )
    (found,) = Lockstep(engine_of(TOY), wrong).run(asking(PROMPT))
    assert found.said() == alone(asking(PROMPT))
    assert (found.stats.rounds, found.stats.accepted, found.stats.hits) == (24, 0, 0)
    assert found.stats.verified > 24


def test_times_add_up() -> None:
    """The clock of the rig ticks once for each look at it."""
    (found,) = Lockstep(engine_of(TOY), perfect()).run(asking(PROMPT))
    stats = found.stats
    assert stats.computed == stats.rounds
    assert stats.prefill == 1.0
    assert stats.waited == 0.0
    assert stats.bookkeeping > 0.0
    assert stats.elapsed > stats.computed + stats.bookkeeping + stats.prefill


# The end, inside an accepted run


EOS = frozenset({TEXT[5 + 10]})
END = TEXT.index(TEXT[15], 5) - 5 + 1  # tokens until the first of that id


@pytest.mark.parametrize("passes", [1, 2, 3, 5, 30])
@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"max_tokens": 60}, "stop"),
        ({"max_tokens": 60, "ignore_eos": True}, "length"),
        ({"max_tokens": 60, "min_tokens": 40}, None),
        ({"max_tokens": END - 1}, "length"),
        ({"max_tokens": END}, "stop"),
        ({"max_tokens": 1}, "length"),
        (
            {"max_tokens": 60, "stop": ("".join(chr(97 + token % 26) for token in TEXT[9:12]),)},
            "stop",
        ),
        ({"max_tokens": 60, "stop": (chr(97 + TEXT[12] % 26), "zzz"), "min_tokens": 3}, "stop"),
    ],
)
def test_the_end_is_where_it_is_without_drafters(
    sampling: dict[str, Any], reason: str | None, passes: int
) -> None:
    request = asking(PROMPT, **sampling)
    drafter = ModelDrafter(TOY, branches=2)
    (found,) = Lockstep(
        engine_of(TOY, rows=16, eos=EOS), DraftEngine(drafter, "d", 2), passes=passes
    ).run(request)
    assert found.said() == alone(request, EOS)
    assert found.reason == reason or reason is None
    assert len(found.tokens) == found.stats.completion_tokens <= sampling["max_tokens"]
    assert found.stats.accepted == sum(name == "d" for name in found.drafters)
    assert found.stats.accepted > 0 or len(found.tokens) == 1
    assert drafter.kept == {}


# Several sessions, several drafters


def test_sessions_beside_each_other_are_as_alone() -> None:
    requests = [
        asking((*PROMPT, n), f"s{n}", speculation=n % 3 > 0, temperature=0.4 * (n % 2), seed=n)
        for n in range(9)
    ]
    found = Lockstep(engine_of(TOY), DraftEngine(ModelDrafter(TOY), "d", 4)).run(*requests)
    assert [one.said() for one in found] == [alone(request) for request in requests]
    assert [one.stats.accepted > 0 for one in found] == [n % 3 > 0 for n in range(9)]


def test_drafters_share_a_session() -> None:
    drafters: list[Drafter] = [
        ModelDrafter(TOY),
        NoisyDrafter(ModelDrafter(TOY), 24, 0.5),
        NgramDrafter(),
        ModelDrafter(TOY),
        Mute(),
    ]
    draft_engines = [DraftEngine(drafter, f"d{n}", 3) for n, drafter in enumerate(drafters)]
    lockstep = Lockstep(engine_of(TOY), *draft_engines)
    chunks = lockstep.admit(asking(PROMPT))
    lockstep.round()
    assert [next(iter(draft_engine.states.values())).share for draft_engine in draft_engines] == [
        Share("s", n, 5) for n in range(5)
    ]
    while lockstep.engine.requests.running:
        lockstep.round()
    found = output(chunks)
    assert found.said() == alone(asking(PROMPT))
    assert sum(found.stats.by_drafter.values()) == found.stats.accepted > 12
    assert found.stats.ignored["repeated"] > 0


def through(
    request: Request,
    *happenings: tuple[int, Callable[[Lockstep], None]],
    draft_engines: Iterable[DraftEngine] = (),
) -> tuple[Output, Lockstep]:
    """A generation to which something happens after so many rounds."""
    lockstep = Lockstep(engine_of(TOY), *draft_engines)
    chunks = lockstep.admit(request)
    due = dict(happenings)
    for number in itertools.count():
        if number in due:
            due.pop(number)(lockstep)
        if not lockstep.engine.requests.running:
            break
        lockstep.round()
    assert not due
    for draft_engine in lockstep.draft_engines:
        draft_engine.receive(block=False)
    return output(chunks), lockstep


def test_a_drafter_joins_in_mid_stream() -> None:
    late = perfect()
    found, _ = through(asking(PROMPT), (6, lambda lockstep: lockstep.join(late)))
    assert found.said() == alone(asking(PROMPT))
    assert found.drafters[:6] == ("",) * 6
    assert found.stats.rounds == 6 + 6  # then 18 tokens, three a round
    assert late.states == {}


def test_a_drafter_leaves_in_mid_stream_and_another_takes_its_share() -> None:
    first, second = perfect("a"), DraftEngine(ModelDrafter(TOY), "b", 2)
    found, lockstep = through(
        asking(PROMPT), (3, lambda lockstep: lockstep.leave(first)), draft_engines=(first, second)
    )
    assert found.said() == alone(asking(PROMPT))
    assert list(lockstep.engine.drafters) == ["b"]
    assert found.stats.by_drafter["b"] > found.stats.by_drafter["a"] > 0


def test_the_last_drafter_leaves_in_mid_stream() -> None:
    only = perfect()
    found, _ = through(
        asking(PROMPT), (3, lambda lockstep: lockstep.leave(only)), draft_engines=(only,)
    )
    assert found.said() == alone(asking(PROMPT))
    assert 0 < found.stats.accepted < 10
    assert set(found.drafters[-10:]) == {""}


def test_who_left_late_does_not_take_along_who_has_joined_since() -> None:
    heard: list[Event] = []
    engine = engine_of(TOY)
    old: Callable[[Event], None] = lambda event: None  # noqa: E731
    engine.handle(Join("d", old))
    engine.handle(Join("d", heard.append))
    engine.handle(Leave("d", old))
    engine.handle(AddRequest(asking(PROMPT), lettering()(asking(PROMPT)), lambda chunk: None))
    engine.requests.start(engine.scheduler.style)
    assert [type(event) for event in heard] == [Open]


# What drafters are told


class Told:
    """An engine with one drafter that only listens."""

    def __init__(self, **options: Any) -> None:
        self.engine = engine_of(TOY, **options)
        self.events: list[Event] = []
        self.chunks: list[Chunk] = []
        self.engine.handle(Join("d", self.events.append))

    def admit(self, request: Request) -> None:
        self.engine.handle(
            AddRequest(
                request, lettering(self.engine.runner.verifier.eos)(request), self.chunks.append
            )
        )

    def advance(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine.step()

    def hear(self, reply: Reply) -> None:
        self.engine.handle(ReplyReceived(reply, self.engine.clock()))

    def heard(self) -> list[Event]:
        events = self.events[:]
        self.events.clear()
        return events


def test_the_events_of_a_generation() -> None:
    told = Told()
    request = asking(PROMPT, max_tokens=3)
    told.admit(request)
    told.advance(3)
    names = [text_key(TEXT[:n]) for n in range(9)]
    assert told.heard() == [
        Open("s", 0, PROMPT, 5, request.sampling, Share("s", 0, 1)),
        *(Commit("s", 0, n, (TEXT[n],), names[n + 1]) for n in (5, 6, 7)),
        Close("s"),
    ]


def test_who_joins_learns_the_text_and_the_others_their_new_share() -> None:
    events: list[Event] = []
    told = Told()
    send: Callable[[Event], None] = events.append
    told.admit(asking(PROMPT))
    told.advance(2)
    told.heard()
    told.engine.handle(Join("e", send))
    assert told.heard() == [Share("s", 0, 2)]
    assert events == [Open("s", 0, tuple(TEXT[:7]), 5, asking(PROMPT).sampling, Share("s", 1, 2))]
    told.engine.handle(Leave("e", send))
    assert told.heard() == [Share("s", 0, 1)]


def test_a_resync_is_answered_with_the_text() -> None:
    told = Told()
    told.admit(asking(PROMPT))
    told.advance(3)
    told.heard()
    told.hear(Resync("s", "d"))
    assert told.heard() == [
        Open("s", 0, tuple(TEXT[:8]), 5, asking(PROMPT).sampling, Share("s", 0, 1))
    ]
    told.hear(Resync("s", "stranger"))
    told.hear(Resync("none", "d"))
    assert told.heard() == []


def test_a_session_without_speculation_is_nobodys_business() -> None:
    told = Told()
    told.admit(asking(PROMPT, speculation=False))
    told.advance(2)
    told.hear(Resync("s", "d"))
    told.hear(draft([(TEXT[:6], TEXT[6])]))
    told.engine.handle(Join("e", told.events.append))
    told.advance(30)
    assert told.heard() == []
    assert output(told.chunks).stats.drafted == 0
    assert told.engine.metrics.guesses["d"].stale == 1


def draft(
    nodes: Iterable[tuple[Iterable[int], int]], session: str = "s", score: float = -0.1
) -> Draft:
    parents, tokens = zip(*((text_key(before), token) for before, token in nodes), strict=True)
    return Draft(
        session,
        0,
        "d",
        np.array(parents, np.uint64),
        np.array(tokens, np.int32),
        np.full(len(tokens), score, np.float32),
    )


def test_growth_of_sessions_that_are_over_is_counted() -> None:
    told = Told()
    told.hear(draft([(PROMPT, 1)]))
    assert told.engine.metrics.guesses["d"].stale == 1
