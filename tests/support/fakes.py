"""Minimal implementations of interfaces. As a program, it serves a scripted drafter."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np

from actors.rpc.server import DraftingService, serve
from protos import drafting_codec
from protos.handshake import Hello
from runtime.core.messages import (
    Chunk,
    Commit,
    Draft,
    Event,
    Open,
    Reply,
    Request,
    Resync,
    Share,
    StandbyText,
)
from runtime.core.node_keys import child_key, text_key
from runtime.core.sampling_params import SamplingParams

DRAFTER = "scripted"
HELLO = Hello("0123abcd", "big", DRAFTER)  # the target's
HOST = "127.0.0.1"


class Feed:
    """Sends events as a target would: an async iterator that waits for more until it ends."""

    def __init__(self, *events: Event) -> None:
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        for event in events:
            self.put(event)

    def put(self, event: Event) -> None:
        self._queue.put_nowait(event)

    def end(self) -> None:
        self._queue.put_nowait(None)

    def __aiter__(self) -> "Feed":
        return self

    async def __anext__(self) -> Event:
        event = await self._queue.get()
        if event is None:
            raise StopAsyncIteration
        return event


def opening(session: str = "s", tokens: tuple[int, ...] = (5, 6, 7), epoch: int = 1) -> Open:
    return Open(session, epoch, tokens, 1, SamplingParams(), Share(session, 0, 1))


def chain(session: str, epoch: int, root: int, nodes: int = 4, drafter: str = DRAFTER) -> Draft:
    """A branch of tokens 0, 1, 2, ... below the text named `root`."""
    keys = [root]
    for token in range(nodes - 1):
        keys.append(child_key(keys[-1], token))
    scores = np.full(nodes, -0.5, np.float32)
    return Draft(
        session, epoch, drafter, np.array(keys, np.uint64), np.arange(nodes, dtype=np.int32), scores
    )


class ScriptedDrafter:
    """A DraftLink that answers each Open and each Commit at once, and remembers.

    open  sessions that it holds, by stream; empty when all streams are over
    seen  events, in order of arrival
    """

    def __init__(self) -> None:
        self.open: dict[int, set[str]] = {}
        self.seen: list[Event] = []

    async def speculate(self, events: AsyncIterator[Event]) -> AsyncIterator[Reply]:
        stream = len(self.seen)
        self.open[stream] = set()
        try:
            async for event in events:
                self.seen.append(event)
                reply = self.answer(self.open[stream], event)
                if reply is not None:
                    yield reply
        finally:
            del self.open[stream]

    def answer(self, sessions: set[str], event: Event) -> Reply | None:
        match event:
            case Open(session, epoch, tokens):
                sessions.add(session)
                return chain(session, epoch, text_key(tokens))
            case Commit(session, epoch, _, _, key):
                return (
                    chain(session, epoch, key) if session in sessions else Resync(session, DRAFTER)
                )
            case Share():
                return None
            case _:
                sessions.discard(event.session)
                return None


class ScriptedTarget:
    """Sends these pieces, then raises `fails` or hangs; `running` counts open calls.

    `told` are the updates of texts that others write.
    """

    def __init__(self, *chunks: Chunk, fails: Exception | None = None, hangs: bool = False) -> None:
        self.chunks, self.fails, self.hangs = chunks, fails, hangs
        self.asked: list[Request] = []
        self.told: list[Sequence[StandbyText]] = []
        self.running = 0

    async def standby(self, updates: AsyncIterator[Sequence[StandbyText]]) -> None:
        async for texts in updates:
            self.told.append(texts)

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        self.asked.append(request)
        self.running += 1
        try:
            for chunk in self.chunks:
                yield chunk
            if self.fails is not None:
                raise self.fails
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            self.running -= 1


@asynccontextmanager
async def raw_drafter(script: Callable[[Any], Awaitable[None]]) -> AsyncIterator[str]:
    """Yields the address of a server whose Speculate is `script(context)`, with raw bytes."""

    async def speculate(_: AsyncIterator[bytes], context: Any) -> None:
        await script(context)

    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    handler = grpc.stream_stream_rpc_method_handler(speculate)
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                drafting_codec.DRAFTING_SERVICE, {"Speculate": handler}
            )
        ]
    )
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(None)


async def main() -> None:
    server, port = await serve([DraftingService(ScriptedDrafter(), HELLO)], HOST)
    print(port, flush=True)  # noqa: T201 - read by the test that started this process
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
