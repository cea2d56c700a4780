"""What every gRPC client and server of the project shares: the options of a connection, and how errors cross it."""

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

HANDSHAKE_TIMEOUT_S = 3.0  # a peer that has not said Hello by then is mute
CONNECT_TIMEOUT_MS = (
    5000  # a connection that has not finished its TLS and HTTP/2 handshakes by then is closed
)
PEER_ADDRESS = re.compile(r"\b(?:ipv4|ipv6|unix):\S*[^\s:]")  # as gRPC writes them
MAX_PEER_CHARACTERS = 500  # characters of a peer's own words that are passed on
REQUEST_TAKEN = (
    "outrider-taken",
    "1",
)  # initial metadata: the target holds the request from now on
ERROR_NAME = (
    "outrider-error"  # trailing metadata: the kind of error that the peer itself has raised
)
ERROR_PARAM = "outrider-param"  # trailing metadata: which parameter an INVALID_ARGUMENT is about

KEEPALIVE_MS = 500  # of silence until a peer is asked for a sign of life
# How long, beyond that, a peer may leave a ping unanswered. A drafter or, for a router, a target that is lost by mistake costs
# speed only: it is back at once, and others go on meanwhile. A caller of a single target loses its answer with it, and a target does
# in vain what it did for a caller: there, a busy machine gets more time.
DRAFTER_SILENCE_MS = TARGET_SILENCE_MS = 1000
CALLER_SILENCE_MS = 3000


def shared_options(silence_ms: int) -> list[tuple[str, int]]:
    """A peer that is cut off or stopped is noticed within `silence_ms` and half a second. keepalive_timeout alone sees the cut, whose
    packets nobody acknowledges; behind a stopped process the kernel still does, and a ping would wait its own minute."""
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
        ),  # or a new channel inherits the back-off of a lost one
        (
            "grpc.min_reconnect_backoff_ms",
            2000,
        ),  # gRPC's name for the time that one connection attempt gets
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]


def server_options(silence_ms: int) -> list[tuple[str, int]]:
    """The server must allow pings as often as clients send them, or it closes the connection (GOAWAY, too_many_pings)."""
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
    """Ends the RPC of this servicer context with the status that belongs to an OutriderError raised inside."""
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
    """Without the addresses that gRPC puts into its own words: this goes into logs and answers."""
    return f"{error.code().name}: {printable(PEER_ADDRESS.sub('the peer', error.details() or ''))}"


def printable(said: str) -> str:
    """The words of a peer, fit for a line of a log: it cannot begin another one, nor move the cursor of who reads it."""
    return "".join(
        character if character.isprintable() else " " for character in said[:MAX_PEER_CHARACTERS]
    )


def to_outrider_error(error: grpc.aio.AioRpcError, peer: str) -> OutriderError:
    """The error that `abort_on_error` was given at the other end; Unavailable for all that gRPC itself has to say."""
    match error.code():
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
    """Closes the iterator, where it can be closed, before going on."""
    try:
        yield iterator
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()
