"""Which target the router gives a session to."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.fleet.fleet_state import TargetState
from actors.routing.router import Router, updated_router
from actors.routing.target_link import Load, least_loaded
from runtime.core.errors import InvalidRequest, Overloaded, Unavailable
from tests.support.router_harness import (
    ANSWER,
    ASKED,
    PLAIN,
    Scripted,
    all_of,
    heard,
    played,
    stage,
    there,
)


def test_sessions_are_spread_evenly() -> None:
    async def main() -> None:
        targets = [Scripted(ANSWER, cut=0, death="silent") for _ in range(3)]
        router, _ = stage(*targets)
        reading = [
            asyncio.ensure_future(all_of(router.generate(replace(ASKED, session=str(number)))))
            for number in range(12)
        ]
        await asyncio.sleep(1.0)
        assert [target.open for target in targets] == [4, 4, 4]
        router.update(
            [there("t0", sessions=4), there("t1", sessions=4 + 5), there("t2", sessions=4)]
        )  # five are another router's
        reading += [
            asyncio.ensure_future(all_of(router.generate(replace(ASKED, session=str(number)))))
            for number in range(12, 19)
        ]
        await asyncio.sleep(1.0)
        assert [target.open for target in targets] == [8, 4, 7]
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)

    played(main())


def test_a_router_counts_its_own_sessions_once() -> None:
    """A target reports them too: beside them only the rest is somebody else's."""

    async def main() -> None:
        targets = [Scripted(ANSWER, cut=0, death="silent") for _ in range(2)]
        router, named = stage(*targets)
        router.update(named[:1])
        reading = [
            asyncio.ensure_future(all_of(router.generate(replace(ASKED, session=str(number)))))
            for number in range(4)
        ]
        await asyncio.sleep(1.0)
        router.update([there("t0", sessions=4), there("t1", sessions=5)])
        reading.append(asyncio.ensure_future(all_of(router.generate(ASKED))))
        await asyncio.sleep(1.0)
        assert [target.open for target in targets] == [5, 0]
        router.update([there("t0", sessions=3), there("t1", sessions=5)])  # from before the last
        assert [link.others for link in router._links.values()] == [0, 5]
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)

    played(main())


def test_a_full_target_is_asked_once_though_it_seems_the_least_loaded() -> None:
    async def main() -> None:
        full, other = Scripted(ANSWER, refuses=Overloaded("full")), Scripted(ANSWER)
        router, _ = stage(full, other)
        router.update([there("t0"), there("t1", sessions=50)])
        assert heard(await all_of(router.generate(ASKED))) == PLAIN
        assert (len(full.asked), len(other.asked)) == (1, 1)

    played(main())


def test_a_new_session_whose_name_is_taken_is_refused_at_once() -> None:
    """The session of this name is somebody else's: it is not waited for."""

    async def main() -> None:
        taken = InvalidRequest("session 's' is running: give another name", "session")
        targets = [Scripted(ANSWER, refuses=taken), Scripted(ANSWER)]
        router, _ = stage(*targets)
        with pytest.raises(InvalidRequest, match="give another name"):
            await all_of(router.generate(ASKED))
        assert [len(target.asked) for target in targets] == [1, 0]
        assert asyncio.get_running_loop().time() == 0.0

    played(main())


def test_it_follows_whoever_knows_who_is_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first life is lost before anybody knows the second; sometimes nobody knows one at all.

    An error that nobody expects is logged, and does not end the watch.
    """
    monkeypatch.setattr("actors.routing.router.POLL_PERIOD_S", 0.001)
    first, second = Scripted(ANSWER, cut=5), Scripted(ANSWER)
    bodies = {"t/0": first, "t/1": second}
    said: list[TargetState | Exception] = [
        Unavailable("the controller does not answer"),
        there("t"),
        KeyError("a fault of ours"),
    ]

    def look() -> list[TargetState]:
        known = said.pop(0) if said else there("t", int(bool(first.asked)))
        if isinstance(known, Exception):
            raise known
        return [known]

    async def main() -> None:
        async with updated_router(Router(bodies.__getitem__), look) as router:
            assert heard(await all_of(router.generate(ASKED))) == PLAIN
        assert first.closed
        assert second.closed

    asyncio.run(main())
    assert "the targets cannot be updated: KeyError" in caplog.text


def test_the_choice() -> None:
    assert least_loaded({}) is None
    assert least_loaded({"a": Load(3), "b": Load(2)}) == "b"
    assert least_loaded({"a": Load(3, 4000), "b": Load(2, 1000)}) == "a", "fewer for its size"
    assert least_loaded({"a": Load(3, 4000), "b": Load(2)}) == "b", "perhaps as large"
    assert least_loaded({"a": Load(0, 1000), "b": Load(0, 4000, last_assigned=9)}) == "b", (
        "with one session more it has fewer for its size"
    )
    assert least_loaded({"a": Load(1, last_assigned=7), "b": Load(1, last_assigned=2)}) == "b", (
        "its turn"
    )
    assert least_loaded({"a": Load(9), "b": Load(0, suspect=True)}) == "a"
    assert least_loaded({"b": Load(0, suspect=True)}) == "b", "better than none"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 60))
def test_shares_are_those_of_the_capacities(sizes: list[int], sessions: int) -> None:
    held = [0] * len(sizes)
    for number in range(sessions):
        place = least_loaded(
            {key: Load(held[key], 1000 * size, last_assigned=0) for key, size in enumerate(sizes)}
        )
        assert place is not None
        held[place] += 1
        assert sum(held) == number + 1
    fair = [sessions * size / sum(sizes) for size in sizes]
    assert all(abs(have - share) < len(sizes) + 1 for have, share in zip(held, fair, strict=True))


def test_a_target_whose_certificates_do_not_fit_yet_is_called_once_they_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours, other, fits = Scripted(ANSWER), Scripted(ANSWER), False

    def connect(address: str) -> Scripted:
        if address == "t0/0" and not fits:
            raise InvalidRequest("gateway.pem expired", "tls")
        return ours if address == "t0/0" else other

    async def main() -> None:
        nonlocal fits
        router = Router(connect)
        named = [there("t0"), there("t1", sessions=50)]
        router.update(named)
        assert router.ready
        assert heard(await all_of(router.generate(ASKED))) == PLAIN
        assert [len(target.asked) for target in (ours, other)] == [0, 1]
        fits = True
        router.update(named)
        assert heard(await all_of(router.generate(ASKED))) == PLAIN
        assert [len(target.asked) for target in (ours, other)] == [1, 1]

    played(main())
    assert [record.getMessage() for record in caplog.records] == [
        "target t0 cannot be called: gateway.pem expired"
    ]
