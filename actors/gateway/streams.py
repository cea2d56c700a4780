"""Several generations read as one, for as long as somebody listens; and what they become on the wire."""

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
    """The chunks of all requests as they come, each with its request's number. The first error of one ends all.

    Closing it closes all generations at once; they are closed when it is.
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
    """The result of `work`. It is cancelled, and has cleaned up, when this raises ClientDisconnected (nobody listens any more) or TimeoutError.

    To be called when the whole request was received; `until` is the event loop's time.
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
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancels them all and returns when all are over."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def sse(event: Mapping[str, Any]) -> bytes:
    """A server-sent event. JSON has no line breaks, so that one line of data is enough."""
    return b"data: " + to_json(event) + b"\n\n"


Pieces = AsyncGenerator[bytes, None]  # of an answer's body
MakePieces = Callable[[], Pieces]
