"""Converts values to frames and back, at both ends of a drafter's stream.

Values that wait at the same time share a message. An invalid frame is counted and does not affect
the others.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from typing import TypeVar

from actors.rpc.common import printable
from runtime.core.errors import InvalidRequest

Item = TypeVar("Item")
OnDiscard = Callable[[str, str], None]  # the kind of what is discarded, and the reason

MAX_COALESCED = 64  # items read ahead while the wire is busy


async def coalesce(
    items: AsyncIterator[Item], most: int = MAX_COALESCED
) -> AsyncGenerator[list[Item], None]:
    """Yields all items in order, in lists of those that arrived while the last list was handled.

    A message costs both ends more than its contents. A list has at least one item and at most
    `most`. An error that `items` raises is raised here, after the items before it. A separate task
    reads `items`; it ends with this generator.
    """
    waiting: list[Item] = []
    news, room = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        async for item in items:
            while len(waiting) >= most:
                room.clear()
                await room.wait()
            waiting.append(item)
            news.set()

    reading = asyncio.create_task(read())
    reading.add_done_callback(lambda _: news.set())
    try:
        while waiting or not reading.done():
            await news.wait()
            news.clear()
            some = waiting.copy()
            waiting.clear()
            room.set()
            if some:
                yield some
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def encode_frames(
    values: Iterable[Item], encode: Callable[[Item], bytes], discard: OnDiscard
) -> list[bytes]:
    """Returns the frames of these values. Those that the wire cannot carry are `unsent`."""
    found = []
    for value in values:
        try:
            found.append(encode(value))
        except InvalidRequest as error:
            discard("unsent", str(error))
    return found


def decode_frames(
    data: bytes,
    unbundle: Callable[[bytes], Sequence[bytes]],
    decode: Callable[[bytes], Item | None],
    discard: OnDiscard,
) -> list[Item]:
    """Returns the values in a message, without those that are `malformed` or of an `unknown` kind.

    A discarded frame does not affect the others. An error that `discard` raises is raised here.
    """
    try:
        frames = unbundle(data)
    except InvalidRequest as error:
        discard("malformed", str(error))
        return []
    found = []
    for frame in frames:
        try:
            value = decode(frame)
        except InvalidRequest as error:
            discard("malformed", str(error))
            continue
        if value is None:
            discard("unknown", "a frame of an unknown kind")
        else:
            found.append(value)
    return found


def count_discarded(
    logger: logging.Logger, counters: Counter[str], who: str, what: str, why: str
) -> None:
    """Counts a discarded item.

    Only the first of each kind is logged as a warning, so that a peer cannot flood the log.
    """
    counters[what] += 1
    level = logging.WARNING if counters[what] == 1 else logging.DEBUG
    logger.log(level, "%s: %s: %s", who, what, printable(why))
