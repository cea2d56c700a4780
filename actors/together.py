"""What waits for the wire is sent as one message: a message costs both sides more than all that is in it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

Item = TypeVar("Item")

MOST = 64  # items that are taken from their source before the wire is ready for them


async def together(items: AsyncIterator[Item], most: int = MOST) -> AsyncGenerator[list[Item], None]:
    """All items in order, in lists of those that have come while the one before was dealt with: at least one, at most `most`.

    An error that `items` raises is raised here, after what came before it. `items` is read by a task of its own, which is over when
    this generator is.
    """
    waiting: asyncio.Queue[Item | None] = asyncio.Queue()  # None: no more will come
    room = asyncio.Semaphore(most)

    async def read() -> None:
        try:
            async for item in items:
                await room.acquire()
                waiting.put_nowait(item)
        finally:
            waiting.put_nowait(None)

    reading = asyncio.create_task(read())
    try:
        last = False
        while not last:
            taken = [await waiting.get()]
            while not waiting.empty():
                taken.append(waiting.get_nowait())
            last = taken[-1] is None
            found = [item for item in taken if item is not None]
            for _ in found:
                room.release()
            if found:
                yield found
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
