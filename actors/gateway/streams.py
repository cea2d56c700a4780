"""Merges concurrent generations, cancels them when the client disconnects, and encodes events."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from actors.openai.json_body import ClientDisconnected, Receive
from runtime.core.messages import Chunk, Request

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"


class GenerationBackend(Protocol):
    """A target, or a router over several."""

    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]: ...


async def merge_chunks(
    backend: GenerationBackend, requests: Sequence[Request]
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Yields the chunks of all requests as they arrive, each with its request's index.

    The first error ends all. Closing the iterator closes all generations before it returns.
    """
    arrived: asyncio.Queue[tuple[int, Chunk] | asyncio.Task[None]] = asyncio.Queue()

    async def read(index: int, request: Request) -> None:
        async with aclosing(backend.generate(request)) as chunks:
            async for chunk in chunks:
                arrived.put_nowait((index, chunk))

    reading = [asyncio.create_task(read(index, request)) for index, request in enumerate(requests)]
    for task in reading:
        task.add_done_callback(arrived.put_nowait)
    left = len(reading)
    try:
        while left:
            found = await arrived.get()
            if isinstance(found, tuple):
                yield found
            else:
                left -= 1
                found.result()
    finally:
        await cancel_all(reading)


async def run_until_disconnect(
    receive: Receive, work: Coroutine[Any, Any, Result], until: float
) -> Result:
    """Returns the result of `work`.

    Cancels the work, waits until it has cleaned up, and raises ClientDisconnected or, at the event
    loop's time `until`, TimeoutError. Call it after the whole request was received.
    """
    tasks: list[asyncio.Task[Any]] = [
        asyncio.create_task(work),
        asyncio.create_task(wait_disconnect(receive)),
    ]
    try:
        async with asyncio.timeout_at(until):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnected
        result: Result = tasks[0].result()
        return result
    finally:
        await cancel_all(tasks)


async def wait_disconnect(receive: Receive) -> None:
    """Returns once the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancels the tasks and returns once all have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def sse(event: Mapping[str, Any]) -> bytes:
    """Returns a server-sent event. JSON contains no line breaks, so one data line is enough."""
    return b"data: " + to_json(event) + b"\n\n"


Pieces = AsyncGenerator[bytes, None]  # of a response body
MakePieces = Callable[[], Pieces]
