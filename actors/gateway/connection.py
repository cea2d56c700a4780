"""A connection bounds how long it waits for its client; the table of all of them keeps room.

A connection is always in one phase. Only `Phase.SERVICE` has no bound here, since the gateway
bounds its own work: a body by `limits.BODY_TIMEOUT_S`, an answer by the request's deadline.
"""

import asyncio
import math
import socket
import ssl
import sys
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from enum import Enum, auto
from http import HTTPStatus
from typing import Any, cast

import h11
from starlette.types import Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from actors.gateway.completion_handler import ResponseWriter
from actors.gateway.streams import to_json
from actors.openai.errors import ApiError, to_api_error
from runtime.core import limits
from runtime.core.errors import Overloaded

STALL_TIMEOUT_S = 30.0  # for a client that reads nothing of what is sent
CLOSE_TIMEOUT_S = 5.0  # for a client to close its side
MAX_PIPELINED_BYTES = 64 << 10  # read ahead of the request that is being answered
CLIENT_PROBE_PERIOD_S = 0.25  # between two checks of a half-closed client


class Phase(Enum):
    """Names what a connection waits for."""

    REQUEST = auto()  # the client sends the TLS handshake and the head of a request
    SERVICE = auto()  # the gateway reads the body and answers
    READER = auto()  # the client takes what is sent
    GOODBYE = auto()  # the client closes its side


def phase_timeout_s(phase: Phase) -> float:
    """Returns the seconds that a connection may stay in the phase without progress."""
    match phase:
        case Phase.REQUEST:
            return limits.BODY_TIMEOUT_S
        case Phase.SERVICE:
            return math.inf
        case Phase.READER:
            return STALL_TIMEOUT_S
        case Phase.GOODBYE:
            return CLOSE_TIMEOUT_S


class ConnectionTable:
    """Cuts connections that wait too long, and the longest waiting ones if too many are open.

    max_connections  connections that may be open
    tls              secures them; None means plain HTTP
    waiting          connections that wait for their clients as of the last sweep, longest first
    """

    def __init__(self, max_connections: int, tls: ssl.SSLContext | None) -> None:
        self.max_connections, self.tls = max_connections, tls
        self.waiting: deque[ClientConnection] = deque()

    def sweep(self, connections: Collection[Any], now: float) -> None:
        """Checks all connections. It is called periodically, with the event loop's time."""
        waiting = []
        for connection in list(connections):
            found = connection.progress()
            if found != connection.last_progress:
                connection.last_progress, connection.since = found, now
            elif now - connection.since > phase_timeout_s(found[0]):
                connection.cut()
            elif found[0] is not Phase.SERVICE:
                waiting.append(connection)
        waiting.sort(key=lambda connection: connection.since)
        self.waiting = deque(waiting)

    def make_room(self, connections: Collection[Any]) -> None:
        """Cuts the longest waiting ones until `max_connections` are left, or none of them waits."""
        while len(connections) > self.max_connections and self.waiting:
            connection = self.waiting.popleft()
            if connection in connections and connection.progress() == connection.last_progress:
                connection.cut()


class BoundedFlow(FlowControl):
    """Reads on only while at most MAX_PIPELINED_BYTES wait for their turn.

    uvicorn reads on in each request, to learn whether its client has disconnected: what pipelined
    requests bring would pile up. `waiting` returns how many bytes do.
    """

    def __init__(self, transport: asyncio.Transport, waiting: Callable[[], int]) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if self._waiting() <= MAX_PIPELINED_BYTES:
            super().resume_reading()


class ClientConnection(H11Protocol):
    """Extends uvicorn's protocol in five ways.

    - `ConnectionTable` can check its progress: `last_progress` is the last new one, made at the
      event loop's time `since`.
    - It counts as open from the first byte of the TLS handshake, not from its end.
    - It reads no more than MAX_PIPELINED_BYTES, and what one read brings, ahead of its answers.
    - It answers invalid HTTP in OpenAI's form.
    - It answers a client that has half-closed the connection (plain HTTP/1.1 only).
    """

    def __init__(self, table: ConnectionTable, **given: Any) -> None:
        super().__init__(**given)
        self.table = table
        self.serve, self.app = self.app, cast(ASGI3Application, self._admit)
        self.half_closed = self._ended = False
        self._probe: asyncio.TimerHandle | None = None
        self._securing: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.connections.add(self)
        self.last_progress, self.since = self.progress(), self.loop.time()
        self.table.make_room(self.connections)
        if self.table.tls is None:
            self._begin(transport)
        else:
            self._securing = self.loop.create_task(self._secure(transport, self.table.tls))

    async def _secure(self, transport: asyncio.Transport, tls: ssl.SSLContext) -> None:
        secured: asyncio.Transport | None = None
        with suppress(OSError):  # ssl.SSLError is one; the table's limits end before asyncio's
            secured = await self.loop.start_tls(
                transport,
                self,
                tls,
                server_side=True,
                ssl_handshake_timeout=60 + limits.BODY_TIMEOUT_S,
                ssl_shutdown_timeout=60 + CLOSE_TIMEOUT_S,
            )
        if secured is None or self not in self.connections:
            self.connections.discard(self)
            transport.abort()
            return
        self._begin(secured)
        self.handle_events()

    def _begin(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.flow = BoundedFlow(transport, lambda: len(self.conn.trailing_data[0]))

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self.connections) > self.table.max_connections:
            error = to_api_error(Overloaded("too many connections"))
            await ResponseWriter(send).write_error(error, {"connection": "close"})
        else:
            await self.serve(scope, receive, send)

    def progress(self) -> tuple[Phase, Any]:
        """Returns the phase, and a value that changes whenever the client makes progress."""
        left = self.transport.get_write_buffer_size()
        if left:
            return Phase.READER, left
        if self._ended or self.transport.is_closing():
            return Phase.GOODBYE, None
        if self.cycle is not None and not self.cycle.response_complete:
            return Phase.SERVICE, self.cycle
        return Phase.REQUEST, (self.cycle, bool(self.conn.trailing_data[0]))

    def cut(self) -> None:
        """Aborts the connection, which no longer counts as open."""
        self.connections.discard(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        if self.scheme is None:  # arrived with the last bytes of the handshake
            self.conn.receive_data(data)
        else:
            super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keeps the connection open until its response is complete.

        This excludes TLS, which asyncio always closes, and HTTP/1.0, which has no interim responses
        that could tell a waiting client from one that has disconnected.
        """
        cycle = self.cycle
        waits = cycle is not None and not cycle.response_complete and not cycle.more_body
        if not waits or self.table.tls is not None or self.scope["http_version"] != "1.1":
            return False
        self.half_closed = True
        self._probe = self.loop.call_later(CLIENT_PROBE_PERIOD_S, self._look_for_client, cycle)
        return True

    def _look_for_client(self, cycle: Any) -> None:
        """Cuts the connection if the client is gone: its host resets it at an interim response."""
        client: Any = self.transport.get_extra_info("socket")
        if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.cut()
            return
        if self.conn.our_state is h11.SEND_RESPONSE and cycle is self.cycle:
            interim = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(interim))
            cycle = None  # one is enough
        self._probe = self.loop.call_later(CLIENT_PROBE_PERIOD_S, self._look_for_client, cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._probe is not None:
            self._probe.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.half_closed and self.cycle.response_complete:  # no pipelined request follows
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answers invalid HTTP, unless a response has started, and discards further input.

        Unread bytes would reset the connection before the client has read the response.
        """
        status = getattr(sys.exception(), "error_status_hint", 400)  # h11 has just raised
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        refusal = ApiError(
            status, "invalid_http", "the request is not valid HTTP/1.1: see RFC 9112"
        )
        body = to_json(refusal.body())
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        head = h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase)
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._ended = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
