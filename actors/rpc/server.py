"""Servers of both services. Their bodies also run without gRPC: a DraftLink, an object with
`generate`.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from actors.rpc.common import (
    CALLER_SILENCE_MS,
    DRAFTER_SILENCE_MS,
    HANDSHAKE_TIMEOUT_S,
    HEARTBEAT_PERIOD_S,
    REQUEST_TAKEN,
    abort_on_error,
    closing,
    server_options,
)
from actors.rpc.frames import coalesce, count_discarded, decode_frames, encode_frames
from actors.rpc.tls import Method, require_role, server_credentials
from protos import bundle, drafting_codec, target_codec
from protos.handshake import Hello, mismatch
from runtime.config import TlsConfig
from runtime.core import limits
from runtime.core.errors import InvalidRequest, PairMismatch, Unavailable
from runtime.core.links import DraftLink
from runtime.core.messages import Chunk, Event, Request, StandbyText

logger = logging.getLogger(__name__)

# Concurrent calls of all kinds. The bodies refuse excess sessions first, with a better message.
MAX_CALLS = limits.SESSIONS + limits.QUEUED_REQUESTS + 256


class TargetBackend(Protocol):
    """A target, as its callers see it."""

    def generate(self, request: Request) -> AsyncIterator[Chunk]: ...

    async def standby(self, updates: AsyncIterator[Sequence[StandbyText]]) -> None: ...


class DraftingService:
    """Serves a drafter.

    Each stream is one call of `body.speculate`, which is closed before the stream ends.

    counters  discarded items by reason: `malformed` and `unknown` events, `unsent` replies,
              `refused` handshakes
    """

    name = drafting_codec.DRAFTING_SERVICE

    def __init__(
        self, body: DraftLink, hello: Hello, handshake_s: float = HANDSHAKE_TIMEOUT_S
    ) -> None:
        self.body = body
        self.hello = hello
        self.counters: Counter[str] = Counter()
        self._handshake_s = handshake_s

    def handler(self, secured: bool = False) -> grpc.GenericRpcHandler:
        """Returns the gRPC handler. With `secured`, only targets may call it."""
        # The handlers get bytes, since an invalid frame must not end the stream.
        method = require_role("target", self._speculate) if secured else self._speculate
        return grpc.method_handlers_generic_handler(
            self.name, {"Speculate": grpc.stream_stream_rpc_method_handler(method)}
        )

    async def _speculate(self, _: AsyncIterator[bytes], context: Any) -> None:
        async with abort_on_error(context):
            await self._handshake(context)
            async with (
                closing(self.body.speculate(self._events(context))) as replies,
                closing(coalesce(replies)) as waiting,
            ):
                async for some in waiting:
                    for data in bundle.bundle_replies(
                        encode_frames(some, drafting_codec.encode_reply, self._discard)
                    ):
                        await context.write(data)
            await context.write(drafting_codec.encode_reply(drafting_codec.Bye()))

    async def _handshake(self, context: Any) -> None:
        """Exchanges Hellos; the own one is sent only if the target's matches.

        Raises InvalidRequest and PairMismatch.
        """
        try:
            async with asyncio.timeout(self._handshake_s):
                data = await context.read()
        except TimeoutError as error:
            raise InvalidRequest(
                f"no hello within {self._handshake_s:g} s: send it first"
            ) from error
        if data is grpc.aio.EOF:
            raise InvalidRequest("the stream ended before its hello: send it first")
        if (why := mismatch(drafting_codec.decode_hello_to_drafter(data), self.hello)) is not None:
            self._discard("refused", why)
            raise PairMismatch(why)
        await context.write(drafting_codec.encode_hello_from_drafter(self.hello))

    async def _events(self, context: Any) -> AsyncGenerator[Event, None]:
        while (data := await context.read()) is not grpc.aio.EOF:
            events: list[Event] = decode_frames(
                data, bundle.unbundle_events, drafting_codec.decode_event, self._discard
            )
            for event in events:
                yield event

    def _discard(self, what: str, why: str) -> None:
        count_discarded(logger, self.counters, "a target", what, why)


class TargetService:
    """Serves a target. The body's iterator is closed when the caller has disconnected."""

    name = target_codec.TARGET_SERVICE

    def __init__(self, body: TargetBackend) -> None:
        self.body = body

    def handler(self, secured: bool = False) -> grpc.GenericRpcHandler:
        """Returns the gRPC handler. With `secured`, only gateways may call it."""
        methods: dict[str, tuple[Method, Callable[[Method], Any]]] = {
            "Generate": (self._generate, grpc.unary_stream_rpc_method_handler),
            "Heartbeats": (self._heartbeats, grpc.unary_stream_rpc_method_handler),
            "Standby": (self._standby, grpc.stream_stream_rpc_method_handler),
        }
        return grpc.method_handlers_generic_handler(
            self.name,
            {
                name: kind(require_role("gateway", method) if secured else method)
                for name, (method, kind) in methods.items()
            },
        )

    async def _generate(self, data: bytes, context: Any) -> None:
        await context.send_initial_metadata((REQUEST_TAKEN,))
        async with (
            abort_on_error(context),
            closing(self.body.generate(target_codec.decode_request(data))) as chunks,
        ):
            async for chunk in chunks:
                await context.write(target_codec.encode_chunk(chunk))

    async def _standby(self, _: AsyncIterator[bytes], context: Any) -> None:
        async def updates() -> AsyncIterator[Sequence[StandbyText]]:
            while (data := await context.read()) is not grpc.aio.EOF:
                yield target_codec.decode_standby(data)

        async with abort_on_error(context):
            await self.body.standby(updates())

    async def _heartbeats(self, _: bytes, context: Any) -> None:
        while True:
            await context.write(target_codec.HEARTBEAT)
            await asyncio.sleep(HEARTBEAT_PERIOD_S)


async def serve(
    services: Sequence[DraftingService | TargetService],
    host: str,
    port: int = 0,
    tls: TlsConfig | None = None,
) -> tuple[grpc.aio.Server, int]:
    """Starts a server with these services, health and reflection; returns it and its port.

    If `port` is 0, the system chooses one. With `tls`, only certificates of the deployment are
    accepted, and each service only accepts its callers' role. Stop it by `await server.stop(grace)`
    on the same event loop. Raises Unavailable if the port cannot be bound, InvalidRequest if the
    files of `tls` cannot be used.
    """
    for_callers = any(isinstance(service, TargetService) for service in services)
    credentials = (
        None if tls is None else server_credentials(tls, "target" if for_callers else "drafter")
    )
    options = [
        *server_options(CALLER_SILENCE_MS if for_callers else DRAFTER_SILENCE_MS),
        # gRPC cancels calls at random if more than so many arrive before it has begun them.
        ("grpc.server.max_pending_requests", MAX_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_CALLS),
    ]
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=MAX_CALLS)
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
