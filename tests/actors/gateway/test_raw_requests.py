"""Heads and bodies sent byte by byte: limits of size and time."""

import json
import time
from collections.abc import Callable

import pytest

from runtime.core import limits
from tests.support.gateway import Running
from tests.support.raw_http import COMPLETIONS, KEY, connected, head


def talk(gateway: Running, *sent: bytes | Callable[[], None]) -> bytes:
    """Sends the data, calls the functions between, and returns the bytes up to the end.

    The server may close the connection before all is sent.
    """
    with connected(gateway) as connection:
        try:
            for data in sent:
                connection.sendall(data) if isinstance(data, bytes) else data()
        except (BrokenPipeError, ConnectionResetError):
            pass
        found = b""
        try:
            while data := connection.recv(65536):
                found += data
        except ConnectionResetError:
            pass
        return found


def post(*lines: str, path: str = COMPLETIONS) -> bytes:
    """Returns the head of a request after which the server closes the connection."""
    return head("POST", path, "Content-Type: application/json", "Connection: close", *lines)


BODY = json.dumps({"model": "unknown", "prompt": "import os"}).encode()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (post(f"Content-Length: {len(BODY)}") + BODY, {404}),  # a valid request passes
        (
            post(f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked")
            + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
            {400},
        ),
        (post(f"Content-Length: {len(BODY)}", "Content-Length: 5") + BODY, {400}),
        (post(f"Content-Length: {len(BODY)}", "Host: b") + BODY, {400}),
        (post("Content-Length: -5"), {400}),
        (post("Transfer-Encoding: gzip, chunked"), {400, 501}),
        (post("X-A: a\r\n b", f"Content-Length: {len(BODY)}") + BODY, {400, 404}),
        (post("X-A: a\0b"), {400}),
        (post("X-A : b"), {400}),
        (post(f"X-A: {'a' * (17 << 10)}"), {400, 431}),
        (post(*(f"X-{number}: a" for number in range(101))), {431}),
        (post(path="/" + "a" * (17 << 10)), {400, 431}),
        (b"GET / HTTP/1.1\r\n\r\n", {400}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), {400}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 401, 404, 505}),
    ],
    ids=lambda value: None if isinstance(value, set) else repr(value[-40:]),
)
def test_malformed_heads_are_refused(gateway: Running, sent: bytes, statuses: set[int]) -> None:
    assert status_of(talk(gateway, sent)) in statuses


def test_a_declared_length_over_the_limit_is_refused_unread(gateway: Running) -> None:
    assert status_of(talk(gateway, post(f"Content-Length: {limits.BODY_BYTES + 1}"))) == 413
    assert status_of(talk(gateway, post(f"Content-Length: {'9' * 30}"))) in (400, 413)


def test_a_body_without_an_end_is_read_to_the_limit(gateway: Running) -> None:
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = talk(
        gateway, post("Transfer-Encoding: chunked"), *[piece] * (limits.BODY_BYTES // 0x10000 + 40)
    )
    assert status_of(answer) == 413
    gateway.eventually(gateway.free)
    with gateway.http() as client:
        assert (
            'outrider:http_responses_total{code="413"'
            in client.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).text
        )


def test_a_body_or_head_that_never_arrives_times_out(
    gateway: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", 1.0)
    answer = talk(gateway, post("Content-Length: 100") + b"{")
    assert status_of(answer) == 408
    assert b"connection: close" in answer.lower()
    assert talk(gateway, b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-") == b""
    assert talk(gateway) == b""
    gateway.eventually(gateway.free)


def test_a_trickling_head_is_cut_off_but_a_reused_connection_is_not(
    gateway: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four requests take more time together than one head may take."""
    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", 0.3)

    def pause() -> None:
        time.sleep(0.1)

    def rest() -> None:
        time.sleep(0.9)

    trickle = [
        step
        for letter in b"GET /health HTTP/1.1\r\nHost: a\r\n"
        for step in (bytes([letter]), pause)
    ]
    assert talk(gateway, *trickle) == b""
    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", 2.0)
    whole = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    assert talk(gateway, whole, rest, whole, rest, whole, rest, last).count(b"200 OK") == 4
