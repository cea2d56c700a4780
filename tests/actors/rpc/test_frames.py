"""Waiting messages are sent together, in order; an unsendable one is counted and harms no other."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from actors.rpc.common import closing
from actors.rpc.frames import coalesce, count_discarded, decode_frames, encode_frames
from runtime.core.errors import InvalidRequest
from tests.contracts.link_contract import soon


async def numbers(count_discarded: int, taken: list[int]) -> AsyncIterator[int]:
    for number in range(count_discarded):
        taken.append(number)
        yield number
        if number == 0:
            await asyncio.sleep(0)  # the first is fetched before there are more


def test_what_came_meanwhile_comes_coalesce() -> None:
    async def main() -> None:
        taken: list[int] = []
        async with closing(coalesce(numbers(5, taken))) as lists:
            assert await anext(lists) == [0]
            await soon(lambda: len(taken) == 5)
            assert [some async for some in lists] == [[1, 2, 3, 4]]

    asyncio.run(main())


def test_a_reader_that_is_slow_holds_up_the_source() -> None:
    async def main() -> None:
        taken: list[int] = []
        async with closing(coalesce(numbers(100, taken), most=3)) as lists:
            assert await anext(lists) == [0]
            await soon(lambda: len(taken) == 5)  # three wait, one is in hand
            for _ in range(10):
                await asyncio.sleep(0)
            assert len(taken) == 5
            found = [some async for some in lists]
        assert all(1 <= len(some) <= 3 for some in found)
        assert [number for some in found for number in some] == list(range(1, 100))

    asyncio.run(main())


def test_an_error_comes_after_what_came_before_it() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise ZeroDivisionError

    async def main() -> None:
        async with closing(coalesce(broken())) as lists:
            assert await anext(lists) == [1]
            with pytest.raises(ZeroDivisionError):
                await anext(lists)

    asyncio.run(main())


def test_nothing_is_nothing() -> None:
    async def main() -> None:
        assert [some async for some in coalesce(numbers(0, []))] == []

    asyncio.run(main())


def test_closing_ends_the_reading() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def main() -> None:
        async with closing(coalesce(endless())) as lists:
            assert await anext(lists) == [1]
        async with asyncio.timeout(30):
            await closed.wait()

    asyncio.run(main())


def test_what_cannot_be_sent_or_read_is_named_and_spoils_nothing_else() -> None:
    refused: list[tuple[str, str]] = []

    def through(value: bytes) -> bytes | None:
        if value == b"bad":
            raise InvalidRequest("bad is not allowed")
        return None if value == b"later" else value

    def refuse(what: str, why: str) -> None:
        refused.append((what, why))

    assert encode_frames([b"a", b"bad", b"c"], lambda value: through(value) or b"", refuse) == [
        b"a",
        b"c",
    ]
    assert decode_frames(b"a bad later c", bytes.split, through, refuse) == [b"a", b"c"]
    assert decode_frames(b"bad", lambda data: [through(data) or b""], through, refuse) == []
    assert [what for what, _ in refused] == ["unsent", "malformed", "unknown", "malformed"]
    assert refused[0][1] == refused[1][1] == "bad is not allowed"


def test_the_log_tells_the_first_of_each_kind_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    counters: Counter[str] = Counter()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            count_discarded(logging.getLogger("test"), counters, "a peer", "malformed", "one\nline")
    assert [record.getMessage() for record in caplog.records] == ["a peer: malformed: one line"]
    assert counters == {"malformed": 3}
