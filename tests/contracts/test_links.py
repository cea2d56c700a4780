"""Links and servers over gRPC: the contract on both transports, and what only a network can do to it."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import grpc
import pytest

from actors.rpc.client import GrpcLink
from actors.rpc.common import closing
from actors.rpc.server import DraftingService, serve
from protos import bundle, drafting_codec
from protos import speculation_pb2 as pb
from runtime.core import limits
from runtime.core.errors import LinkLost, Overloaded
from runtime.core.links import DraftLink
from runtime.core.messages import Draft, Event, Open, Reply
from runtime.core.node_keys import text_key
from runtime.core.sampling_params import SamplingParams
from tests.contracts.link_contract import (
    PATIENCE_S,
    LinkContract,
    draft_for,
    in_process,
    over_grpc,
    soon,
)
from tests.support.fakes import (
    DRAFTER,
    HELLO,
    HOST,
    Feed,
    ScriptedDrafter,
    chain,
    opening,
    raw_drafter,
)

GOOD = drafting_codec.encode_reply(chain("s", 1, text_key((5, 6, 7))))
BAD: bytes = pb.FromDrafter(
    draft=pb.Draft(session="s", parents=bytes(8), tokens=bytes(4), scores=b"\x00\x00\xc0\x7f")
).SerializeToString()
LATER = b"\xfa\x01\x03abc"  # a kind of frame that this version does not know
GARBAGE = b"\xff" * 20


class TestScriptedDrafter(LinkContract):
    def drafter(self) -> AbstractAsyncContextManager[DraftLink]:
        return in_process(ScriptedDrafter())

    def held(self, drafter: DraftLink) -> int:
        assert isinstance(drafter, ScriptedDrafter)
        return sum(len(sessions) for sessions in drafter.open.values())


async def drain(link: DraftLink, events: AsyncIterator[Event]) -> None:
    async with asyncio.timeout(PATIENCE_S), closing(link.speculate(events)) as replies:
        async for _ in replies:
            pass


@asynccontextmanager
async def called(service: DraftingService) -> AsyncIterator[Any]:
    """A call to this service, to be written and read frame by frame; over, with its server, when the block is."""
    server, port = await serve([service], HOST)
    async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
        call = channel.stream_stream(f"/{drafting_codec.DRAFTING_SERVICE}/Speculate")()
        yield call
        call.cancel()
    await server.stop(None)


async def lost(link: GrpcLink, *events: Event) -> str:
    """What LinkLost says, whatever comes before it."""
    with pytest.raises(LinkLost) as caught:
        await drain(link, Feed(*events))
    return str(caught.value)


async def greeted(context: Any, *frames: bytes) -> None:
    """A raw drafter that says hello, then these frames, then nothing until the target goes."""
    await context.read()
    await context.write(drafting_codec.encode_hello_from_drafter(HELLO))
    for frame in frames:
        await context.write(frame)
    while await context.read() is not grpc.aio.EOF:
        pass


# The handshake


def test_a_refused_handshake_names_both_values() -> None:
    async def main() -> None:
        service = DraftingService(
            ScriptedDrafter(), replace(HELLO, vocabulary="feedbeef", model="small")
        )
        server, port = await serve([service], HOST)
        why = await lost(GrpcLink(f"{HOST}:{port}", HELLO))
        await server.stop(None)
        assert all(
            part in why
            for part in ("FAILED_PRECONDITION", "0123abcd", "feedbeef", "big", "small", DRAFTER)
        )
        assert service.counters["refused"] == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (
            drafting_codec.encode_hello_from_drafter(replace(HELLO, vocabulary="feedbeef")),
            "feedbeef",
        ),
        (
            drafting_codec.encode_hello_from_drafter(replace(HELLO, incarnation=1)),
            "life 0 was asked for, drafter scripted in life 1 is here",
        ),
        (GOOD, "not hello"),
        (GARBAGE, "20 bytes are no frame"),
    ],
)
def test_the_target_checks_the_drafters_hello_too(first: bytes, says: str) -> None:
    async def script(context: Any) -> None:
        await context.write(first)
        await context.read()

    async def main() -> None:
        async with raw_drafter(script) as address:
            assert says in await lost(GrpcLink(address, HELLO))

    asyncio.run(main())


def test_the_peer_is_known_after_the_handshake() -> None:
    async def main() -> None:
        hello = replace(HELLO, model="small")
        server, port = await serve([DraftingService(ScriptedDrafter(), hello)], HOST)
        link = GrpcLink(f"{HOST}:{port}", HELLO)
        async with closing(link.speculate(Feed(opening()))) as replies:
            await draft_for(replies, "s")
        await server.stop(None)
        assert link.peer == hello

    asyncio.run(main())


def test_a_peer_that_accepts_and_says_nothing_is_given_up() -> None:
    async def main() -> None:
        with socket.create_server(
            (HOST, 0)
        ) as mute:  # the kernel accepts, as it does for a stopped process
            why = await lost(
                GrpcLink("{}:{}".format(*mute.getsockname()), HELLO, handshake_s=0.2), opening()
            )
        assert "no hello within 0.2 s" in why

    asyncio.run(main())


def test_a_drafter_that_says_no_hello_is_given_up() -> None:
    async def main() -> None:
        async with raw_drafter(lambda context: asyncio.Event().wait()) as address:  # type: ignore[arg-type,return-value]
            assert "no hello within 0.2 s" in await lost(GrpcLink(address, HELLO, handshake_s=0.2))

    asyncio.run(main())


def test_nobody_there() -> None:
    async def main() -> None:
        with socket.create_server((HOST, 0)) as gone:
            address = "{}:{}".format(*gone.getsockname())
        why = await lost(GrpcLink(address, HELLO))
        assert "UNAVAILABLE" in why
        assert HOST not in why, "addresses stay out of what is logged"

    asyncio.run(main())


# A drafter that breaks the protocol


def test_replies_without_sense_are_dropped_and_counted() -> None:
    async def main() -> None:
        async with raw_drafter(
            lambda context: greeted(context, LATER, BAD, LATER, GARBAGE, GOOD)
        ) as address:
            link = GrpcLink(address, HELLO)
            async with closing(link.speculate(Feed(opening()))) as replies:
                draft = await anext(replies)
        assert isinstance(draft, Draft)
        assert draft.tokens.tolist() == [0, 1, 2, 3]
        assert link.counters == {"unknown": 2, "malformed": 2}

    asyncio.run(main())


def test_three_malformed_replies_in_a_minute_are_the_end() -> None:
    async def main() -> None:
        async with raw_drafter(lambda context: greeted(context, BAD, BAD, BAD, GOOD)) as address:
            link = GrpcLink(address, HELLO)
            why = await lost(link)
        assert "quarantined after 3 strikes, the last: malformed" in why
        assert "scores" in why
        assert link.counters == {"malformed": 3}

    asyncio.run(main())


def test_strikes_outlive_a_connection() -> None:
    async def main() -> None:
        async with raw_drafter(lambda context: greeted(context, BAD, BAD, GOOD)) as address:
            link = GrpcLink(address, HELLO)
            async with closing(link.speculate(Feed())) as replies:
                await draft_for(replies, "s")
            assert "quarantined" in await lost(link)

    asyncio.run(main())


def test_malformed_replies_far_apart_are_forgiven() -> None:
    async def main() -> None:
        clock = count(0.0, 31.0)
        async with raw_drafter(lambda context: greeted(context, *[BAD] * 9, GOOD)) as address:
            link = GrpcLink(address, HELLO, now=lambda: next(clock))
            async with closing(link.speculate(Feed())) as replies:
                await draft_for(replies, "s")
        assert link.counters == {"malformed": 9}

    asyncio.run(main())


def test_a_reply_over_the_limit_loses_the_link() -> None:
    async def main() -> None:
        async with raw_drafter(
            lambda context: greeted(context, bytes(limits.MESSAGE_BYTES + 1))
        ) as address:
            why = await lost(GrpcLink(address, HELLO))
        assert "RESOURCE_EXHAUSTED" in why

    asyncio.run(main())


def test_an_end_without_a_goodbye_is_a_loss() -> None:
    async def script(context: Any) -> None:
        await context.read()
        await context.write(drafting_codec.encode_hello_from_drafter(HELLO))

    async def main() -> None:
        async with raw_drafter(script) as address:
            assert "without a goodbye" in await lost(GrpcLink(address, HELLO))

    asyncio.run(main())


# What the drafter's own side does


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


# What the target's side sends


def test_events_that_the_wire_cannot_carry_cost_only_their_session() -> None:
    async def main() -> None:
        body = ScriptedDrafter()
        huge = Open(
            "huge", 1, (10**6,) * limits.MESSAGE_BYTES, 1, SamplingParams(), opening("huge").share
        )
        alien = replace(opening("alien"), sampling=SamplingParams(stop=("\udcff",)))
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
        (GARBAGE, grpc.StatusCode.INVALID_ARGUMENT, "no frame"),
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
