"""The router ends a session that may be what ends its targets, and no other one."""

from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.routing.router import MAX_DEATHS, MAX_FAILED_TARGETS
from runtime.core.errors import TargetDied, TargetsLost, Unavailable
from runtime.core.messages import Chunk, Logprob, Request
from tests.support.router_harness import (
    ANSWER,
    ASKED,
    DEATHS,
    PLAIN,
    Death,
    Scripted,
    all_of,
    heard,
    played,
    stage,
)


@pytest.mark.parametrize("death", ["killed", "cancelled", "ended"])
@pytest.mark.parametrize("cut", [0, 5])
def test_a_session_that_seems_to_end_its_targets_is_given_to_no_third(
    death: Death, cut: int
) -> None:
    """A target that has brought tokens is no witness against the session: it takes two more."""

    async def main() -> None:
        lives = [Scripted(ANSWER, cut=cut, death=death) for _ in range(5)]
        router, _ = stage(*lives)
        said: list[int] = []

        async def listen() -> None:
            async for chunk in router.generate(ASKED):
                said.extend(chunk.tokens)

        with pytest.raises(
            TargetsLost, match=f"{MAX_DEATHS} targets died while they held this request"
        ):
            await listen()
        asked = [life for life in lives if life.asked]
        assert len(asked) == MAX_DEATHS + (cut > 0)
        assert tuple(said) == PLAIN.tokens[:cut]

    played(main())


@given(st.lists(st.sampled_from(DEATHS[:1] + DEATHS[2:]), max_size=12))
def test_a_session_that_makes_progress_outlives_any_number_of_targets(deaths: list[Death]) -> None:
    async def main() -> None:
        lives = [
            Scripted(ANSWER, cut=number + 1, death=death) for number, death in enumerate(deaths)
        ]
        router, _ = stage(*lives, Scripted(ANSWER))
        assert heard(await all_of(router.generate(ASKED))) == PLAIN

    played(main())


def test_targets_out_of_reach_are_no_witnesses_against_a_session() -> None:
    async def main() -> None:
        away = [
            Scripted(ANSWER, refuses=Unavailable("connection refused"))
            for _ in range(MAX_FAILED_TARGETS - 1)
        ]
        router, _ = stage(*away, Scripted(ANSWER))
        assert heard(await all_of(router.generate(ASKED))) == PLAIN

    played(main())


def test_a_session_that_reaches_no_target_is_given_up() -> None:
    async def main() -> None:
        lives = [
            Scripted(ANSWER, refuses=Unavailable("connection refused"))
            for _ in range(MAX_FAILED_TARGETS + 3)
        ]
        router, _ = stage(*lives)
        with pytest.raises(Unavailable, match=f"{MAX_FAILED_TARGETS} targets were lost"):
            await all_of(router.generate(ASKED))
        assert sum(len(life.asked) for life in lives) == MAX_FAILED_TARGETS
        assert sum(router.lost.values()) == MAX_FAILED_TARGETS

    played(main())


def of_prompt(token: int) -> Logprob:
    return Logprob(-token / 9, ((token, -token / 9),))


PROMPT_LOGPROBS = tuple(map(of_prompt, ASKED.prompt[1:]))


class Reader(Scripted):
    """Scores the prompt in chunks of two before it answers; dies after `scores` of these chunks."""

    scores: int | None = None

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        if request.sampling.prompt_logprobs is not None:
            for number, start in enumerate(range(0, len(PROMPT_LOGPROBS), 2)):
                if number == self.scores:
                    self.asked.append(request)
                    self.refuses = Unavailable("connection refused")
                    raise TargetDied("connection reset")
                yield Chunk((), (), (), prompt_logprobs=PROMPT_LOGPROBS[start : start + 2])
        async for chunk in super().generate(request):
            yield chunk


@pytest.mark.parametrize("scores", [[0], [1], [2, 0], [1, 1, 2], [2, 1, 3], [0, 99]])
def test_each_logprob_of_a_prompt_comes_once_whatever_targets_die(scores: list[int]) -> None:
    async def main() -> None:
        lives = [Reader(ANSWER, cut=3) for _ in scores]
        for life, count in zip(lives, scores, strict=True):
            life.scores = count
        last = Reader(ANSWER)
        router, _ = stage(*lives, last)
        asked = replace(ASKED, sampling=replace(ASKED.sampling, prompt_logprobs=1))
        chunks = await all_of(router.generate(asked))
        found = [logprob for chunk in chunks for logprob in chunk.prompt_logprobs]
        assert tuple(found) == PROMPT_LOGPROBS
        assert heard(chunk for chunk in chunks if chunk.tokens) == PLAIN
        assert last.asked[0].sampling.prompt_logprobs == (None if 99 in scores else 1)

    assert len(PROMPT_LOGPROBS) > 4
    played(main())


def test_targets_that_die_while_they_read_a_prompt_again_are_witnesses() -> None:
    """What was delivered before is no progress."""

    async def main() -> None:
        lives = [Reader(ANSWER) for _ in range(6)]
        for life in lives:
            life.scores = 2
        router, _ = stage(*lives)
        asked = replace(ASKED, sampling=replace(ASKED.sampling, prompt_logprobs=1))
        with pytest.raises(TargetsLost):
            await all_of(router.generate(asked))
        assert sum(bool(life.asked) for life in lives) == MAX_DEATHS + 1

    played(main())
