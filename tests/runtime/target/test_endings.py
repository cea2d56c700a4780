"""How sessions end, and that waits end with them."""

import queue
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from runtime.core.messages import Chunk, Event, Request, Resync, Round, Style
from runtime.core.sampler_reference import reference_sample
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.model import ModelDrafter
from runtime.models.base import PassInput
from runtime.models.toy import ToyCache, ToyModel
from runtime.schedulers.base import Plan, SessionView
from runtime.schedulers.fixed import Fixed
from runtime.target.commands import AddRequest, Cancel, Join, ReplyReceived, Stop
from runtime.target.engine import Engine
from runtime.target.verifier import Verifier
from tests.runtime.target.test_engine import PROMPT, TEXT, TOY, alone, draft, through
from tests.support.harness import (
    NOBODY,
    Known,
    Lockstep,
    Mute,
    asking,
    continued,
    engine_of,
    lettering,
    output,
    plain,
)


def test_cancelling_frees_the_session_here_and_at_the_drafter() -> None:
    drafter = ModelDrafter(TOY)
    draft_engine = DraftEngine(drafter, "d", 2)
    found, lockstep = through(
        asking(PROMPT),
        (3, lambda lockstep: lockstep.engine.handle(Cancel("s"))),
        draft_engines=(draft_engine,),
    )
    assert found.reason == "cancelled"
    assert found.said()[:2] == (
        "".join(chr(97 + token % 26) for token in found.tokens),
        tuple(TEXT[5 : 5 + len(found.tokens)]),
    )
    assert 0 < found.stats.completion_tokens < 24
    lockstep.round()
    assert (lockstep.engine.requests.running, draft_engine.states, drafter.kept) == ({}, {}, {})
    lockstep.engine.handle(Cancel("s"))


class Breaking(ToyModel):
    """Fails on texts that hold a certain token, at a certain length."""

    def logits(self, tokens: Any) -> Any:
        if tokens[0] == 23 and len(tokens) == 12:
            raise self.error
        return super().logits(tokens)

    error: Exception = RuntimeError("out of memory")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of memory"),
        ValueError("shape"),
        MemoryError("cache"),
        AssertionError("torch"),
        OSError("mapped file"),
    ],
)
def test_an_error_ends_its_session_and_no_other(error: Exception) -> None:
    model = Breaking(vocabulary=24, memory=3)
    model.error = error
    requests = [asking(PROMPT, "a"), asking((23, *PROMPT), "b"), asking(PROMPT, "c")]
    draft_engine = DraftEngine(Known(TEXT, 24), "d")
    found = Lockstep(engine_of(model), draft_engine).run(*requests)
    assert [one.reason for one in found] == ["length", "error", "length"]
    assert found[1].error == f"{type(error).__name__}: {error}"
    assert 0 < len(found[1].tokens) <= 6
    assert found[1].tokens == plain(TOY, asking((23, *PROMPT))).tokens[: len(found[1].tokens)]
    assert [one.said() for one in (found[0], found[2])] == [alone(asking(PROMPT))] * 2
    assert draft_engine.states == {}


class TornCache(ToyCache):
    """Cannot be rolled back."""

    def keep(self, prefix: int, slots: Sequence[int]) -> None:
        raise RuntimeError("out of memory")


class Torn(ToyModel):
    """Has one such cache, the first."""

    torn = False

    def new_cache(self) -> ToyCache:
        first, self.torn = not self.torn, True
        return TornCache(self.context + 512) if first else super().new_cache()


def test_what_a_failed_session_leaves_in_its_cache_is_read_by_nobody() -> None:
    """A wrong guess and the right one are in it, in no order. The next text begins in that way."""
    prompt = tuple(TEXT[:20])
    right = TEXT[20]
    engine = engine_of(Torn(vocabulary=24, memory=3))
    lockstep = Lockstep(engine)
    chunks = lockstep.admit(asking(prompt))
    engine.handle(Join("d", lambda event: None))
    engine.handle(ReplyReceived(draft([(prompt, (right + 1) % 24), (prompt, right)]), 0.0))
    lockstep.round()
    assert [chunk.finish_reason for chunk in chunks] == ["error"]
    request = asking(TEXT[:22], "next")
    (found,) = lockstep.run(request)
    assert found.said() == plain(TOY, request).said()
    assert found.stats.reused == len(prompt) - 1


class Spent(ToyModel):
    """Has no memory for its second cache."""

    caches = 0

    def new_cache(self) -> ToyCache:
        self.caches += 1
        if self.caches == 2:
            raise MemoryError("cache")
        return super().new_cache()


def test_an_error_while_a_session_begins_ends_it_and_no_other() -> None:
    lockstep = Lockstep(engine_of(Spent(vocabulary=24, memory=3)))
    found = lockstep.run(*(asking(PROMPT, name) for name in "abc"))
    assert [one.reason for one in found] == ["length", "error", "length"]
    assert (found[1].error, found[1].tokens) == ("MemoryError: cache", ())
    assert [one.said() for one in (found[0], found[2])] == [alone(asking(PROMPT))] * 2
    requests = lockstep.engine.requests
    assert requests.idle
    assert requests.admission.reserved == 0


def failing(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("a fault of ours")


@pytest.mark.parametrize("what", ["apply", "_send_features"])
def test_an_error_while_a_root_moves_ends_its_session_and_no_other(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lockstep = Lockstep(engine_of(TOY))
    chunks = [lockstep.admit(asking(PROMPT, name)) for name in "abc"]
    lockstep.round()
    committer, state = lockstep.engine.committer, lockstep.engine.requests.running["b"]
    if what == "apply":
        monkeypatch.setattr(state.session, "apply", failing)
    else:
        send = committer._send_features
        monkeypatch.setattr(
            committer,
            "_send_features",
            lambda item, *rest: failing() if item.state is state else send(item, *rest),
        )
    while lockstep.engine.requests.running:
        lockstep.round()
    found = [output(one) for one in chunks]
    assert [one.reason for one in found] == ["length", "error", "length"]
    assert found[1].tokens == tuple(TEXT[5:6])
    assert [one.said() for one in (found[0], found[2])] == [alone(asking(PROMPT))] * 2
    later = asking(TEXT[:20], "later")
    assert lockstep.run(later)[0].said() == plain(TOY, later).said()


def test_a_cache_that_cannot_be_kept_takes_no_answer_along(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(TOY)
    monkeypatch.setattr(engine.requests.prefixes, "keep", failing)
    found = Lockstep(engine).run(asking(PROMPT, "a"), asking(PROMPT, "b"))
    assert [one.said() for one in found] == [alone(asking(PROMPT))] * 2
    assert "is not kept: AssertionError" in caplog.text


def test_a_fault_at_the_end_of_all_leaves_no_caller_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks: list[list[Chunk]] = [[], [], []]
    engine = engine_of(TOY)
    monkeypatch.setattr(engine.heads, "close", failing)
    for name, into in zip("abc", chunks, strict=True):
        request = asking(PROMPT, name)
        engine.inbox.put(AddRequest(request, lettering()(request), into.append))
    engine.inbox.put(Stop())
    engine.run()
    assert [[chunk.finish_reason for chunk in into] for into in chunks] == [["cancelled"]] * 3


def test_an_error_while_reading_the_prompt() -> None:
    class Unreadable(ToyModel):
        def read(self, part: PassInput) -> Any:
            if len(part.rows.tokens) == 12:
                raise RuntimeError("out of memory")
            return super().read(part)

    (found,) = Lockstep(engine_of(Unreadable())).run(asking((23,) * 13))
    assert (found.reason, found.tokens, found.stats.rounds) == ("error", (), 0)


def test_stop_ends_what_is_under_way() -> None:
    chunks: list[Chunk] = []
    engine = engine_of(TOY)
    engine.inbox.put(AddRequest(asking(PROMPT, "a"), lettering()(asking(PROMPT)), chunks.append))
    engine.inbox.put(Stop())
    engine.run()
    assert engine.requests.running == {}
    assert [(chunk.finish_reason, chunk.tokens) for chunk in chunks] == [("cancelled", ())]


def test_a_fault_in_the_loop_leaves_no_caller_waiting() -> None:
    class Faulty(Fixed):
        def plan(self, views: Sequence[SessionView]) -> Plan:
            raise ZeroDivisionError

    chunks: list[Chunk] = []
    engine = Engine(TOY, Verifier(reference_sample, NOBODY), Faulty(8), lambda: 0.0)
    engine.inbox.put(AddRequest(asking(PROMPT), lettering()(asking(PROMPT)), chunks.append))
    with pytest.raises(ZeroDivisionError):
        engine.run()
    assert [chunk.finish_reason for chunk in chunks] == ["cancelled"]


def test_nobody_is_waited_for_at_the_last_token() -> None:
    """Fixed waits for a drafter that has sent nothing; this clock would let it wait forever."""
    engine = Engine(TOY, Verifier(reference_sample, NOBODY), Fixed(8, 1e9), lambda: 0.0)
    (found,) = Lockstep(engine, DraftEngine(Mute(), "d")).run(asking(PROMPT, max_tokens=1))
    assert found.tokens == tuple(TEXT[5:6])


class Waiting:
    """Waits as long as it is let. `asked` is fed at each question."""

    style = Style()
    gate = None

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue[Sequence[SessionView]] = queue.SimpleQueue()

    def plan(self, views: Sequence[SessionView]) -> Plan:
        self.asked.put(views)
        rows = tuple(len(view.gains) for view in views)
        return Plan(rows, 0.0 if all(rows) else 20.0)

    def observe(self, step: Sequence[Round]) -> None:
        pass

    def on_growth(self, delay: float, first: bool, leaves: int) -> None:
        pass


@pytest.fixture
def waiting() -> Iterable[tuple[Engine, Waiting]]:
    """An engine on its thread that waits whenever there is nothing to verify."""
    scheduler = Waiting()
    engine = Engine(TOY, Verifier(reference_sample, NOBODY), scheduler, lambda: 0.0)
    thread = threading.Thread(target=engine.run)
    thread.start()
    yield engine, scheduler
    engine.inbox.put(Stop())
    thread.join(20.0)
    assert not thread.is_alive()


def admitted(engine: Engine, request: Request) -> "queue.SimpleQueue[Chunk]":
    chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
    engine.inbox.put(AddRequest(request, lettering()(request), chunks.put))
    return chunks


def test_growth_ends_a_wait_at_once(waiting: tuple[Engine, Waiting]) -> None:
    engine, _ = waiting
    chunks = admitted(engine, asking(PROMPT, max_tokens=2))
    engine.inbox.put(ReplyReceived(draft([(PROMPT, TEXT[5])]), 0.0))
    assert chunks.get(timeout=20.0).tokens == tuple(TEXT[5:7])


def test_cancelling_ends_a_wait_at_once(waiting: tuple[Engine, Waiting]) -> None:
    engine, scheduler = waiting
    chunks = admitted(engine, asking(PROMPT))
    scheduler.asked.get(timeout=20.0)
    engine.inbox.put(Cancel("s"))
    assert chunks.get(timeout=20.0).finish_reason == "cancelled"
    assert engine.requests.running == {}


def test_another_session_of_the_same_name_is_another_session(
    waiting: tuple[Engine, Waiting],
) -> None:
    """A request is cancelled and restarted during a wait: nothing of the first one continues."""
    engine, scheduler = waiting
    first = admitted(engine, asking(PROMPT))
    scheduler.asked.get(timeout=20.0)
    engine.inbox.put(Cancel("s"))
    second = admitted(engine, asking(PROMPT[:2], max_tokens=2))
    assert first.get(timeout=20.0).finish_reason == "cancelled"
    text = continued(TOY, PROMPT[:2], 2)
    engine.inbox.put(ReplyReceived(draft([(PROMPT[:2], text[2])]), 0.0))
    assert second.get(timeout=20.0).tokens == tuple(text[2:])
    assert first.empty()
    assert engine.requests.running == {}


def test_stopping_ends_a_wait_at_once(waiting: tuple[Engine, Waiting]) -> None:
    engine, scheduler = waiting
    chunks = admitted(engine, asking(PROMPT))
    scheduler.asked.get(timeout=20.0)
    engine.inbox.put(Stop())
    while chunks.get(timeout=20.0).finish_reason is None:
        pass


def test_a_flood_does_not_keep_the_target_from_its_steps() -> None:
    """Whoever answers every message with another is heard once a round."""
    chunks: list[Chunk] = []
    engine = engine_of(TOY)

    def flood(event: Event) -> None:
        engine.inbox.put(ReplyReceived(Resync("s", "d"), 0.0))

    engine.handle(Join("d", flood))
    engine.handle(AddRequest(asking(PROMPT), lettering()(asking(PROMPT)), chunks.append))
    for _ in range(25):
        assert engine.receive(0.0)
        engine.step()
    assert output(chunks).said() == alone(asking(PROMPT))


def test_the_log_names_the_kind_of_a_fault_and_none_of_its_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Clients are told to see it there; its words may quote their text."""

    class Failing(ToyModel):
        def forward_all(self, parts: Sequence[PassInput]) -> Any:
            if parts[0].cache.length > len(PROMPT):
                raise ValueError("secret words") from TimeoutError("more of them")
            return super().forward_all(parts)

    model = Failing(TOY.vocabulary, memory=TOY.memory)
    with caplog.at_level("WARNING"):
        (found,) = Lockstep(engine_of(model, 4)).run(asking(PROMPT))
    assert found.reason == "error"
    assert "a session ends by ValueError from TimeoutError" in caplog.text
    assert "secret" not in "".join(record.getMessage() for record in caplog.records)
