"""Reads a batch file as a stream, from a path or any URL that fsspec can open."""

import hashlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import fsspec

from runtime.core import limits
from runtime.core.errors import InvalidRequest

CHUNK_BYTES = 1 << 20  # read at once


def fingerprint(url: str) -> str:
    """Returns the SHA-256 of a file as hex. Raises InvalidRequest if it cannot be read."""
    with _open(url) as file:
        # Any readable file will do.
        return hashlib.file_digest(file, hashlib.sha256).hexdigest()  # type: ignore[arg-type]


def read_lines(
    url: str, on_chunk: Callable[[bytes], None] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yields the number, from 1, and the content of each line that is not blank.

    Line ends and a byte-order mark are removed. `on_chunk` is called with every chunk of the file,
    in order. Raises InvalidRequest if the file cannot be read, or a line is longer than
    limits.BODY_BYTES; such a line is never held in memory as a whole.
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
    ) as error:  # an unknown protocol, or its package is not installed
        raise InvalidRequest(
            f"cannot open {url} ({error}): give a path, or a URL that fsspec knows", "file"
        ) from error
