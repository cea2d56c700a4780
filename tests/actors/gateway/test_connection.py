"""No client, with or without a key, holds a connection open forever or shuts others out."""

import contextlib
import datetime
import json
import socket
import ssl
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from actors.rpc.certificate_authority import CertificateAuthority
from runtime.config import GatewayConfig, TlsConfig
from runtime.core import limits
from runtime.core.messages import Chunk, Request
from tests.actors.gateway.test_life import Gate, let, stats
from tests.support.gateway import MODEL, Running, Scripted, never, serving
from tests.support.harness import HANG_S
from tests.support.raw_http import CHAT, COMPLETIONS, KEY, answer, connected, ends, flood, head

SOON = 0.3  # seconds, in place of the real bounds
FRAMES = ("Content-Length: 1000", "Transfer-Encoding: chunked")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", SOON)
    monkeypatch.setattr("actors.gateway.connection.STALL_TIMEOUT_S", SOON)
    monkeypatch.setattr("actors.gateway.connection.CLOSE_TIMEOUT_S", SOON)


ROUTES = [
    *(
        ("GET", path, 200)
        for path in (
            "/health",
            "/ready",
            "/version",
            "/metrics",
            "/v1/models",
            f"/v1/models/{MODEL}",
        )
    ),
    ("GET", "/v1/models/other", 404),
    ("GET", "/nowhere", 404),
    ("DELETE", "/nowhere", 404),
    ("GET", COMPLETIONS, 405),
    ("POST", "/health", 405),
    ("OPTIONS", CHAT, 405),
    ("POST", COMPLETIONS, 415),
    ("PUT", CHAT, 405),
]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("frame", FRAMES)
def test_an_unread_body_ends_its_connection(gateway: Running, frame: str) -> None:
    """This holds for every route, with and without a key."""
    with contextlib.ExitStack() as stack:
        open_ones = []
        for method, path, status in ROUTES:
            for key in (KEY, None):
                connection = stack.enter_context(connected(gateway))
                connection.sendall(head(method, path, frame, key=key))
                found, first, _ = answer(connection)
                assert found == (status if key or path in ("/health", "/ready") else 401)
                assert b"\r\nconnection: close" in first
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b"1")
                open_ones.append(connection)
        assert all(ends(connection) for connection in open_ones)
    gateway.eventually(lambda: not gateway.connections())


def test_a_connection_whose_bodies_were_read_or_empty_is_used_again(gateway: Running) -> None:
    body = json.dumps({"model": "other", "prompt": "x"}).encode()
    with connected(gateway) as connection:
        for sent, status in (
            (head("GET", "/health"), 200),
            (head("GET", "/health", "Content-Length: 0"), 200),
            (
                head(
                    "POST",
                    COMPLETIONS,
                    "Content-Type: application/json",
                    f"Content-Length: {len(body)}",
                )
                + body,
                404,
            ),
            (head("GET", "/nowhere"), 404),
            (head("GET", "/health"), 200),
        ):
            connection.sendall(sent)
            found, first, _ = answer(connection)
            assert (found, b"connection: close" in first) == (status, False)


# Clients that do not read


@pytest.mark.usefixtures("short")
def test_a_client_that_reads_no_answers_is_disconnected(gateway: Running) -> None:
    with connected(gateway, 4096) as connection:
        connection.settimeout(SOON)
        with pytest.raises(OSError, match=r"timed out|reset|pipe"):
            flood(connection, head("GET", "/metrics") * 100)
        gateway.eventually(lambda: not gateway.connections())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "fields", [{}, {"stream": True}, {"stream": True, "timeout": SOON}], ids=str
)
@pytest.mark.parametrize("close", [(), ("Connection: close",)], ids=["keep", "close"])
def test_a_client_that_does_not_read_a_long_answer_is_disconnected(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], close: tuple[str, ...]
) -> None:
    """This holds also if the whole answer is buffered or the deadline has ended it."""
    monkeypatch.setattr("actors.gateway.completion_handler.DEADLINE_GRACE_S", 0.0)

    async def long(request: Request) -> AsyncGenerator[Chunk, None]:
        for _ in range(12):
            yield Chunk(("a" * 500_000,), (5,), ("",))
        yield Chunk((), (), (), "stop", stats())

    body = json.dumps({"model": MODEL, "prompt": "x", **fields}).encode()
    scripted = Scripted(long)
    with serving(scripted) as gateway, connected(gateway, 4096) as connection:
        connection.sendall(
            head(
                "POST",
                COMPLETIONS,
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
                *close,
            )
            + body
        )
        gateway.eventually(lambda: bool(scripted.asked))
        gateway.eventually(lambda: not gateway.connections())
        gateway.eventually(gateway.free)


# Clients that close their side


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "later"])
def test_a_half_closed_client_gets_its_answer(waits: bool) -> None:
    gate = Gate()
    scripted = Scripted(gate.speak)
    body = json.dumps({"model": MODEL, "prompt": "x"}).encode()
    sent = (
        head("POST", COMPLETIONS, "Content-Type: application/json", f"Content-Length: {len(body)}")
        + body
    )
    with serving(scripted) as gateway, connected(gateway) as connection:
        if not waits:
            let(gateway, gate)
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        gateway.eventually(
            lambda: any(found.half_closed for found in gateway.connections()) or not waits
        )
        if waits:
            assert connection.recv(100, socket.MSG_PEEK).startswith(
                b"HTTP/1.1 100 "
            )  # the probe for a client
            let(gateway, gate)
        status, _, text = answer(connection)
        assert (status, json.loads(text)["choices"][0]["text"]) == (200, "ab")
        assert ends(connection)
        gateway.eventually(lambda: not gateway.connections())


def test_all_requests_before_a_half_close_are_answered(gateway: Running) -> None:
    with connected(gateway) as connection:
        connection.sendall(head("GET", "/health") * 3)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while data := connection.recv(65536):
            found += data
        assert found.count(b"200 OK") == 3


# Many connections


def test_the_longest_idle_connection_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit of four, ten silent connections neither shut others out nor end a served one."""
    monkeypatch.setattr("actors.gateway.server.MAX_CONNECTIONS", 4)
    gate = Gate()
    scripted = Scripted(gate.speak)
    with (
        serving(scripted) as gateway,
        gateway.openai() as client,
        ThreadPoolExecutor(1) as pool,
        contextlib.ExitStack() as stack,
    ):
        served = pool.submit(client.completions.create, model=MODEL, prompt="x")
        gateway.eventually(lambda: scripted.open == 1)
        silent: list[socket.socket] = []
        for _ in range(10):
            with gateway.http() as other:
                gateway.eventually(
                    lambda: len(gateway.connections()) < 4 or bool(gateway.server.table.waiting)
                )
                assert other.get("/health").status_code == 200
            silent.append(stack.enter_context(connected(gateway)))
        assert ends(silent[0])
        assert len(gateway.connections()) <= 5
        let(gateway, gate)
        assert served.result().choices[0].text == "ab"


def test_a_full_gateway_refuses_another_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.gateway.server.MAX_CONNECTIONS", 1)
    gate = Gate()
    scripted = Scripted(gate.speak)
    with serving(scripted) as gateway, gateway.openai() as client, ThreadPoolExecutor(1) as pool:
        served = pool.submit(client.completions.create, model=MODEL, prompt="x")
        gateway.eventually(lambda: scripted.open == 1)
        with connected(gateway) as connection:
            connection.sendall(head("GET", "/health"))
            status, first, body = answer(connection)
            assert (status, json.loads(body)["error"]["code"]) == (503, "overloaded")
            assert b"retry-after: 1" in first
            assert ends(connection)
        let(gateway, gate)
        assert served.result().choices[0].text == "ab"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    folder = tmp_path_factory.mktemp("tls")
    authority = CertificateAuthority("outrider", datetime.datetime.now(datetime.UTC), 1)
    site = authority.https_server(["localhost", "127.0.0.1"])
    for name, data in {
        "ca": authority.certificate,
        "cert": site.certificate,
        "key": site.key,
    }.items():
        (folder / name).write_bytes(data)
    return TlsConfig(ca=folder / "ca", cert=folder / "cert", key=folder / "key")


def test_an_unfinished_tls_handshake_counts_as_a_connection_and_times_out(
    secured: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Scripted(never), config=GatewayConfig(port=0, tls=secured)) as gateway:
        with connected(gateway) as silent, connected(gateway) as halfway:
            halfway.sendall(b"\x16\x03\x01\x02\x00\x01\x00")
            gateway.eventually(lambda: len(gateway.connections()) == 2)
            monkeypatch.setattr(limits, "BODY_TIMEOUT_S", SOON)
            assert ends(silent)
            assert ends(halfway)
        with connected(gateway) as plain:
            plain.sendall(head("GET", "/health"))
            assert ends(plain)
        gateway.eventually(lambda: not gateway.connections())
        monkeypatch.setattr(limits, "BODY_TIMEOUT_S", HANG_S)
        trusted = ssl.create_default_context(cafile=str(secured.ca))
        with (
            connected(gateway) as connection,
            trusted.wrap_socket(connection, server_hostname="localhost") as shaken,
        ):
            for sent in (head("GET", "/health"), head("POST", COMPLETIONS, FRAMES[0])):
                shaken.sendall(sent)
                assert answer(shaken)[0] in (200, 415)
        gateway.eventually(lambda: not gateway.connections())
