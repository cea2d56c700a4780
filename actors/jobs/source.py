"""A batch file, read as a stream: a path, or any URL that fsspec can open."""

import hashlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import fsspec

from runtime.core import limits
from runtime.core.errors import InvalidRequest

CHUNK_BYTES = 1 << 20  # bytes that are read at one time


def fingerprint(url: str) -> str:
    """SHA-256 of its bytes. Raises InvalidRequest where it cannot be read."""
    with _open(url) as file:
        return hashlib.file_digest(file, hashlib.sha256).hexdigest()  # type: ignore[arg-type]  # any readable file will do


def read_lines(
    url: str, on_chunk: Callable[[bytes], None] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Its lines that are not blank, without their ends, each with its number from 1.

    A byte-order mark at its beginning is read over. `on_chunk` is called with every piece of the file, in order.
    Raises InvalidRequest where it cannot be read, and for a line of more than limits.BODY_BYTES: such a line is never held whole.
    """
    number, rest = 0, b""
    with _open(url) as file:
        while piece := file.read(CHUNK_BYTES):
            if on_chunk is not None:
                on_chunk(piece)
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                number += 1
                yield from _checked(number, line)
            if len(rest) > limits.BODY_BYTES:
                break
    yield from _checked(number + 1, rest)


def _checked(number: int, line: bytes) -> Iterator[tuple[int, bytes]]:
    if number == 1:
        line = line.removeprefix(BOM_UTF8)
    if len(line) > limits.BODY_BYTES:
        raise InvalidRequest(
            f"line {number} is longer than {limits.BODY_BYTES} bytes: shorten or split it", "line"
        )
    if line.strip():
        yield number, line.rstrip(b"\r")


@contextmanager
def _open(url: str) -> Iterator[IO[bytes]]:
    try:
        with fsspec.open(url, "rb") as file:
            yield file
    except OSError as error:
        raise InvalidRequest(
            f"cannot read {url} ({error.strerror or error}): give a readable file", "file"
        ) from error
    except (
        ImportError,
        ValueError,
    ) as error:  # a protocol whose package is not installed, or that nobody knows
        raise InvalidRequest(
            f"cannot open {url} ({error}): give a path, or a URL that fsspec knows", "file"
        ) from error
