"""Speaks the drafting protocol frame by frame."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from actors.rpc.client import GrpcLink
from actors.rpc.common import closing
from actors.rpc.server import DraftingService, serve
from protos import drafting_codec
from protos import speculation_pb2 as pb
from runtime.core.errors import LinkLost
from runtime.core.links import DraftLink
from runtime.core.messages import Event
from runtime.core.node_keys import text_key
from tests.contracts.link_contract import (
    PATIENCE_S,
)
from tests.support.fakes import (
    HELLO,
    HOST,
    Feed,
    chain,
)

GOOD = drafting_codec.encode_reply(chain("s", 1, text_key((5, 6, 7))))
BAD: bytes = pb.FromDrafter(
    draft=pb.Draft(session="s", parents=bytes(8), tokens=bytes(4), scores=b"\x00\x00\xc0\x7f")
).SerializeToString()
LATER = b"\xfa\x01\x03abc"  # a frame of a kind this version does not know
GARBAGE = b"\xff" * 20


async def drain(link: DraftLink, events: AsyncIterator[Event]) -> None:
    async with asyncio.timeout(PATIENCE_S), closing(link.speculate(events)) as replies:
        async for _ in replies:
            pass


@asynccontextmanager
async def called(service: DraftingService) -> AsyncIterator[Any]:
    """Serves the service and opens a raw call; both end with the block."""
    server, port = await serve([service], HOST)
    async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
        call = channel.stream_stream(f"/{drafting_codec.DRAFTING_SERVICE}/Speculate")()
        yield call
        call.cancel()
    await server.stop(None)


async def lost(link: GrpcLink, *events: Event) -> str:
    """Returns the message of the LinkLost that ends the link."""
    with pytest.raises(LinkLost) as caught:
        await drain(link, Feed(*events))
    return str(caught.value)


async def greeted(context: Any, *frames: bytes) -> None:
    """Is a raw drafter: sends hello and these frames, then waits until the target leaves."""
    await context.read()
    await context.write(drafting_codec.encode_hello_from_drafter(HELLO))
    for frame in frames:
        await context.write(frame)
    while await context.read() is not grpc.aio.EOF:
        pass
