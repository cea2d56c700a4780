"""Speaks HTTP over a raw socket to a gateway."""

import contextlib
import socket

from tests.support.gateway import Running
from tests.support.harness import HANG_S

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KEY, OTHER_KEY = "a-key-for-all-models", "a-key-for-another-one"


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
