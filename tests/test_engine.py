"""The target's loop by hand: what is decided, who is told, and what becomes of it when others misbehave."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import limits
from runtime.choice import Ask, choose
from runtime.drafters.base import Drafter
from runtime.drafters.model import ModelDrafter
from runtime.drafters.ngram import Ngram
from runtime.drafters.noisy import Noisy
from runtime.engine import Admit, Cancel, Engine, Join, Leave, Stop
from runtime.grower import Grower
from runtime.messages import Chunk, Close, Commit, Draft, Event, Open, Reply, Request, Resync, Round, Share
from runtime.models.toy import ToyModel
from runtime.sampling import Sampling
from runtime.schedulers.base import Plan, View
from runtime.schedulers.fixed import Fixed
from runtime.tree import text_key
from tests.rig import NOBODY, Known, Lockstep, Mute, Output, asking, continued, engine_of, lettering, output, plain

PROMPT = (3, 1, 4, 1, 5)
TOY = ToyModel(vocabulary=24, memory=3)
TEXT = continued(TOY, PROMPT, 100)


def perfect(name: str = "d", width: int = 1, branches: int = 1) -> Grower:
    return Grower(Known(TEXT, TOY.vocabulary, branches), name, width)


def alone(request: Request, eos: frozenset[int] = NOBODY) -> tuple[object, ...]:
    return plain(TOY, request, eos).said()


# Decoding


def test_without_drafters_it_is_plain_decoding() -> None:
    text = list(PROMPT)
    for _ in range(24):
        text.append(int(choose(TOY.logits(text)[None], Ask(Sampling(), 5, text, [[]], NOBODY))[0]))
    found = plain(TOY, asking(PROMPT))
    assert (*PROMPT, *found.tokens) == tuple(text)
    assert found.reason == "length"
    assert (found.stats.rounds, found.stats.verified, found.stats.drafted) == (24, 0, 0)
    assert (found.stats.prompt_tokens, found.stats.completion_tokens) == (5, 24)
    assert found.drafters == ("",) * 24


@pytest.mark.parametrize("prompt", [(7,), (7, 7), PROMPT * 20])
def test_prompts_of_any_length(prompt: tuple[int, ...]) -> None:
    request = asking(prompt, max_tokens=6)
    (drafted,) = Lockstep(engine_of(TOY), Grower(ModelDrafter(TOY), "d", 4)).run(request)
    assert drafted.said() == alone(request)
    assert drafted.tokens[0] == int(TOY.logits(prompt).argmax())


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8])
def test_a_perfect_chain_of_depth_d_saves_d_of_d_plus_one_steps(depth: int) -> None:
    (found,) = Lockstep(engine_of(TOY, rows=depth), perfect(), passes=depth).run(asking(PROMPT, max_tokens=8 * (depth + 1)))
    assert found.tokens == tuple(TEXT[5 : 5 + 8 * (depth + 1)])
    stats = found.stats
    assert (stats.rounds, stats.accepted, stats.verified, stats.drafted) == (8, 8 * depth, 8 * depth, 8 * depth)
    assert stats.histogram == (0,) * depth + (8,)
    assert stats.by_drafter == {"d": 8 * depth}
    assert found.drafters == (("d",) * depth + ("",)) * 8


def test_growth_beyond_what_is_verified_makes_hits_and_is_used_later() -> None:
    (found,) = Lockstep(engine_of(TOY, rows=2), perfect(), passes=20).run(asking(PROMPT, max_tokens=30))
    assert found.tokens == tuple(TEXT[5:35])
    assert (found.stats.rounds, found.stats.hits) == (10, 9)  # the last commit leaves nothing to hit
    assert found.stats.drafted == 29


def test_a_wrong_drafter_costs_rows_and_nothing_else() -> None:
    wrong = Grower(Noisy(Known(TEXT, TOY.vocabulary, 2), TOY.vocabulary, wrong=1.0), "w", 4)
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
    assert stats.waited > 0
    assert stats.bookkeeping == stats.rounds
    assert stats.elapsed > stats.computed + stats.waited + stats.bookkeeping + stats.prefill


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
        ({"max_tokens": 60, "stop": ("".join(chr(97 + token % 26) for token in TEXT[9:12]),)}, "stop"),
        ({"max_tokens": 60, "stop": (chr(97 + TEXT[12] % 26), "zzz"), "min_tokens": 3}, "stop"),
    ],
)
def test_the_end_is_where_it_is_without_drafters(sampling: dict[str, Any], reason: str | None, passes: int) -> None:
    request = asking(PROMPT, **sampling)
    drafter = ModelDrafter(TOY, branches=2)
    (found,) = Lockstep(engine_of(TOY, rows=16, eos=EOS), Grower(drafter, "d", 2), passes=passes).run(request)
    assert found.said() == alone(request, EOS)
    assert found.reason == reason or reason is None
    assert len(found.tokens) == found.stats.completion_tokens <= sampling["max_tokens"]
    assert found.stats.accepted == sum(name == "d" for name in found.drafters)
    assert found.stats.accepted > 0 or len(found.tokens) == 1
    assert drafter.kept == {}


# Several sessions, several drafters


def test_sessions_beside_each_other_are_as_alone() -> None:
    requests = [asking((*PROMPT, n), f"s{n}", speculation=n % 3 > 0, temperature=0.4 * (n % 2), seed=n) for n in range(9)]
    found = Lockstep(engine_of(TOY), Grower(ModelDrafter(TOY), "d", 4)).run(*requests)
    assert [one.said() for one in found] == [alone(request) for request in requests]
    assert [one.stats.accepted > 0 for one in found] == [n % 3 > 0 for n in range(9)]


def test_drafters_share_a_session() -> None:
    drafters: list[Drafter] = [ModelDrafter(TOY), Noisy(ModelDrafter(TOY), 24, 0.5), Ngram(), ModelDrafter(TOY), Mute()]
    growers = [Grower(drafter, f"d{n}", 3) for n, drafter in enumerate(drafters)]
    lockstep = Lockstep(engine_of(TOY), *growers)
    chunks = lockstep.admit(asking(PROMPT))
    lockstep.round()
    assert [next(iter(grower.growing.values())).share for grower in growers] == [Share("s", n, 5) for n in range(5)]
    while lockstep.engine.live:
        lockstep.round()
    found = output(chunks)
    assert found.said() == alone(asking(PROMPT))
    assert sum(found.stats.by_drafter.values()) == found.stats.accepted > 12
    assert found.stats.ignored["repeated"] > 0


def through(request: Request, *happenings: tuple[int, Callable[[Lockstep], None]], growers: Iterable[Grower] = ()) -> tuple[Output, Lockstep]:
    """A generation to which something happens after so many rounds."""
    lockstep = Lockstep(engine_of(TOY), *growers)
    chunks = lockstep.admit(request)
    due = dict(happenings)
    for number in itertools.count():
        if number in due:
            due.pop(number)(lockstep)
        if not lockstep.engine.live:
            break
        lockstep.round()
    assert not due
    for grower in lockstep.growers:
        grower.take_in(block=False)
    return output(chunks), lockstep


def test_a_drafter_joins_in_mid_stream() -> None:
    late = perfect()
    found, _ = through(asking(PROMPT), (6, lambda lockstep: lockstep.join(late)))
    assert found.said() == alone(asking(PROMPT))
    assert found.drafters[:6] == ("",) * 6
    assert found.stats.rounds == 6 + 6  # then 18 tokens, three a round
    assert late.growing == {}


def test_a_drafter_leaves_in_mid_stream_and_another_takes_its_share() -> None:
    first, second = perfect("a"), Grower(ModelDrafter(TOY), "b", 2)
    found, lockstep = through(asking(PROMPT), (3, lambda lockstep: lockstep.leave(first)), growers=(first, second))
    assert found.said() == alone(asking(PROMPT))
    assert list(lockstep.engine.drafters) == ["b"]
    assert found.stats.by_drafter["b"] > found.stats.by_drafter["a"] > 0


def test_the_last_drafter_leaves_in_mid_stream() -> None:
    only = perfect()
    found, _ = through(asking(PROMPT), (3, lambda lockstep: lockstep.leave(only)), growers=(only,))
    assert found.said() == alone(asking(PROMPT))
    assert 0 < found.stats.accepted < 10
    assert set(found.drafters[-10:]) == {""}


def test_who_left_late_does_not_take_along_who_has_joined_since() -> None:
    engine, heard = engine_of(TOY), []
    old: Callable[[Event], None] = lambda event: None  # noqa: E731
    engine.handle(Join("d", old))
    engine.handle(Join("d", heard.append))
    engine.handle(Leave("d", old))
    engine.handle(Admit(asking(PROMPT), lettering()(asking(PROMPT)), lambda chunk: None))
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
        self.engine.handle(Admit(request, lettering(self.engine.eos)(request), self.chunks.append))

    def advance(self, times: int = 1) -> None:
        for _ in range(times):
            for live in tuple(self.engine.live.values()):
                self.engine.advance(live)

    def heard(self) -> list[Event]:
        events = self.events[:]
        self.events.clear()
        return events


def test_the_events_of_a_generation() -> None:
    told = Told()
    request = asking(PROMPT, max_tokens=3)
    told.admit(request)
    told.advance(4)
    names = [text_key(TEXT[:n]) for n in range(9)]
    assert told.heard() == [
        Open("s", 0, PROMPT, 5, request.sampling, Share("s", 0, 1)),
        *(Commit("s", 0, n, (TEXT[n],), names[n + 1]) for n in (5, 6, 7)),
        Close("s"),
    ]


def test_who_joins_learns_the_text_and_the_others_their_new_share() -> None:
    told, events = Told(), []
    send: Callable[[Event], None] = events.append
    told.admit(asking(PROMPT))
    told.advance(3)
    told.heard()
    told.engine.handle(Join("e", send))
    assert told.heard() == [Share("s", 0, 2)]
    assert events == [Open("s", 0, tuple(TEXT[:7]), 5, asking(PROMPT).sampling, Share("s", 1, 2))]
    told.engine.handle(Leave("e", send))
    assert told.heard() == [Share("s", 0, 1)]


def test_a_resync_is_answered_with_the_text() -> None:
    told = Told()
    told.admit(asking(PROMPT))
    told.advance(4)
    told.heard()
    told.engine.handle(Resync("s", "d"))
    assert told.heard() == [Open("s", 0, tuple(TEXT[:8]), 5, asking(PROMPT).sampling, Share("s", 0, 1))]
    told.engine.handle(Resync("s", "stranger"))
    told.engine.handle(Resync("none", "d"))
    assert told.heard() == []


def test_a_session_without_speculation_is_nobodys_business() -> None:
    told = Told()
    told.admit(asking(PROMPT, speculation=False))
    told.advance(2)
    told.engine.handle(Resync("s", "d"))
    told.engine.handle(draft([(TEXT[:6], TEXT[6])]))
    told.engine.handle(Join("e", told.events.append))
    told.advance(30)
    assert told.heard() == []
    assert output(told.chunks).stats.drafted == 0
    assert told.engine.unknown == 1


def draft(nodes: Iterable[tuple[Iterable[int], int]], session: str = "s", score: float = -0.1) -> Draft:
    parents, tokens = zip(*((text_key(before), token) for before, token in nodes), strict=True)
    return Draft(session, 0, "d", np.array(parents, np.uint64), np.array(tokens, np.int32), np.full(len(tokens), score, np.float32))


def test_growth_of_sessions_that_are_over_is_counted() -> None:
    told = Told()
    told.engine.handle(draft([(PROMPT, 1)]))
    assert told.engine.unknown == 1


# Endings


def test_cancelling_frees_the_session_here_and_at_the_drafter() -> None:
    drafter = ModelDrafter(TOY)
    grower = Grower(drafter, "d", 2)
    found, lockstep = through(asking(PROMPT), (3, lambda lockstep: lockstep.engine.handle(Cancel("s"))), growers=(grower,))
    assert found.reason == "cancelled"
    assert found.said()[:2] == ("".join(chr(97 + token % 26) for token in found.tokens), tuple(TEXT[5 : 5 + len(found.tokens)]))
    assert 0 < found.stats.completion_tokens < 24
    lockstep.round()
    assert (lockstep.engine.live, grower.growing, drafter.kept) == ({}, {}, {})
    lockstep.engine.handle(Cancel("s"))


class Breaking(ToyModel):
    """Fails on texts that hold a certain token, at a certain length."""

    def logits(self, tokens: Any) -> Any:
        if tokens[0] == 23 and len(tokens) == 12:
            raise self.error
        return super().logits(tokens)

    error: Exception = RuntimeError("out of memory")


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("shape"), MemoryError("cache")])
def test_an_error_ends_its_session_and_no_other(error: Exception) -> None:
    model = Breaking(vocabulary=24, memory=3)
    model.error = error
    requests = [asking(PROMPT, "a"), asking((23, *PROMPT), "b"), asking(PROMPT, "c")]
    grower = Grower(Known(TEXT, 24), "d")
    found = Lockstep(engine_of(model), grower).run(*requests)
    assert [one.reason for one in found] == ["length", "error", "length"]
    assert found[1].error == f"{type(error).__name__}: {error}"
    assert 0 < len(found[1].tokens) <= 6
    assert found[1].tokens == plain(TOY, asking((23, *PROMPT))).tokens[: len(found[1].tokens)]
    assert [one.said() for one in (found[0], found[2])] == [alone(asking(PROMPT))] * 2
    assert grower.growing == {}


def test_an_error_while_reading_the_prompt() -> None:
    model = Breaking(vocabulary=24, memory=0)
    (found,) = Lockstep(engine_of(model)).run(asking((23,) * 13))
    assert (found.reason, found.tokens, found.stats.rounds) == ("error", (), 0)


def test_stop_ends_what_is_under_way() -> None:
    engine, chunks = engine_of(TOY), []
    engine.inbox.put(Admit(asking(PROMPT, "a"), lettering()(asking(PROMPT)), chunks.append))
    engine.inbox.put(Stop())
    engine.run()
    assert engine.live == {}
    assert [(chunk.finish_reason, chunk.tokens) for chunk in chunks] == [("cancelled", ())]


def test_a_fault_in_the_loop_leaves_no_caller_waiting() -> None:
    class Faulty(Fixed):
        def plan(self, view: View) -> Plan:
            raise ZeroDivisionError

    engine, chunks = Engine(TOY, choose, Faulty(8), NOBODY, lambda: 0.0), []
    engine.inbox.put(Admit(asking(PROMPT), lettering()(asking(PROMPT)), chunks.append))
    with pytest.raises(ZeroDivisionError):
        engine.run()
    assert [chunk.finish_reason for chunk in chunks] == ["cancelled"]


def test_nobody_is_waited_for_at_the_last_token() -> None:
    """Fixed waits where a drafter is there and has said nothing; the clock of the rig would let it wait for ever."""
    engine = Engine(TOY, choose, Fixed(8, 1e9), NOBODY, lambda: 0.0)
    (found,) = Lockstep(engine, Grower(Mute(), "d")).run(asking(PROMPT, max_tokens=1))
    assert found.tokens == tuple(TEXT[5:6])


class Waiting:
    """Waits as long as it is let. `asked` is fed at each question."""

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue[View] = queue.SimpleQueue()

    def plan(self, view: View) -> Plan:
        self.asked.put(view)
        return Plan(len(view.gains), 0.0 if view.gains else 20.0)

    def observe(self, done: Round) -> None:
        pass

    def grew(self, delay: float, hit: bool) -> None:
        pass


@pytest.fixture
def waiting() -> Iterable[tuple[Engine, Waiting]]:
    """An engine on its thread that waits whenever there is nothing to verify."""
    scheduler = Waiting()
    engine = Engine(TOY, choose, scheduler, NOBODY, lambda: 0.0)
    thread = threading.Thread(target=engine.run)
    thread.start()
    yield engine, scheduler
    engine.inbox.put(Stop())
    thread.join(20.0)
    assert not thread.is_alive()


def admitted(engine: Engine, request: Request) -> "queue.SimpleQueue[Chunk]":
    chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
    engine.inbox.put(Admit(request, lettering()(request), chunks.put))
    return chunks


def test_growth_ends_a_wait_at_once(waiting: tuple[Engine, Waiting]) -> None:
    engine, _ = waiting
    chunks = admitted(engine, asking(PROMPT, max_tokens=2))
    engine.inbox.put(draft([(PROMPT, TEXT[5])]))
    assert chunks.get(timeout=20.0).tokens == tuple(TEXT[5:7])


def test_cancelling_ends_a_wait_at_once(waiting: tuple[Engine, Waiting]) -> None:
    engine, scheduler = waiting
    chunks = admitted(engine, asking(PROMPT))
    scheduler.asked.get(timeout=20.0)
    engine.inbox.put(Cancel("s"))
    assert chunks.get(timeout=20.0).finish_reason == "cancelled"
    assert engine.live == {}


def test_another_session_of_the_same_name_is_another_session(waiting: tuple[Engine, Waiting]) -> None:
    """Cancelled and begun anew while the engine waits for growth: what was left of the first one does not go on."""
    engine, scheduler = waiting
    first = admitted(engine, asking(PROMPT))
    scheduler.asked.get(timeout=20.0)
    engine.inbox.put(Cancel("s"))
    second = admitted(engine, asking(PROMPT[:2], max_tokens=2))
    assert first.get(timeout=20.0).finish_reason == "cancelled"
    text = continued(TOY, PROMPT[:2], 2)
    engine.inbox.put(draft([(PROMPT[:2], text[2])]))
    assert second.get(timeout=20.0).tokens == tuple(text[2:])
    assert first.empty()
    assert engine.live == {}


def test_stopping_ends_a_wait_at_once(waiting: tuple[Engine, Waiting]) -> None:
    engine, scheduler = waiting
    chunks = admitted(engine, asking(PROMPT))
    scheduler.asked.get(timeout=20.0)
    engine.inbox.put(Stop())
    while chunks.get(timeout=20.0).finish_reason is None:
        pass


def test_a_flood_does_not_keep_the_target_from_its_steps() -> None:
    """Whoever answers every message with another is heard once a round."""
    engine, chunks = engine_of(TOY), []

    def flood(event: Event) -> None:
        engine.inbox.put(Resync("s", "d"))

    engine.handle(Join("d", flood))
    engine.handle(Admit(asking(PROMPT), lettering()(asking(PROMPT)), chunks.append))
    for _ in range(25):
        assert engine.take_in(block=False)
        for live in tuple(engine.live.values()):
            engine.advance(live)
    assert output(chunks).said() == alone(asking(PROMPT))


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
        fate = self.random.choice(["lose", "repeat", "hold", "forge", "forge"]) if self.random.random() < self.worst else "deliver"
        self.fates.add(fate)
        passed: list[Any] = {"lose": [], "repeat": [message, message], "hold": []}.get(fate, [message])
        if fate == "hold":
            self.held.append((inbound, message))
        if fate == "forge":
            passed.insert(self.random.randint(0, 1), self.forged_reply() if inbound else self.forged_event())
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
            np.array([self.random.choice([0, 5, 23, 24, -1, 2**31 - 1]) for _ in range(n)], np.int32),
            np.array([self.random.choice([0.0, -0.1, -99.0, 1.0, float("nan"), -float("inf"), float("inf")]) for _ in range(n)], np.float32),
        )

    def forged_event(self) -> Event:
        session = self.random.choice(["s", "s", "s", "ghost"])
        tokens = tuple(self.random.randrange(24) for _ in range(self.random.choice([0, 1, 3])))
        share = Share(session, self.random.choice([0, 1, 9]), self.random.choice([0, 1, 2]))
        return self.random.choice(
            [
                Commit(session, self.random.choice([0, 1]), self.random.choice([0, 5, 6, 20, 10**9]), tokens, self.random.choice(self.keys)),
                Open(session, 0, (*PROMPT, *tokens), 5, Sampling(max_tokens=24), share),
                Open(session, 0, (), 0, Sampling(), share),
                share,
                Close(session),
            ]
        )


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@given(seed=st.integers(0, 10**9))
@settings(max_examples=60)
def test_the_network_changes_nothing_but_speed(temperature: float, seed: int) -> None:
    adversary = Adversary(seed)
    drafters: list[Drafter] = [ModelDrafter(TOY, branches=2), Noisy(ModelDrafter(TOY), TOY.vocabulary, 0.3)]
    growers = [Grower(drafter, f"d{n}", 3) for n, drafter in enumerate(drafters)]
    request = asking(PROMPT, temperature=temperature, seed=seed, max_tokens=20)
    (found,) = Lockstep(engine_of(TOY), *growers, tamper=adversary).run(request)
    assert found.said() == alone(request)
    assert found.stats.rounds <= 20


def test_the_adversary_does_all_it_can_and_some_drafts_get_through() -> None:
    fates: set[str] = set()
    accepted, ignored = 0, set()
    for seed in range(60):
        adversary = Adversary(seed)
        (found,) = Lockstep(engine_of(TOY), Grower(ModelDrafter(TOY), "d", 3), tamper=adversary).run(asking(PROMPT))
        fates |= adversary.fates
        ignored |= set(found.stats.ignored)
        accepted += found.stats.accepted
    assert fates == {"deliver", "lose", "repeat", "hold", "forge"}
    assert ignored == {"stale", "repeated", "invalid", "oversize"}
    assert accepted > 200


def test_a_lost_commit_costs_a_question_and_then_all_is_well() -> None:
    """Everything towards the drafter is lost for five rounds."""
    sent = itertools.count()

    def lossy(message: Event | Reply) -> list[Event | Reply]:
        return [] if isinstance(message, Commit) and next(sent) in range(1, 6) else [message]

    grower = perfect()
    lockstep = Lockstep(engine_of(TOY, rows=4), grower, passes=4, tamper=lossy)
    (found,) = lockstep.run(asking(PROMPT, max_tokens=60))
    assert found.tokens == tuple(TEXT[5:65])
    assert grower.counters["resync"] >= 1
    assert found.stats.rounds <= 12 + 8


def test_what_was_decided_before_is_gone_on_from() -> None:
    whole = asking(PROMPT, temperature=0.9, seed=5, presence_penalty=0.5, repetition_penalty=1.3, min_tokens=20)
    expected = plain(TOY, whole, EOS)
    for cut in (1, 7, 20):
        request = replace(whole, committed=expected.tokens[:cut])
        finish = lettering(EOS)(request)
        before = "".join(finish.feed(token).text for token in request.committed)
        engine, chunks = engine_of(TOY, eos=EOS), []
        lockstep = Lockstep(engine, Grower(ModelDrafter(TOY), "d", 2))
        engine.handle(Admit(request, finish, chunks.append))
        while engine.live:
            lockstep.round()
        found = output(chunks)
        assert (before + found.text, (*request.committed, *found.tokens)) == (expected.text, expected.tokens)
        assert (found.reason, found.stats.completion_tokens) == (expected.reason, expected.stats.completion_tokens)
