"""Both ends of a link survive messages that cannot be sent or make no sense."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest

from actors.rpc.client import GrpcLink
from actors.rpc.common import closing
from actors.rpc.server import DraftingService, serve
from protos import bundle, drafting_codec
from protos import speculation_pb2 as pb
from runtime.core import limits
from runtime.core.errors import Overloaded
from runtime.core.links import DraftLink
from runtime.core.messages import Draft, Event, Open, Reply
from runtime.core.sampling_params import SamplingParams
from tests.contracts.link_contract import (
    PATIENCE_S,
    draft_for,
    over_grpc,
    soon,
)
from tests.support.fakes import (
    HELLO,
    HOST,
    Feed,
    ScriptedDrafter,
    chain,
    opening,
)
from tests.support.raw_links import GARBAGE, LATER, called, drain, lost


class EndsItself(ScriptedDrafter):
    async def speculate(self, events: AsyncIterator[Event]) -> AsyncIterator[Reply]:
        async for _ in events:
            return
        yield chain("s", 1, 0)


class Full(ScriptedDrafter):
    async def speculate(self, events: AsyncIterator[Event]) -> AsyncIterator[Reply]:
        async for _ in events:
            raise Overloaded("256 sessions are open: try later")
        yield chain("s", 1, 0)


@pytest.mark.parametrize(
    ("body", "says"),
    [(EndsItself(), "it said goodbye"), (Full(), "RESOURCE_EXHAUSTED: 256 sessions")],
)
def test_a_drafter_that_stops_says_why(body: DraftLink, says: str) -> None:
    async def main() -> None:
        async with over_grpc(body) as link:
            assert isinstance(link, GrpcLink)
            assert says in await lost(link, opening())

    asyncio.run(main())


class Verbose(ScriptedDrafter):
    """Sends what no frame may hold before each answer."""

    async def speculate(self, events: AsyncIterator[Event]) -> AsyncIterator[Reply]:
        async for reply in super().speculate(events):
            yield chain("s", 1, 0, nodes=limits.MESSAGE_BYTES // 16 + 1)
            yield reply


def test_replies_that_the_wire_cannot_carry_are_kept_back() -> None:
    async def main() -> None:
        service = DraftingService(Verbose(), HELLO)
        server, port = await serve([service], HOST)
        async with closing(GrpcLink(f"{HOST}:{port}", HELLO).speculate(Feed(opening()))) as replies:
            assert len((await draft_for(replies, "s")).tokens) == 4
        await server.stop(None)
        assert service.counters == {"unsent": 1}

    asyncio.run(main())


def test_events_that_the_wire_cannot_carry_cost_only_their_session() -> None:
    async def main() -> None:
        body = ScriptedDrafter()
        huge = Open(
            "huge", 1, (10**6,) * limits.MESSAGE_BYTES, 1, SamplingParams(), opening("huge").share
        )
        alien = opening("alien\udcff")
        async with (
            over_grpc(body) as link,
            closing(link.speculate(Feed(huge, alien, opening()))) as replies,
        ):
            await draft_for(replies, "s")
            assert isinstance(link, GrpcLink)
            assert link.counters == {"unsent": 2}
        assert body.seen == [opening()]

    asyncio.run(main())


def test_what_comes_at_once_crosses_in_order_whatever_is_wrong_with_one() -> None:
    async def main() -> None:
        body = ScriptedDrafter()
        service = DraftingService(body, HELLO)
        async with called(service) as call:
            await call.write(drafting_codec.encode_hello_to_drafter(HELLO))
            frames = [
                drafting_codec.encode_event(opening("a")),
                GARBAGE,
                LATER,
                drafting_codec.encode_event(opening("b")),
            ]
            (together,) = bundle.bundle_events(frames)
            await call.write(together)
            await soon(lambda: len(body.seen) == 2)
        assert body.seen == [opening("a"), opening("b")]
        assert service.counters == {"malformed": 1, "unknown": 1}

    asyncio.run(main())


def test_an_error_of_the_events_is_raised_as_it_is() -> None:
    async def broken() -> AsyncIterator[Event]:
        yield opening()
        raise ZeroDivisionError

    async def main() -> None:
        body = ScriptedDrafter()
        async with over_grpc(body) as link:
            with pytest.raises(ZeroDivisionError):
                await drain(link, broken())
            await soon(lambda: not body.open)

    asyncio.run(main())


def test_events_without_sense_change_nothing_and_are_counted() -> None:
    async def main() -> None:
        body = ScriptedDrafter()
        service = DraftingService(body, HELLO)
        async with called(service) as call:
            hello = drafting_codec.encode_hello_to_drafter(HELLO)
            negative: bytes = pb.ToDrafter(
                commit=pb.Commit(session="s", tokens=[-1])
            ).SerializeToString()
            for frame in (
                hello,
                GARBAGE,
                LATER,
                hello,
                negative,
                drafting_codec.encode_event(opening()),
            ):
                await call.write(frame)
            assert drafting_codec.decode_hello_from_drafter(await call.read()) == HELLO
            assert isinstance(drafting_codec.decode_reply(await call.read()), Draft)
        assert body.seen == [opening()]
        assert service.counters == {"malformed": 3, "unknown": 1}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("frame", "code", "says"),
    [
        (drafting_codec.encode_event(opening()), grpc.StatusCode.INVALID_ARGUMENT, "not hello"),
        (GARBAGE, grpc.StatusCode.INVALID_ARGUMENT, "not a valid frame"),
        (bytes(limits.MESSAGE_BYTES + 1), grpc.StatusCode.RESOURCE_EXHAUSTED, ""),
        (
            drafting_codec.encode_hello_to_drafter(replace(HELLO, protocol=9)),
            grpc.StatusCode.FAILED_PRECONDITION,
            "protocol 9",
        ),
    ],
)
def test_a_client_that_does_not_keep_to_the_handshake_is_told(
    frame: bytes, code: grpc.StatusCode, says: str
) -> None:
    async def main() -> None:
        server, port = await serve([DraftingService(ScriptedDrafter(), HELLO)], HOST)
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            call = channel.stream_stream(f"/{drafting_codec.DRAFTING_SERVICE}/Speculate")()
            await call.write(frame)
            async with asyncio.timeout(PATIENCE_S):
                assert await call.code() == code
                assert says in await call.details()
        await server.stop(None)

    asyncio.run(main())


def test_a_client_that_says_nothing_is_told() -> None:
    async def main() -> None:
        server, port = await serve(
            [DraftingService(ScriptedDrafter(), HELLO, handshake_s=0.2)], HOST
        )
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            call = channel.stream_stream(f"/{drafting_codec.DRAFTING_SERVICE}/Speculate")()
            async with asyncio.timeout(PATIENCE_S):
                assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert await call.details() == "no hello within 0.2 s: send it first"
        await server.stop(None)

    asyncio.run(main())
