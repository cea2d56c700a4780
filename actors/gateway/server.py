"""The HTTP server: its address, limits and timeouts.

There is no access log, because it would contain addresses and keys.
"""

import asyncio
import logging
import socket
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from actors.gateway.api_keys import read_keys
from actors.gateway.connection import ClientConnection, ConnectionTable
from actors.rpc.endpoints import is_loopback
from runtime.config import GatewayConfig
from runtime.core import limits
from runtime.core.errors import InvalidRequest, Unavailable

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
KEEP_ALIVE_S = 5
SHUTDOWN_TIMEOUT_S = 5  # for running responses
SWEEP_TICKS = 5  # of 0.1 s each, between two sweeps


class GatewayServer(uvicorn.Server):
    """A uvicorn server that sweeps its connections every half second."""

    def __init__(self, config: uvicorn.Config, table: ConnectionTable) -> None:
        super().__init__(config)
        self.table = table

    async def on_tick(self, counter: int) -> bool:
        if counter % SWEEP_TICKS == 0:
            self.table.sweep(self.server_state.connections, asyncio.get_running_loop().time())
        return await super().on_tick(counter)


def check_exposure(config: GatewayConfig) -> None:
    """Raises InvalidRequest if others can reach the address without API keys or TLS.

    The `insecure` setting allows it.
    """
    if is_loopback(config.host) or (config.api_keys is not None and config.tls is not None):
        return
    lacking = " and ".join(
        name
        for name, value in (("api_keys", config.api_keys), ("tls", config.tls))
        if value is None
    )
    if not config.insecure:
        raise InvalidRequest(
            f"the gateway on {config.host} has no {lacking}: give them, or listen on 127.0.0.1,"
            " or set insecure",
            "gateway",
        )
    log.warning("insecure, as configured: other hosts can reach the gateway without %s", lacking)


def check_gateway(config: GatewayConfig, starts: bool) -> None:
    """Raises what a gateway on this machine would raise at its start.

    With `starts`, the address has to be free: no other gateway of the deployment has it.
    """
    check_exposure(config)
    if config.api_keys is not None:
        read_keys(config.api_keys)
    build_server(no_app, config)
    if starts:
        listen(config.host, config.port).close()


async def no_app(scope: object, receive: object, send: object) -> None:
    """Stands for an application that is never asked."""


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket. Raises Unavailable if the port cannot be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise Unavailable(
            f"no HTTP server at {host}:{port} ({error}): choose another address"
        ) from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(MAX_CONNECTIONS // 2)
    except OSError as error:
        found.close()
        raise Unavailable(
            f"no HTTP server at {host}:{port} ({error}): choose another port, or 0 for any"
        ) from error
    return found


def build_server(app: ASGIApp, config: GatewayConfig) -> GatewayServer:
    """Returns a server, to be run by `serve(sockets=[...])` and ended by `should_exit`.

    Raises InvalidRequest if the certificates cannot be read.
    """
    secured: dict[str, Any] = {}
    if config.tls is not None:
        secured = {"ssl_certfile": str(config.tls.cert), "ssl_keyfile": str(config.tls.key)}
    settings = uvicorn.Config(
        app,
        http=ClientConnection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
        **secured,
    )
    try:
        settings.load()
    except OSError as error:  # ssl.SSLError is one
        raise InvalidRequest(
            f"the gateway's certificate or key cannot be used ({type(error).__name__}):"
            " see gateway.tls",
            "tls",
        ) from error
    table = ConnectionTable(MAX_CONNECTIONS, settings.ssl)
    settings.ssl = (
        None  # connections do TLS themselves, so that they count before the handshake ends
    )
    settings.http_protocol_class = partial(ClientConnection, table)  # type: ignore[assignment]
    return GatewayServer(settings, table)
