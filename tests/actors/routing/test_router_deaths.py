"""The router ends a session that may be what ends its targets, and no other one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.routing.router import MAX_DEATHS, MAX_FAILED_TARGETS
from runtime.core.errors import TargetsLost, Unavailable
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
