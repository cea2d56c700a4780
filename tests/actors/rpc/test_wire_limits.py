"""A gRPC server bounds the bytes, time and streams of unauthenticated peers."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from actors.rpc import common, server
from actors.rpc.certificate_authority import CertificateAuthority
from actors.rpc.client import GrpcLink
from actors.rpc.server import DraftingService, TargetService, serve
from protos import target_codec
from runtime.core import limits
from runtime.core.errors import LinkLost
from tests.contracts.link_contract import PATIENCE_S, soon
from tests.support.certificates import NOW, write_certificates
from tests.support.fakes import HELLO, HOST, Feed, ScriptedDrafter, ScriptedTarget, raw_drafter
from tests.support.harness import asking

GENERATE = f"/{target_codec.TARGET_SERVICE}/Generate"
ANY_SIZE = [("grpc.max_send_message_length", -1)]


async def refused(
    port: int, message: bytes, compression: grpc.Compression
) -> tuple[grpc.StatusCode, str]:
    async with (
        grpc.aio.insecure_channel(f"{HOST}:{port}", ANY_SIZE, compression) as channel,
        asyncio.timeout(PATIENCE_S),
    ):
        call = channel.unary_stream(GENERATE)(message)
        return await call.code(), await call.details()


@pytest.mark.parametrize(
    "compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate]
)
def test_a_message_over_the_limit_is_refused_however_small_it_is_packed(
    compression: grpc.Compression,
) -> None:
    async def main() -> None:
        body = ScriptedTarget()
        server, port = await serve([TargetService(body)], HOST)
        code, details = await refused(port, bytes(64 * limits.MESSAGE_BYTES), compression)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in details
        code, details = await refused(port, b"\xff" * limits.MESSAGE_BYTES, compression)
        assert code is grpc.StatusCode.INVALID_ARGUMENT, (
            "at the limit the message itself is looked at"
        )
        await server.stop(None)
        assert body.asked == []

    asyncio.run(main())


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes.fromhex("1603010200"),
    ],
)
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_connection_that_begins_and_says_no_more_is_closed(
    said: bytes, encrypted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "CONNECT_TIMEOUT_MS", 200)

    async def main() -> None:
        tls = (
            write_certificates(tmp_path, CertificateAuthority("ours", NOW, 30))
            if encrypted
            else None
        )
        server, port = await serve([DraftingService(ScriptedDrafter(), HELLO)], HOST, tls=tls)
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(said)
        async with asyncio.timeout(PATIENCE_S):
            await reader.read()  # to its end
        writer.close()
        await server.stop(None)

    asyncio.run(main())


def test_streams_beyond_the_limit_are_refused_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "MAX_CALLS", 3)

    async def main() -> None:
        body = ScriptedTarget(hangs=True)
        server, port = await serve([TargetService(body)], HOST)
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            request = target_codec.encode_request(asking((1,)))
            held = [channel.unary_stream(GENERATE)(request) for _ in range(3)]
            await soon(lambda: body.running == 3)
            async with asyncio.timeout(PATIENCE_S):
                assert (
                    await channel.unary_stream(GENERATE)(request).code()
                    is grpc.StatusCode.RESOURCE_EXHAUSTED
                )
            assert body.running == 3
            held[0].cancel()
            await soon(lambda: body.running == 2)
            held.append(channel.unary_stream(GENERATE)(request))
            await soon(lambda: body.running == 3)
            assert not any(call.done() for call in held[1:])
        await server.stop(None)

    asyncio.run(main())


FORGED = "x\n2026-01-01 all is well\x1b[2J\u2028"


def test_a_peer_cannot_write_lines_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def aborts(context: Any) -> None:
        await context.abort(grpc.StatusCode.INTERNAL, FORGED * 100)

    async def main() -> None:
        server, port = await serve([DraftingService(ScriptedDrafter(), HELLO)], HOST)
        with pytest.raises(LinkLost):
            await anext(
                GrpcLink(
                    f"{HOST}:{port}", replace(HELLO, model=FORGED, vocabulary="other")
                ).speculate(Feed())
            )
        await server.stop(None)
        async with raw_drafter(aborts) as address:
            with pytest.raises(LinkLost) as caught:
                await anext(GrpcLink(address, HELLO).speculate(Feed()))
        lines = [record.getMessage() for record in caplog.records]
        assert ["refused" in line for line in lines] == [True]
        assert all(line.isprintable() and len(line) < 600 for line in (*lines, str(caught.value)))

    asyncio.run(main())
