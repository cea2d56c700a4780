"""From a request to a JSON object, with every bound held before there is anything of the size that it bounds."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from actors.gateway.errors import Refused
from runtime import limits

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# Strings in one piece, so that nothing inside them is looked at; then all that nests, separates or is long. Possessive: no backtracking.
TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|["\[\]{},]|[-+.0-9eE]{2,}+', re.DOTALL)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class ClientGone(Exception):
    """Nobody is there to hear the answer."""


async def read_body(headers: Mapping[str, str], receive: Receive) -> bytes:
    """All of the body. Raises Refused (408, 413, 415), ClientGone."""
    if "content-encoding" in headers:
        raise Refused(415, "unsupported_encoding", "Content-Encoding is not supported: send the body as it is")
    if not is_json(headers.get("content-type", "")):
        raise Refused(415, "unsupported_media_type", "Content-Type is not JSON: send application/json")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18 or int(length) > limits.BODY_BYTES:
        raise too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(limits.BODY_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > limits.BODY_BYTES:
                    raise too_large()
                more = message.get("more_body", False)
    except TimeoutError as error:
        raise Refused(408, "body_timeout", f"the body has not come within {limits.BODY_SECONDS:g} s: send it faster") from error
    return bytes(body)


def too_large() -> Refused:
    return Refused(413, "body_too_large", f"the body is larger than {limits.BODY_BYTES >> 20} MiB: send less")


def is_json(content_type: str) -> bool:
    """application/json, in UTF-8 where it says so."""
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    return kind == "application/json" and all(
        not parameter or parameter.replace('"', "") in ("charset=utf-8", "charset=utf8") for parameter in parameters
    )


def parse(body: bytes) -> dict[str, Any]:
    """The object that the body says. Raises Refused: invalid_json, or too_complex before anything is built."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise invalid(f"it is not UTF-8 at byte {error.start}") from error
    check(text)
    try:
        value = json.loads(text, object_pairs_hook=distinct, parse_constant=no_constant)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise invalid("half of a surrogate pair stands alone") from error
    except json.JSONDecodeError as error:
        raise invalid(f"{error.msg} at character {error.pos}") from error
    if not isinstance(value, dict):
        raise invalid("it is not an object")
    return value


def check(text: str) -> None:
    """Raises Refused for what nests too deep, holds too much or has too long a number. What follows an error of syntax counts too."""
    counts: list[int] = []  # commas in each array or object that is open
    total = 0
    for token in TOKEN.finditer(text):
        first = text[token.start()]
        if first == '"':
            if token.end() - token.start() == 1:
                raise invalid("a string does not end")
        elif first in "[{":
            total += 1
            counts.append(1)
            if len(counts) > limits.JSON_DEPTH:
                raise too_complex(f"more than {limits.JSON_DEPTH} arrays and objects are inside each other")
        elif first in "]}":
            if not counts:
                raise invalid(f"what is closed at character {token.start()} was never opened")
            counts.pop()
        elif first == ",":
            total += 1
            if counts:
                counts[-1] += 1
                if counts[-1] > limits.JSON_ITEMS:
                    raise too_complex(f"an array or object has more than {limits.JSON_ITEMS} items")
        elif token.end() - token.start() > limits.JSON_NUMBER:
            raise too_complex(f"a number has more than {limits.JSON_NUMBER} digits")
        if total > limits.JSON_TOTAL:
            raise too_complex(f"there are more than {limits.JSON_TOTAL} values")


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise invalid("a key stands twice in one object")
    return found


def no_constant(name: str) -> None:
    raise invalid(f"{name} is no JSON number")


def invalid(why: str) -> Refused:
    return Refused(400, "invalid_json", f"the body is not JSON as it must be: {why}")


def too_complex(why: str) -> Refused:
    return Refused(400, "too_complex", f"the body is too complex: {why}")
