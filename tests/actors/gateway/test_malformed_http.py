"""Malformed and oversized HTTP gets OpenAI's error, and its connection ends."""

import json

import pytest

from tests.support.gateway import Running
from tests.support.raw_http import COMPLETIONS, KEY, answer, connected, ends, flood, head

BODY = json.dumps({"model": "other", "prompt": "x"}).encode()
JSON = "Content-Type: application/json"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (
            head("POST", COMPLETIONS, JSON, "Transfer-Encoding: chunked") + CHUNKED,
            404,
        ),  # a valid request passes
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
def test_malformed_http_gets_openais_error_and_ends_the_connection(
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
def test_a_client_that_sends_too_much_can_read_the_error(
    gateway: Running, framed: str, key: str | None
) -> None:
    """The client sends all of 5 MiB before it reads."""
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


def test_an_endless_body_is_cut_off(gateway: Running) -> None:
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with connected(gateway) as connection:
        connection.sendall(head("POST", COMPLETIONS, JSON, "Transfer-Encoding: chunked"))
        with pytest.raises(ConnectionError):
            flood(connection, piece)
