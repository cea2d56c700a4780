"""No client, with a key or without one, keeps a connection open without a bound or keeps others out."""

import contextlib
import datetime
import json
import socket
import ssl
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import ValidationError

from actors.gateway.api_keys import Keys
from actors.openai.protocol import KINDS
from actors.rpc.certificate_authority import Authority
from runtime.config import GatewayConfig, LimitsConfig, TlsConfig
from runtime.core import limits
from runtime.core.messages import Chunk, Request
from tests.actors.gateway.test_life import Gate, let, stats
from tests.support.gateway import MODEL, Running, Scripted, never, serving
from tests.support.harness import HANG_S

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KEY = "a-key-for-all-models"
SOON = 0.3  # seconds, in place of the real bounds
FRAMES = ("Content-Length: 1000", "Transfer-Encoding: chunked")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"all:{KEY}\n")
    file.chmod(0o600)
    return Keys(file)


@pytest.fixture(scope="module")
def gateway(keys: Keys) -> Iterator[Running]:
    with serving(Scripted(never), keys=keys) as running:
        yield running
        running.eventually(lambda: not running.connections())


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", SOON)
    monkeypatch.setattr("actors.gateway.connection.STALL_SECONDS", SOON)
    monkeypatch.setattr("actors.gateway.connection.CLOSE_SECONDS", SOON)


def connected(gateway: Running, buffer: int | None = None) -> socket.socket:
    """Opens a connection; `buffer` bytes may wait there for the client to read them."""
    found = socket.socket()
    if buffer is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    found.settimeout(HANG_S)
    found.connect(("127.0.0.1", gateway.port()))
    return found


def flood(connection: socket.socket, data: bytes) -> None:
    """Sends until it cannot go on."""
    while True:
        connection.sendall(data)


def head(method: str, path: str, *lines: str, key: str | None = KEY, version: str = "1.1") -> bytes:
    allowed = () if key is None else (f"Authorization: Bearer {key}",)
    return "\r\n".join(
        (f"{method} {path} HTTP/{version}", "Host: a", *allowed, *lines, "", "")
    ).encode()


def answer(connection: socket.socket) -> tuple[int, bytes, bytes]:
    """Returns status, head and body of the next final answer, which has a Content-Length."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += (data := connection.recv(65536))
        assert data, found
        if found.startswith(b"HTTP/1.1 100 ") and b"\r\n\r\n" in found:
            found = found.partition(b"\r\n\r\n")[2]
    first, _, body = found.partition(b"\r\n\r\n")
    first = first.lower()
    length = int(first.partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += (data := connection.recv(65536))
        assert data
    return int(first.split(b" ")[1]), first, body


def ends(connection: socket.socket) -> bool:
    """Returns True when the server has ended the connection."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(65536):
            pass
    return True


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
def test_a_body_that_nobody_reads_ends_its_connection(gateway: Running, frame: str) -> None:
    """Whatever is asked for, with a key and without one."""
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
def test_who_sends_requests_and_reads_no_answers_is_cut(gateway: Running) -> None:
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
def test_who_does_not_read_a_long_answer_is_cut(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], close: tuple[str, ...]
) -> None:
    """It is cut as well if all of the answer is in the buffers, or its deadline has ended it."""
    monkeypatch.setattr("actors.gateway.completion_handler.GRACE_SECONDS", 0.0)

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


# Clients that end their side, and clients that are gone


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "later"])
def test_who_ends_its_side_gets_its_answer(waits: bool) -> None:
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
            )  # is anybody there?
            let(gateway, gate)
        status, _, text = answer(connection)
        assert (status, json.loads(text)["choices"][0]["text"]) == (200, "ab")
        assert ends(connection)
        gateway.eventually(lambda: not gateway.connections())


def test_requests_that_came_before_the_end_are_answered_all(gateway: Running) -> None:
    with connected(gateway) as connection:
        connection.sendall(head("GET", "/health") * 3)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while data := connection.recv(65536):
            found += data
        assert found.count(b"200 OK") == 3


# Who keeps others out


def test_who_has_waited_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten silent connections keep nobody out if four may be open, and do not end one that is served."""
    monkeypatch.setattr("actors.gateway.server.CONNECTIONS", 4)
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


def test_where_all_are_served_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.gateway.server.CONNECTIONS", 1)
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
    authority = Authority("outrider", datetime.datetime.now(datetime.UTC), 1)
    site = authority.website(["localhost", "127.0.0.1"])
    for name, data in {
        "ca": authority.certificate,
        "cert": site.certificate,
        "key": site.key,
    }.items():
        (folder / name).write_bytes(data)
    return TlsConfig(ca=folder / "ca", cert=folder / "cert", key=folder / "key")


def test_tls_that_is_never_shaken_hands_for_counts_and_ends(
    secured: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Scripted(never), config=GatewayConfig(port=0, tls=secured)) as gateway:
        with connected(gateway) as silent, connected(gateway) as halfway:
            halfway.sendall(b"\x16\x03\x01\x02\x00\x01\x00")
            gateway.eventually(lambda: len(gateway.connections()) == 2)
            monkeypatch.setattr(limits, "BODY_SECONDS", SOON)
            assert ends(silent)
            assert ends(halfway)
        with connected(gateway) as plain:
            plain.sendall(head("GET", "/health"))
            assert ends(plain)
        gateway.eventually(lambda: not gateway.connections())
        monkeypatch.setattr(limits, "BODY_SECONDS", HANG_S)
        trusted = ssl.create_default_context(cafile=str(secured.ca))
        with (
            connected(gateway) as connection,
            trusted.wrap_socket(connection, server_hostname="localhost") as shaken,
        ):
            for sent in (head("GET", "/health"), head("POST", COMPLETIONS, FRAMES[0])):
                shaken.sendall(sent)
                assert answer(shaken)[0] in (200, 415)
        gateway.eventually(lambda: not gateway.connections())


# HTTP at its edges


BODY = json.dumps({"model": "other", "prompt": "x"}).encode()
JSON = "Content-Type: application/json"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (
            head("POST", COMPLETIONS, JSON, "Transfer-Encoding: chunked") + CHUNKED,
            404,
        ),  # it is the odd ones that are refused
        (
            head(
                "POST",
                COMPLETIONS,
                JSON,
                f"Content-Length: {len(BODY)}",
                "Transfer-Encoding: chunked",
            )
            + CHUNKED,
            400,
        ),
        (
            head(
                "POST",
                COMPLETIONS,
                JSON,
                "Transfer-Encoding: chunked",
                f"Content-Length: {len(CHUNKED)}",
            )
            + CHUNKED,
            400,
        ),
        (
            head("POST", COMPLETIONS, JSON, "Transfer-Encoding: chunked", version="1.0") + CHUNKED,
            400,
        ),
        (head("POST", COMPLETIONS, JSON, "Transfer-Encoding: chunked") + b"nonsense\r\n", 400),
        (head("POST", COMPLETIONS, JSON, "Transfer-Encoding: gzip"), 501),
        (head("POST", COMPLETIONS, JSON, "Content-Length: -5"), 400),
        (head("GET", "/health", "X-A : b"), 400),
        (head("GET", "/health", f"X-A: {'a' * (17 << 10)}"), 431),
        (head("GET", "/health", f"X-A: {'a' * (4 << 20)}"), 431),
        (head("GET", "/health", *(f"X-{number}: a" for number in range(101))), 431),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"\r\n" * 100, 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400),
    ],
    ids=lambda value: repr(value[-30:]) if isinstance(value, bytes) else None,
)
def test_what_is_no_http_gets_openais_error_and_the_connection_ends(
    gateway: Running, sent: bytes, status: int
) -> None:
    with connected(gateway) as connection:
        connection.sendall(sent)
        found, first, body = answer(connection)
        assert found == status
        assert b"\r\ncontent-type: application/json" in first
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        if status not in (404, 431):  # their heads may have been read in full
            assert b"\r\nconnection: close" in first
            assert ends(connection)


@pytest.mark.parametrize("key", [KEY, None])
@pytest.mark.parametrize("framed", ["length", "chunked"])
def test_who_sends_too_much_can_read_why(gateway: Running, framed: str, key: str | None) -> None:
    """Five MiB, sent in full before the answer is looked for."""
    data = b" " * (5 << 20)
    frame = f"Content-Length: {len(data)}" if framed == "length" else "Transfer-Encoding: chunked"
    with connected(gateway) as connection:
        connection.sendall(head("POST", COMPLETIONS, JSON, frame, key=key))
        connection.sendall(
            data if framed == "length" else b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
        )
        status, _, body = answer(connection)
        expected = (401, "invalid_api_key") if key is None else (413, "body_too_large")
        assert (status, json.loads(body)["error"]["code"]) == expected
        assert ends(connection)


def test_who_sends_far_too_much_is_not_listened_to_for_ever(gateway: Running) -> None:
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with connected(gateway) as connection:
        connection.sendall(head("POST", COMPLETIONS, JSON, "Transfer-Encoding: chunked"))
        with pytest.raises(ConnectionError):
            flood(connection, piece)


WRONG: dict[str, dict[str, Any]] = {
    "lists": {"prompt": [["a"] * 9000] * 8},
    "numbers": {"prompt": [[1.5] * 9000] * 8},
    "objects": {"prompt": [{}] * 10_000},
    "late": {"prompt": [[1] * 9000] * 7 + [[1] * 8999 + ["a"]]},
    "parts": {"messages": [{"role": "user", "content": [1] * 9000}] * 8},
    "stop": {"stop": [1] * 9000},
}


@pytest.mark.parametrize("which", WRONG)
def test_a_long_list_that_is_wrong_is_left_at_its_first_error(which: str) -> None:
    """Its cost is in the errors: 72,000 of them took most of a second."""
    kind = KINDS[CHAT if which == "parts" else COMPLETIONS]
    with pytest.raises(ValidationError) as wrong:
        kind.model_validate({"model": MODEL, **WRONG[which]})
    assert wrong.value.error_count() <= 32


@pytest.mark.parametrize("strict", [True, False])
def test_unknown_fields_beyond_counting_are_refused_uncounted(strict: bool) -> None:
    message = {"role": "user", "content": "x"} | {f"field{number}": 1 for number in range(8)}
    with serving(Scripted(never), LimitsConfig(strict=strict)) as gateway, gateway.http() as client:
        reply = client.post(CHAT, json={"model": MODEL, "messages": [message] * 8000})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "too_complex")
