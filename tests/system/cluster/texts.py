"""Texts that a target writes while a test does something to it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from actors.rpc.client import GrpcTarget
from actors.rpc.common import CALLER_SILENCE_MS
from runtime.core.messages import Request
from runtime.core.sampling_params import SamplingParams

# A longer wait is a fault; starts took 225 s on two cores with a fivefold overload.
PATIENCE_S = 600.0


class Text:
    """Tokens as they come. Who waits for more of a text that has failed is told why."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.grown = asyncio.Event()
        self.reading: asyncio.Task[None] | None = None

    async def first(self, count: int) -> list[int]:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.tokens) < count:
                self.check()
                self.grown.clear()
                await self.grown.wait()
        return self.tokens[:count]

    def check(self) -> None:
        """Raises what reading it has failed with."""
        if self.reading is not None and self.reading.done():
            self.reading.result()

    async def more(self, count: int) -> list[int]:
        return await self.first(len(self.tokens) + count)


@asynccontextmanager
async def stream(address: str, name: str, speculation: bool = True) -> AsyncIterator[Text]:
    """A text that is written while the block runs."""
    client, text = (
        GrpcTarget(address, silence_ms=CALLER_SILENCE_MS),
        Text(),
    )  # nobody else can go on with it
    request = Request(
        name, (5, 6, 7), SamplingParams(max_tokens=16_000, ignore_eos=True), speculation
    )

    async def read() -> None:
        async for chunk in client.generate(request):
            assert chunk.finish_reason is None, "the text must outlast the test"
            text.tokens.extend(chunk.tokens)
            text.grown.set()
        raise AssertionError("the text ended without saying why")

    text.reading = asyncio.create_task(read())
    text.reading.add_done_callback(lambda _: text.grown.set())
    try:
        yield text
        text.check()
    finally:
        text.reading.cancel()
        await asyncio.gather(text.reading, return_exceptions=True)
        await client.close()
