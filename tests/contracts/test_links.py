"""Links over gRPC meet the contract, and end when the peer breaks the protocol."""

import asyncio
import socket
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from actors.rpc.client import GrpcLink
from actors.rpc.common import closing
from actors.rpc.server import DraftingService, serve
from protos import drafting_codec
from runtime.core import limits
from runtime.core.links import DraftLink
from runtime.core.messages import Draft
from tests.contracts.link_contract import (
    LinkContract,
    draft_for,
    in_process,
)
from tests.support.fakes import (
    DRAFTER,
    HELLO,
    HOST,
    Feed,
    ScriptedDrafter,
    opening,
    raw_drafter,
)
from tests.support.raw_links import BAD, GARBAGE, GOOD, LATER, greeted, lost


class TestScriptedDrafter(LinkContract):
    def drafter(self) -> AbstractAsyncContextManager[DraftLink]:
        return in_process(ScriptedDrafter())

    def held(self, drafter: DraftLink) -> int:
        assert isinstance(drafter, ScriptedDrafter)
        return sum(len(sessions) for sessions in drafter.open.values())


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
        (GARBAGE, "20 bytes are not a valid frame"),
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
