"""The server's side of both services. The bodies are what runs without gRPC too: a DraftLink, an object with `generate`."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from actors.rpc.common import (
    CALLER_SILENCE_MS,
    DRAFTER_SILENCE_MS,
    HANDSHAKE_S,
    TAKEN,
    aborting,
    closing,
    server_options,
)
from actors.rpc.frames import coalesce, count, decoded, encoded
from actors.rpc.tls import only, server_credentials
from protos import bundle, codec
from protos.handshake import Hello, mismatch
from runtime.config import TlsConfig
from runtime.core import limits
from runtime.core.errors import InvalidRequest, PairMismatch, Unavailable
from runtime.core.links import DraftLink
from runtime.core.messages import Chunk, Event, Request

logger = logging.getLogger(__name__)

CALLS = (
    2 * limits.SESSIONS
)  # at one time, of all kinds: the bodies refuse sessions themselves, with a better message


class Generator(Protocol):
    """A target, seen from its callers."""

    def generate(self, request: Request) -> AsyncIterator[Chunk]: ...


class DraftingService:
    """Serves a drafter. Each stream is one `body.speculate` of its own; it is closed before the stream is gone.

    counters  what had no effect, by reason: `malformed` and `unknown` events, `unsent` replies, `refused` handshakes
    """

    name = codec.DRAFTING

    def __init__(self, body: DraftLink, hello: Hello, handshake_s: float = HANDSHAKE_S) -> None:
        self.body = body
        self.hello = hello
        self.counters: Counter[str] = Counter()
        self._handshake_s = handshake_s

    def handler(self, secured: bool = False) -> grpc.GenericRpcHandler:
        """With `secured`, for targets alone."""
        # Bytes in and out: a frame that does not parse must not end the stream.
        method = only("target", self._speculate) if secured else self._speculate
        return grpc.method_handlers_generic_handler(
            self.name, {"Speculate": grpc.stream_stream_rpc_method_handler(method)}
        )

    async def _speculate(self, _: AsyncIterator[bytes], context: Any) -> None:
        async with aborting(context):
            await self._greet(context)
            async with (
                closing(self.body.speculate(self._events(context))) as replies,
                closing(coalesce(replies)) as waiting,
            ):
                async for some in waiting:
                    for data in bundle.from_drafter(
                        encoded(some, codec.encode_reply, self._refuse)
                    ):
                        await context.write(data)
            await context.write(codec.encode_reply(codec.Bye()))

    async def _greet(self, context: Any) -> None:
        """Raises InvalidRequest and PairMismatch. The own Hello is sent only where the target's fits."""
        try:
            async with asyncio.timeout(self._handshake_s):
                data = await context.read()
        except TimeoutError as error:
            raise InvalidRequest(
                f"no hello within {self._handshake_s:g} s: send it first"
            ) from error
        if data is grpc.aio.EOF:
            raise InvalidRequest("the stream ended before its hello: send it first")
        if (why := mismatch(codec.decode_hello_to_drafter(data), self.hello)) is not None:
            self._refuse("refused", why)
            raise PairMismatch(why)
        await context.write(codec.encode_hello_from_drafter(self.hello))

    async def _events(self, context: Any) -> AsyncGenerator[Event, None]:
        while (data := await context.read()) is not grpc.aio.EOF:
            events: list[Event] = decoded(
                data, bundle.frames_to_drafter, codec.decode_event, self._refuse
            )
            for event in events:
                yield event

    def _refuse(self, what: str, why: str) -> None:
        count(logger, self.counters, "a target", what, why)


class TargetService:
    """Serves a target. The body's iterator is closed when the caller has gone."""

    name = codec.TARGET

    def __init__(self, body: Generator) -> None:
        self.body = body

    def handler(self, secured: bool = False) -> grpc.GenericRpcHandler:
        """With `secured`, for gateways alone."""
        method = only("gateway", self._generate) if secured else self._generate
        return grpc.method_handlers_generic_handler(
            self.name, {"Generate": grpc.unary_stream_rpc_method_handler(method)}
        )

    async def _generate(self, data: bytes, context: Any) -> None:
        await context.send_initial_metadata((TAKEN,))
        async with (
            aborting(context),
            closing(self.body.generate(codec.decode_request(data))) as chunks,
        ):
            async for chunk in chunks:
                await context.write(codec.encode_chunk(chunk))


async def serve(
    services: Sequence[DraftingService | TargetService],
    host: str,
    port: int = 0,
    tls: TlsConfig | None = None,
) -> tuple[grpc.aio.Server, int]:
    """A running server with these, health and reflection; and its port, chosen by the system where `port` is 0.

    With `tls` it lets in certificates of the deployment alone, and each service the role that it is for. To be stopped by
    `await server.stop(grace)` on the same event loop. Raises Unavailable where the port cannot be had, InvalidRequest where
    the files of `tls` cannot be used.
    """
    for_callers = any(isinstance(service, TargetService) for service in services)
    credentials = (
        None if tls is None else server_credentials(tls, "target" if for_callers else "drafter")
    )
    options = server_options(CALLER_SILENCE_MS if for_callers else DRAFTER_SILENCE_MS)
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=CALLS)
    server.add_generic_rpc_handlers(
        [service.handler(secured=tls is not None) for service in services]
    )
    names = [service.name for service in services]
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for name in ["", *names]:
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection(
        [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    try:
        where = f"{host}:{port}"
        bound: int = (
            server.add_insecure_port(where)
            if credentials is None
            else server.add_secure_port(where, credentials)
        )
    except RuntimeError as error:
        await server.stop(None)
        raise Unavailable(
            f"no server at {host}:{port} ({error}): choose another port, or 0 for any"
        ) from error
    await server.start()
    return server, bound
