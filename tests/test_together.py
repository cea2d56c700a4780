"""What waits for the wire goes together, in order, and no more is taken from its source than has room."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from actors.grpc_edge import closing
from actors.together import together
from tests.contracts import soon


async def numbers(count: int, taken: list[int]) -> AsyncIterator[int]:
    for number in range(count):
        taken.append(number)
        yield number
        if number == 0:
            await asyncio.sleep(0)  # the first is fetched before there are more


def test_what_came_meanwhile_comes_together() -> None:
    async def main() -> None:
        taken: list[int] = []
        async with closing(together(numbers(5, taken))) as lists:
            assert await anext(lists) == [0]
            await soon(lambda: len(taken) == 5)
            assert [some async for some in lists] == [[1, 2, 3, 4]]

    asyncio.run(main())


def test_a_reader_that_is_slow_holds_up_the_source() -> None:
    async def main() -> None:
        taken: list[int] = []
        async with closing(together(numbers(100, taken), most=3)) as lists:
            assert await anext(lists) == [0]
            await soon(lambda: len(taken) == 5)  # three wait, one is in hand
            for _ in range(10):
                await asyncio.sleep(0)
            assert len(taken) == 5
            found = [some async for some in lists]
        assert all(1 <= len(some) <= 4 for some in found)
        assert [number for some in found for number in some] == list(range(1, 100))

    asyncio.run(main())


def test_an_error_comes_after_what_came_before_it() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise ZeroDivisionError

    async def main() -> None:
        async with closing(together(broken())) as lists:
            assert await anext(lists) == [1]
            with pytest.raises(ZeroDivisionError):
                await anext(lists)

    asyncio.run(main())


def test_nothing_is_nothing() -> None:
    async def main() -> None:
        assert [some async for some in together(numbers(0, []))] == []

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
        async with closing(together(endless())) as lists:
            assert await anext(lists) == [1]
        async with asyncio.timeout(30):
            await closed.wait()

    asyncio.run(main())
