"""A session on its way over targets: what the next one is asked, and what the client gets."""

import math
from dataclasses import replace

import pytest

from actors.routing.routed_session import MIN_DEADLINE_S, RoutedSession, reconstruct_stats
from runtime.core.errors import TargetDied, Unavailable
from runtime.core.messages import Chunk, Logprob, Request, Stats
from runtime.core.sampling_params import SamplingParams

LIFE = ("t", 0, "t/0")
REQUEST = Request("s", (1, 2, 3), SamplingParams(max_tokens=9), committed=(7,), epoch=4)
SCORED = replace(REQUEST, sampling=SamplingParams(max_tokens=9, prompt_logprobs=1))


def chunk(*tokens: int, drafters: tuple[str, ...] | None = None, **fields: object) -> Chunk:
    names = ("",) * len(tokens) if drafters is None else drafters
    made = Chunk(("x",) * len(tokens), tokens, names)
    return replace(made, **fields)  # type: ignore[arg-type]


def stats(completion: int, reused: int = 0) -> Stats:
    return Stats(
        3, completion, 1, 5, 4, 2, 1, (0, 0, 1), {"a": 2}, {"stale": 1}, 9.0, 0.5, reused, 0.1, 0.2
    )


def score(number: int) -> Logprob:
    return Logprob(-float(number))


def test_the_first_target_gets_the_request_as_it_is() -> None:
    session = RoutedSession(REQUEST, 10.0, math.inf)
    assert session.next_request(11.0) == REQUEST
    assert (session.begun, session.was_heard, session.calls) == (False, False, 1)


def test_each_further_target_gets_what_was_seen_and_an_epoch_of_its_own() -> None:
    session = RoutedSession(REQUEST, 10.0, math.inf)
    epochs = []
    for token in (8, 9, 6):
        request = session.next_request(11.0)
        epochs.append(request.epoch)
        assert request == replace(REQUEST, committed=tuple(session.output), epoch=request.epoch)
        assert not session.brought_tokens
        assert session.take(chunk(token), request.epoch, 12.0) == chunk(token)
        assert (session.brought_tokens, session.begun, session.was_heard) == (True, True, True)
        session.leave()
    assert epochs == [4, 5, 6]
    assert session.output == [7, 8, 9, 6]
    assert session.calls == 3


def test_a_target_gets_what_is_left_of_the_deadline_and_never_none() -> None:
    session = RoutedSession(replace(REQUEST, deadline=5.0), 10.0, 15.0)
    left = [session.next_request(now).deadline for now in (10.0, 14.0, 15.0, 99.0)]
    assert left == [5.0, 1.0, MIN_DEADLINE_S, MIN_DEADLINE_S]


def test_what_does_not_continue_the_output_is_a_loss_and_changes_nothing() -> None:
    session = RoutedSession(REQUEST, 0.0, math.inf)
    session.next_request(0.0)
    session.take(chunk(8), 4, 0.0)
    fenced = session.next_request(0.0)
    for epoch in (4, 6):
        with pytest.raises(Unavailable, match="its output does not continue the previous output"):
            session.take(chunk(9), epoch, 0.0)
    assert session.output == [7, 8]
    session.take(chunk(9, 9), fenced.epoch, 0.0)
    session.output.append(1)  # somebody else's
    with pytest.raises(Unavailable):
        session.take(chunk(9), fenced.epoch, 0.0)


def test_a_token_or_a_logprob_of_the_prompt_is_progress_and_nothing_else_is() -> None:
    session = RoutedSession(SCORED, 0.0, math.inf)

    def doubt() -> None:
        session.failed_targets.add(LIFE)
        session.died_with_it.add(LIFE)
        session.delays[LIFE] = 4.0
        session.waited = 7.0

    def doubted() -> bool:
        said = {
            bool(session.failed_targets),
            bool(session.died_with_it),
            bool(session.delays),
            session.waited == 7.0,
            not session.brought_tokens,
        }
        assert len(said) == 1
        return said.pop()

    session.next_request(0.0)
    doubt()
    session.take(chunk(), 4, 0.0)
    assert doubted()
    session.take(chunk(prompt_logprobs=(score(2),)), 4, 0.0)
    assert not doubted()
    assert session.waited == 0.0
    session.leave()
    session.next_request(0.0)
    doubt()
    assert session.take(chunk(prompt_logprobs=(score(2),)), 5, 0.0) == chunk()
    assert doubted(), "the client has it already"
    session.take(chunk(8), 5, 0.0)
    assert not doubted()


def test_logprobs_of_the_prompt_are_asked_for_until_the_client_has_them_all() -> None:
    session = RoutedSession(SCORED, 0.0, math.inf)
    seen: list[Logprob] = []
    assert session.next_request(0.0).sampling == SCORED.sampling
    seen += session.take(chunk(prompt_logprobs=(score(2),)), 4, 0.0).prompt_logprobs
    assert session.next_request(0.0).sampling == SCORED.sampling
    for number in (2, 3):
        seen += session.take(chunk(prompt_logprobs=(score(number),)), 5, 0.0).prompt_logprobs
    assert seen == [score(2), score(3)]
    assert session.next_request(0.0).sampling == replace(SCORED.sampling, prompt_logprobs=None)


def test_a_request_that_only_reads_its_prompt_asks_for_the_same_again() -> None:
    """Without tokens and without logprobs it would ask for nothing."""
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=1)
    request = replace(REQUEST, sampling=sampling, committed=())
    session = RoutedSession(request, 0.0, math.inf)
    session.next_request(0.0)
    session.take(chunk(prompt_logprobs=(score(2), score(3))), 4, 0.0)
    assert session.next_request(0.0).sampling == sampling


def test_a_session_that_one_target_finishes_keeps_its_figures() -> None:
    session = RoutedSession(REQUEST, 0.0, math.inf)
    session.next_request(0.0)
    last = chunk(8, finish_reason="stop", stats=stats(2))
    ended = session.over
    assert session.take(last, 4, 3.0) == last
    assert (ended, session.over) == (False, True)


def test_figures_of_all_targets_are_joined_reported_or_not() -> None:
    session = RoutedSession(REQUEST, 10.0, math.inf)
    session.next_request(10.0)
    session.take(chunk(8, 9, drafters=("a", "")), 4, 11.0)
    session.leave()  # without a report: one round, one accepted token
    session.next_request(11.0)
    session.leave()  # it was not heard: nothing is known of it
    assert len(session.stats) == 1
    session.next_request(11.0)
    with pytest.raises(TargetDied, match="it has ended the session"):
        session.take(chunk(5, finish_reason="cancelled", stats=stats(4)), 6, 12.0)
    assert session.output == [7, 8, 9]
    ended = session.over
    session.next_request(12.0)
    session.take(chunk(6), 7, 13.0)
    last = session.take(chunk(finish_reason="length", stats=stats(5, reused=99)), 7, 14.5)
    assert (ended, session.over) == (False, True)
    assert last.stats == Stats(
        3, 4, 3, 11, 9, 5, 2, (0, 1, 2), {"a": 5}, {"stale": 2}, 4.5, 1.0, 3, 0.2, 0.4
    )


def test_the_last_chunk_at_a_deadline_has_the_figures_so_far() -> None:
    session = RoutedSession(REQUEST, 10.0, 12.0)
    session.next_request(10.0)
    session.take(chunk(8, 9, drafters=("a", "")), 4, 11.0)
    last = session.deadline_chunk(12.5)
    assert session.over
    figures = Stats(3, 3, 1, 1, 1, 1, 0, (0, 1), {"a": 1}, {}, 2.5)
    assert last == Chunk((), (), (), "deadline", figures)


def test_what_a_lost_target_did_is_told_from_its_chunks() -> None:
    assert reconstruct_stats(7, []) == Stats(7, 0, 0, 0, 0, 0, 0, ())
    guessed = [("a", "a", "b", ""), (), ("",), ("b", ""), ("c", "a", "")]
    assert reconstruct_stats(7, guessed) == Stats(
        7, 10, 4, 6, 6, 6, 0, (0, 1, 1, 1), {"a": 3, "b": 2, "c": 1}
    )
