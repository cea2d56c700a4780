"""Reads and parses a request's body, within limits."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from itertools import chain
from typing import Any

from pydantic_core import from_json

from actors.openai.errors import ApiError
from runtime.core import limits

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

OPENERS = (b",", b"[", b"{")  # each precedes one value
INTEGERS = re.compile(rb"\[[-0-9,\s]*\]")  # a list of them: token ids, if they are of a prompt
LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (limits.JSON_NUMBER_LENGTH + 1))


class ClientDisconnected(Exception):
    """The client has closed the connection."""


async def read_body(headers: Mapping[str, str], receive: Receive) -> bytes:
    """Returns the whole body. Raises ApiError (408, 413, 415), ClientDisconnected."""
    if "content-encoding" in headers:
        raise ApiError(
            415,
            "unsupported_encoding",
            "Content-Encoding is not supported: send the body uncompressed",
        )
    if not is_json(headers.get("content-type", "")):
        raise ApiError(
            415, "unsupported_media_type", "Content-Type is not JSON: send application/json"
        )
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18 or int(length) > limits.BODY_BYTES:
        raise too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(limits.BODY_TIMEOUT_S):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                body += message.get("body", b"")
                if len(body) > limits.BODY_BYTES:
                    raise too_large()
                more = message.get("more_body", False)
    except TimeoutError as error:
        raise ApiError(
            408,
            "body_timeout",
            f"the body did not arrive within {limits.BODY_TIMEOUT_S:g} s: send it faster",
        ) from error
    return bytes(body)


def too_large() -> ApiError:
    return ApiError(
        413, "body_too_large", f"the body is larger than {limits.BODY_BYTES >> 20} MiB: send less"
    )


def is_json(content_type: str) -> bool:
    """Tells whether the type is application/json with no charset but UTF-8."""
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    return kind == "application/json" and all(
        not parameter or parameter.replace('"', "") in ("charset=utf-8", "charset=utf8")
        for parameter in parameters
    )


def parse_json(body: bytes) -> dict[str, Any]:
    """Returns the JSON object in the body. Raises ApiError: invalid_json, too_complex.

    Values and digits are counted before anything is built; lists of integers have a limit of their
    own.
    """
    bare = without_strings(body)
    values = sum(map(bare.count, OPENERS))
    if values > limits.JSON_VALUES:
        integers = sum(found.group().count(b",") for found in INTEGERS.finditer(bare))
        if integers > limits.PROMPT_IDS:
            raise too_complex(f"there are more than {limits.PROMPT_IDS} token ids")
        if values - integers > limits.JSON_VALUES:
            raise too_complex(f"there are more than {limits.JSON_VALUES} values")
    if LONG_NUMBER.search(bare):
        raise too_complex(f"a number has more than {limits.JSON_NUMBER_LENGTH} digits")
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        if str(error).startswith("recursion limit"):
            raise too_deep() from error
        raise invalid_json(str(error)) from error
    if not isinstance(value, dict):
        raise invalid_json("it is not an object")
    if count_members(value) != bare.count(b":"):
        raise invalid_json("an object has a duplicate key")
    return value


def without_strings(body: bytes) -> bytes:
    """Returns the body with a mark in place of each string.

    Raises ApiError (too_complex) for too many strings.
    """
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') > 4 * limits.JSON_VALUES:  # each value may be a string, and have a key
        raise too_complex(f"there are more than {2 * limits.JSON_VALUES} strings")
    return b'"'.join(plain.split(b'"')[::2])


def count_members(value: dict[str, Any]) -> int:
    """Returns the number of keys in all objects. Raises ApiError (too_complex)."""
    level: list[Any] = [value]  # the arrays and objects of one depth
    members = depth = 0
    while level:
        depth += 1
        if depth > limits.JSON_DEPTH:
            raise too_deep()
        if any(len(found) > limits.JSON_ITEMS and not is_integers(found) for found in level):
            raise too_complex(f"an array or object has more than {limits.JSON_ITEMS} items")
        objects = [found for found in level if isinstance(found, dict)]
        members += sum(map(len, objects))
        items = chain.from_iterable(
            found.values() if isinstance(found, dict) else found for found in level
        )
        level = [item for item in items if isinstance(item, dict | list)]
    return members


def is_integers(value: Any) -> bool:
    """Tells whether the value is a list of integers alone."""
    return isinstance(value, list) and set(map(type, value)) == {int}


def invalid_json(why: str) -> ApiError:
    return ApiError(400, "invalid_json", f"the body is invalid JSON: {why}")


def too_complex(why: str) -> ApiError:
    return ApiError(400, "too_complex", f"the body is too complex: {why}")


def too_deep() -> ApiError:
    return too_complex(f"arrays and objects are nested deeper than {limits.JSON_DEPTH} levels")
