"""What both ends of a drafter's stream share: they turn values into frames and frames into values.

What waits together goes together. What has no effect is counted, and spoils nothing else.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from typing import TypeVar

from actors.rpc.common import printable
from runtime.core.errors import InvalidRequest

Item = TypeVar("Item")
OnDiscard = Callable[[str, str], None]  # what had no effect, and why

MAX_COALESCED = 64  # items that are taken from their source before the wire is ready for them


async def coalesce(
    items: AsyncIterator[Item], most: int = MAX_COALESCED
) -> AsyncGenerator[list[Item], None]:
    """All items in order, in lists of those that came while the list before was dealt with.

    A message costs both ends more than all that is in it. A list has at least one item and at most
    `most`. An error that `items` raises is raised here, after what came before it. A task of its own
    reads `items`; it is over when this generator is.
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
    """The frames of these values, without those that the wire cannot carry: they are `unsent`."""
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
    """The values in a message, without those that are `malformed` or of an `unknown` kind.

    One that is refused spoils no other. What `discard` raises is raised here.
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
    """Count something without effect. The log tells of the first of each kind: a peer cannot fill it."""
    counters[what] += 1
    level = logging.WARNING if counters[what] == 1 else logging.DEBUG
    logger.log(level, "%s: %s: %s", who, what, printable(why))
