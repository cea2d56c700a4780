"""One client's connection, and the table of all of them: none waits for its client longer than it may, and none fills the table."""

import asyncio
import math
import socket
import ssl
import sys
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from enum import Enum, auto
from http import HTTPStatus
from typing import Any, cast

import h11
from starlette.types import Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.h11_impl import H11Protocol

from actors.gateway.errors import Refused, refused
from actors.gateway.exchange import Speaker
from actors.gateway.streams import encoded
from runtime import limits
from runtime.errors import Overloaded

STALL_SECONDS = 30.0  # in which a client takes nothing of what is sent to it
CLOSE_SECONDS = 5.0  # for a client's part in the end of a connection
PROBE_SECONDS = 0.25  # after which a client that has ended its side of the connection is looked for, again and again


class Phase(Enum):
    """What a connection waits for."""

    REQUEST = auto()  # the TLS handshake, and the head of the next request
    SERVICE = auto()  # the gateway, which bounds the request's body and its own work
    READER = auto()  # the client takes what was sent
    GOODBYE = auto()  # the client's end of the connection


def patience(phase: Phase) -> float:
    """Seconds that a connection may stay in the phase without any progress."""
    match phase:
        case Phase.REQUEST:
            return limits.BODY_SECONDS
        case Phase.SERVICE:
            return math.inf
        case Phase.READER:
            return STALL_SECONDS
        case Phase.GOODBYE:
            return CLOSE_SECONDS


class ConnectionTable:
    """Ends connections that wait too long, and those that have waited longest when more than `most` are open.

    `tls`: what a connection is secured with, None for plain HTTP.
    """

    def __init__(self, most: int, tls: ssl.SSLContext | None) -> None:
        self.most, self.tls = most, tls
        self.waiting: deque[ClientConnection] = deque()  # as the last sweep has found them, the longest first

    def sweep(self, connections: Collection[Any], now: float) -> None:
        """Looks at all connections. To be called again and again, with the event loop's time."""
        waiting = []
        for connection in list(connections):
            found = connection.look()
            if found != connection.seen:
                connection.seen, connection.since = found, now
            elif now - connection.since > patience(found[0]):
                connection.cut()
            elif found[0] is not Phase.SERVICE:
                waiting.append(connection)
        self.waiting = deque(sorted(waiting, key=lambda connection: connection.since))

    def make_room(self, connections: Collection[Any]) -> None:
        """Cuts those that have waited longest for their clients, until no more than `most` are left or none of them waits."""
        while len(connections) > self.most and self.waiting:
            connection = self.waiting.popleft()
            if connection in connections and connection.look() == connection.seen:
                connection.cut()


class ClientConnection(H11Protocol):
    """Adds to uvicorn's protocol what `ConnectionTable` looks at, TLS that counts from its first byte, answers in OpenAI's form
    to what is no HTTP, and answers to clients that have ended their side of the connection.

    `seen`, `since`: the last look that has found something new, and the event loop's time then.
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
        self.seen, self.since = self.look(), self.loop.time()
        self.table.make_room(self.connections)
        if self.table.tls is None:
            super().connection_made(transport)
        else:
            self._securing = self.loop.create_task(self._secure(transport, self.table.tls))

    async def _secure(self, transport: asyncio.Transport, tls: ssl.SSLContext) -> None:
        secured: asyncio.Transport | None = None
        with suppress(OSError):  # ssl.SSLError is one. The table's patience ends first, asyncio's own is never asked.
            secured = await self.loop.start_tls(
                transport,
                self,
                tls,
                server_side=True,
                ssl_handshake_timeout=60 + limits.BODY_SECONDS,
                ssl_shutdown_timeout=60 + CLOSE_SECONDS,
            )
        if secured is None or self not in self.connections:
            self.connections.discard(self)
            transport.abort()
            return
        super().connection_made(secured)
        self.handle_events()

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self.connections) > self.table.most:
            await Speaker(send).refuse(refused(Overloaded("too many connections")), {"connection": "close"})
        else:
            await self.serve(scope, receive, send)

    def look(self) -> tuple[Phase, Any]:
        """The phase, and something that is another with each progress of the client."""
        left = self.transport.get_write_buffer_size()
        if left:
            return Phase.READER, left
        if self._ended or self.transport.is_closing():
            return Phase.GOODBYE, None
        if self.cycle is not None and not self.cycle.response_complete:
            return Phase.SERVICE, self.cycle
        return Phase.REQUEST, (self.cycle, bool(self.conn.trailing_data[0]))

    def cut(self) -> None:
        """Ends the connection at once, and counts it no more."""
        self.connections.discard(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        if self.scheme is None:  # it has come together with the end of the handshake
            self.conn.receive_data(data)
        else:
            super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keeps the connection of a client that waits for an answer. TLS in asyncio cannot, and HTTP/1.0 knows no way to ask."""
        waits = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        if not waits or self.table.tls is not None or self.scope["http_version"] != "1.1":
            return False
        self.half_closed = True
        self._probe = self.loop.call_later(PROBE_SECONDS, self._look_for_client, self.cycle)
        return True

    def _look_for_client(self, cycle: Any) -> None:
        """Ends the connection of a client that has gone altogether: its system refuses the interim response that it is sent."""
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.cut()
            return
        if self.conn.our_state is h11.SEND_RESPONSE and cycle is self.cycle:
            self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue")))
            cycle = None  # one is enough
        self._probe = self.loop.call_later(PROBE_SECONDS, self._look_for_client, cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._probe is not None:
            self._probe.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.half_closed and self.cycle.response_complete:  # no other request was there already
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, if nothing else was answered, and reads on for some time: unread bytes would reset the answer."""
        status = getattr(sys.exception(), "error_status_hint", 400)  # h11 has just raised
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        error = Refused(status, "invalid_http", "the request is not valid HTTP/1.1: see RFC 9112")
        body = encoded(error.body())
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._ended = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
