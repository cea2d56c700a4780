"""Shared by every gRPC client and server of the project: channel options, and errors over
the wire.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
from grpc import StatusCode

from runtime.core import limits
from runtime.core.errors import (
    InvalidRequest,
    LinkLost,
    ModelRefused,
    OutriderError,
    Overloaded,
    PairMismatch,
    Unavailable,
)

HANDSHAKE_TIMEOUT_S = 3.0  # for a peer to send its Hello
CONNECT_TIMEOUT_MS = 5000  # for the TLS and HTTP/2 handshakes of a connection
PEER_ADDRESS = re.compile(r"\b(?:ipv4|ipv6|unix):\S*[^\s:]")  # as gRPC writes them
MAX_PEER_CHARACTERS = 500  # of a peer's text in logs and errors
REQUEST_TAKEN = (
    "outrider-taken",
    "1",
)  # initial metadata: the target has accepted the request
ERROR_NAME = "outrider-error"  # trailing metadata: the class of the error that the peer raised
ERROR_PARAM = "outrider-param"  # trailing metadata: the parameter at fault

HEARTBEAT_PERIOD_S = 0.1  # between two heartbeats of a target
KEEPALIVE_MS = 500  # of silence until a peer is pinged
# How long a peer may leave a ping unanswered. To lose a drafter by mistake costs only speed, and so
# it is for a router that loses a target: the peer is back at once, and others go on meanwhile. A
# caller of a single target would lose its response, and the target its work for the caller, so they
# allow for a busy machine.
DRAFTER_SILENCE_MS = TARGET_SILENCE_MS = 1000
CALLER_SILENCE_MS = 3000


def shared_options(silence_ms: int) -> list[tuple[str, int]]:
    """Returns the options of clients and servers.

    A peer that is cut off or stopped is noticed within `silence_ms` and half a second.
    keepalive_timeout alone notices only a cut, since nobody acknowledges its packets. The kernel
    still acknowledges those to a stopped process, whose ping would time out after gRPC's default of
    a minute.
    """
    return [
        ("grpc.max_send_message_length", limits.MESSAGE_BYTES),
        ("grpc.max_receive_message_length", limits.MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", silence_ms),
        ("grpc.http2.ping_timeout_ms", silence_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def client_options(silence_ms: int) -> list[tuple[str, int]]:
    return [
        *shared_options(silence_ms),
        ("grpc.enable_http_proxy", 0),  # actors reach each other directly
        (
            "grpc.use_local_subchannel_pool",
            1,
        ),  # else a new channel inherits the back-off of a lost one
        (
            "grpc.min_reconnect_backoff_ms",
            2000,
        ),  # gRPC's name for the timeout of one connection attempt
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]


def server_options(silence_ms: int) -> list[tuple[str, int]]:
    """Returns the options of a server.

    It must allow pings as often as clients send them, or it closes the connection (GOAWAY,
    too_many_pings).
    """
    return [
        *shared_options(silence_ms),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", CONNECT_TIMEOUT_MS),
    ]


STATUS = {
    InvalidRequest: StatusCode.INVALID_ARGUMENT,
    Overloaded: StatusCode.RESOURCE_EXHAUSTED,
    PairMismatch: StatusCode.FAILED_PRECONDITION,
    ModelRefused: StatusCode.INTERNAL,
    LinkLost: StatusCode.UNAVAILABLE,
    Unavailable: StatusCode.UNAVAILABLE,
}

Item = TypeVar("Item")


@asynccontextmanager
async def abort_on_error(context: Any) -> AsyncIterator[None]:
    """Aborts the RPC of this context with the status of an OutriderError raised inside."""
    try:
        yield
    except OutriderError as error:
        param = error.param if isinstance(error, InvalidRequest) else None
        metadata = (
            (ERROR_NAME, type(error).__name__),
            *(() if param is None else ((ERROR_PARAM, param),)),
        )
        await context.abort(STATUS.get(type(error), StatusCode.INTERNAL), str(error), metadata)


def describe_status(error: grpc.aio.AioRpcError) -> str:
    """Returns the error for logs and responses, without the addresses that gRPC adds."""
    return f"{error.code().name}: {printable(PEER_ADDRESS.sub('the peer', error.details() or ''))}"


def printable(said: str) -> str:
    """Returns a peer's text fit for one line of a log, without line breaks and control
    characters.
    """
    return "".join(
        character if character.isprintable() else " " for character in said[:MAX_PEER_CHARACTERS]
    )


def is_from_peer(error: grpc.aio.AioRpcError) -> bool:
    """Tells whether the peer raised the error; otherwise it is of gRPC, there or here."""
    return any(name == ERROR_NAME for name, _ in error.trailing_metadata() or ())


def to_outrider_error(error: grpc.aio.AioRpcError, peer: str) -> OutriderError:
    """Returns the error that `abort_on_error` sent; Unavailable for an error of gRPC itself."""
    match error.code() if is_from_peer(error) else StatusCode.UNAVAILABLE:
        case StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(
                error.details() or "", dict(error.trailing_metadata() or ()).get(ERROR_PARAM)
            )
        case StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(error.details())
        case StatusCode.FAILED_PRECONDITION:
            return PairMismatch(error.details())
        case _:
            return Unavailable(
                f"{peer} cannot be reached or has failed ({describe_status(error)}): start it again"
            )


@asynccontextmanager
async def closing(iterator: AsyncIterator[Item]) -> AsyncIterator[AsyncIterator[Item]]:
    """Closes the iterator at the end of the block, if it can be closed."""
    try:
        yield iterator
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()
