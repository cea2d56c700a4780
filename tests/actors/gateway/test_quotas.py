"""How many requests run at once, in all and of one key."""

import asyncio
from contextlib import ExitStack

import pytest

from actors.gateway.concurrency_limiter import DRAIN_RETRY_AFTER_S, ConcurrencyLimiter
from actors.openai.errors import RETRY_AFTER_S, ApiError
from runtime.config import LimitsConfig


def limiter(requests: int = 4, per_key: int = 2) -> ConcurrencyLimiter:
    return ConcurrencyLimiter(LimitsConfig(requests=requests, per_key=per_key))


def refusal(of: ConcurrencyLimiter, key: str | None) -> tuple[int, str, str, int | None] | None:
    """How a request of this key is refused; None if it is admitted, and ends again."""
    try:
        with of.admit(key):
            return None
    except ApiError as error:
        return error.status, error.code, str(error), error.retry_after


def test_a_key_has_its_quota_and_all_together_have_theirs() -> None:
    of = limiter()
    full = (503, "overloaded", "server at capacity: try again later", RETRY_AFTER_S)
    with of.admit("a"), of.admit("a") as second:
        assert of.sessions("a") == of.sessions() == 2
        assert refusal(of, "a") == (
            429,
            "rate_limit_exceeded",
            "this key may have 2 requests at once: wait for one to end",
            RETRY_AFTER_S,
        )
        with of.admit("b"), of.admit(None):
            assert (of.sessions("b"), of.sessions()) == (1, 4)
            assert refusal(of, "c") == refusal(of, None) == full
            of.release(second)
            assert refusal(of, "c") is None
            of.release(second)  # again, to no effect
            assert of.sessions() == 3
        assert refusal(of, "a") is None
    assert of.sessions() == 0


def test_without_a_key_only_the_limit_of_all_counts() -> None:
    of = limiter(requests=3, per_key=1)
    with ExitStack() as running:
        for _ in range(3):
            running.enter_context(of.admit(None))
        assert refusal(of, None) is not None
    assert refusal(of, None) is None


def test_a_request_of_n_choices_counts_n_times() -> None:
    of = limiter(requests=4, per_key=3)
    with of.admit("a") as entry:
        of.resize(entry, 3)
        assert of.sessions("a") == of.sessions() == 3
        assert (refusal(of, "a") or (0,))[0] == 429
        of.resize(entry, 2)  # that it has two of its own three already is no obstacle
        with of.admit("a") as other, of.admit("b"):
            for over in (entry, other):
                with pytest.raises(ApiError) as refused:
                    of.resize(over, over.sessions + 1)
                assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
            assert of.sessions() == 4
        with of.admit(None) as third, of.admit("b"):
            with pytest.raises(ApiError) as refused:
                of.resize(third, 2)
            assert (refused.value.status, refused.value.code) == (503, "overloaded")
            assert third.sessions == 1


@pytest.mark.parametrize(
    ("key", "requests", "per_key", "most", "name"),
    [
        ("a", 9, 3, 3, "per_key"),
        ("a", 3, 9, 3, "requests"),
        ("a", 3, 3, 3, "requests"),
        (None, 9, 3, 9, "requests"),
    ],
)
def test_choices_that_never_fit_are_refused_by_the_name_of_their_limit(
    key: str | None, requests: int, per_key: int, most: int, name: str
) -> None:
    of = limiter(requests, per_key)
    with of.admit(key) as entry:
        of.resize(entry, most)
        with pytest.raises(ApiError) as refused:
            of.resize(entry, most + 1)
        error = refused.value
        assert (error.status, error.code, error.param) == (400, "too_many_choices", "n")
        assert str(error).startswith(f"{most + 1} choices of all prompts are over limits.{name}")
        assert f"of this server, {most}:" in str(error)
        assert entry.sessions == most


def test_a_gateway_that_drains_admits_nobody_and_is_idle_once_the_last_has_ended() -> None:
    async def main() -> None:
        of = limiter()
        await of.wait_idle()  # at once
        with of.admit("a"):
            with of.admit("b"):
                of.draining = True
                status, code, _, retry_after = refusal(of, "a") or (0, "", "", None)
                assert (status, code, retry_after) == (503, "draining", DRAIN_RETRY_AFTER_S)
                idle = asyncio.create_task(of.wait_idle())
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not idle.done()
        await asyncio.wait_for(idle, 5)

    asyncio.run(main())


def test_a_request_that_fails_gives_its_place_back() -> None:
    of = limiter(requests=1)
    with pytest.raises(KeyError), of.admit("a"):
        raise KeyError
    assert of.sessions() == 0
