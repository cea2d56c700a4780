"""How the body of a request is read: its headers, its size, its time, its JSON."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import pytest

from actors.openai import json_body
from actors.openai.errors import ApiError
from actors.openai.json_body import ClientDisconnected, is_json, parse_json, read_body
from runtime.core import limits
from tests.support.router_harness import played

JSON = {"content-type": "application/json"}


def receiving(*messages: dict[str, Any]) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
    """Delivers these messages; after the last one nothing more comes."""
    left = list(messages)

    async def receive() -> MutableMapping[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return receive


def piece(body: bytes | None, more: bool | None = None) -> dict[str, Any]:
    message: dict[str, Any] = {"type": "http.request"}
    if body is not None:
        message["body"] = body
    return message if more is None else message | {"more_body": more}


def outcome(headers: dict[str, str], *messages: dict[str, Any]) -> bytes | tuple[int, str, str]:
    """The body, or status, code and message of its refusal."""

    async def main() -> bytes | tuple[int, str, str]:
        try:
            return await read_body(headers, receiving(*messages))
        except ApiError as refused:
            return refused.status, refused.code, str(refused)

    found: bytes | tuple[int, str, str] = played(main())
    return found


@pytest.mark.parametrize(
    ("messages", "body"),
    [
        ([piece(b"{}")], b"{}"),
        ([piece(b"{}", False), piece(b"more")], b"{}"),
        ([piece(b"{", True), piece(None, True), piece(b"}", False)], b"{}"),
        ([piece(None)], b""),
    ],
)
def test_a_body_is_all_its_pieces(messages: list[dict[str, Any]], body: bytes) -> None:
    assert outcome(JSON, *messages) == body
    assert outcome(JSON | {"content-length": str(len(body))}, *messages) == body


def test_what_is_no_plain_json_is_refused_before_it_is_read() -> None:
    assert outcome(JSON | {"content-encoding": "gzip"}) == (
        415,
        "unsupported_encoding",
        "Content-Encoding is not supported: send the body uncompressed",
    )
    for headers in ({}, {"content-type": "text/plain"}):
        assert outcome(headers) == (
            415,
            "unsupported_media_type",
            "Content-Type is not JSON: send application/json",
        )


@pytest.mark.parametrize(
    ("kind", "accepted"),
    [
        ("application/json", True),
        (" Application/JSON ; charset=UTF-8", True),
        ('application/json; charset="utf8";', True),
        ("application/json; charset=latin-1", False),
        ("application/json; charset=utf-8; version=1", False),
        ("application/jsonl", False),
        ("charset=utf-8; application/json", False),
        ("", False),
    ],
)
def test_json_is_utf_8(kind: str, accepted: bool) -> None:
    assert is_json(kind) == accepted


@pytest.mark.parametrize(
    "length",
    ["-1", "1e3", "x", "", str(limits.BODY_BYTES + 1), "0" * 18 + "1", "9" * 18, "9" * 4400],
)
def test_a_length_that_is_none_or_too_large_is_refused_before_the_body(length: str) -> None:
    assert outcome(JSON | {"content-length": length}) == (
        413,
        "body_too_large",
        "the body is larger than 4 MiB: send less",
    )


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("declared", [False, True])
def test_a_body_has_so_many_bytes_and_no_more_whatever_its_length_says(
    over: int, declared: bool
) -> None:
    half = b"x" * (limits.BODY_BYTES // 2)
    messages = [piece(half, True), piece(half + b"x" * over, True), piece(b"", False)]
    length = {"content-length": str(limits.BODY_BYTES)} if declared else {}
    found = outcome(JSON | length, *messages)
    assert (found == 2 * half) if over == 0 else (found[:2] == (413, "body_too_large"))


def test_a_body_that_does_not_arrive_ends_in_time() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(ApiError, match="did not arrive within 10 s: send it faster") as late:
            await read_body(JSON, receiving(piece(b"{", True)))
        assert (late.value.status, late.value.code) == (408, "body_timeout")
        assert loop.time() == limits.BODY_TIMEOUT_S

    played(main())


def test_a_client_that_goes_away_is_no_error_of_its_body() -> None:
    async def main() -> None:
        gone = {"type": "http.disconnect"}
        with pytest.raises(ClientDisconnected):
            await read_body(JSON, receiving(piece(b"{", True), gone))

    played(main())


def refusal(body: bytes) -> tuple[int, str, str] | None:
    try:
        parse_json(body)
    except ApiError as refused:
        return refused.status, refused.code, str(refused)
    return None


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def strings(count: int) -> bytes:
    """An object with one array of so many strings, and one key."""
    return b'{"a":[' + b",".join([b'""'] * count) + b"]}"


def test_each_limit_of_json_is_named_and_what_is_at_it_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert refusal(nested(limits.JSON_DEPTH)) is None
    deep = (400, "too_complex", "the body is too complex: arrays and objects are nested deeper")
    assert (refusal(nested(limits.JSON_DEPTH + 1)) or ("",))[:2] == deep[:2]
    assert (refusal(nested(limits.JSON_DEPTH + 1)) or ("", "", ""))[2].startswith(deep[2])
    assert (refusal(nested(100_000)) or ("", "", ""))[2].startswith(deep[2])
    number = b"1" * limits.JSON_NUMBER_LENGTH
    assert refusal(b'{"a":%s}' % number) is None
    assert refusal(b'{"a":1%s}' % number) == (
        400,
        "too_complex",
        "the body is too complex: a number has more than 64 digits",
    )
    monkeypatch.setattr(limits, "JSON_ITEMS", 3)
    assert refusal(strings(3)) is None
    assert refusal(b'{"a":1,"b":2,"c":3}') is None
    many = (400, "too_complex", "the body is too complex: an array or object has more than 3 items")
    assert refusal(strings(4)) == refusal(b'{"a":1,"b":2,"c":3,"d":4}') == many
    monkeypatch.setattr(limits, "JSON_VALUES", 6)
    values = (400, "too_complex", "the body is too complex: there are more than 6 values")
    assert refusal(b'{"a":[1,2],"b":1}') is None  # two openers and three commas, less one
    assert refusal(b'{"a":["1",2],"b":["1",2]}') is None
    assert refusal(b'{"a":["1",2],"b":["1",2],"c":1}') == values
    assert refusal(b'{"a":[1,2],"b":[1,2],"c":1}') is None  # lists of integers
    keys = b'"":"",' * 5 + b'"":""'  # 24 marks
    assert (refusal(b"{%s}" % keys) or ("", "", ""))[2].endswith("an object has a duplicate key")
    assert refusal(b'{%s,""' % keys) == (
        400,
        "too_complex",
        "the body is too complex: there are more than 12 strings",
    )


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "EOF"),
        (b"[1]", "it is not an object"),
        (b'{"a":NaN}', "expected value"),
        (b'{"a":{"b":1,"b":2}}', "an object has a duplicate key"),
        (b'{"a":[{"b":1},{"b":1,"b":1}]}', "an object has a duplicate key"),
    ],
)
def test_what_is_no_json_is_refused_with_the_reason(body: bytes, why: str) -> None:
    status, code, message = refusal(body) or (0, "", "")
    assert (status, code) == (400, "invalid_json")
    assert message.startswith("the body is invalid JSON: ")
    assert why in message


def test_what_stands_in_strings_is_no_structure() -> None:
    body = b'{"a":"[,{:\\"\\\\","b\\"{:":{"c":[{"d":1}]}}'
    assert parse_json(body) == {"a": '[,{:"\\', 'b"{:': {"c": [{"d": 1}]}}
    assert json_body.without_strings(body) == b'{":",":{":[{":1}]}}'


@pytest.mark.parametrize("ids", [[[5] * 2048] * 64, [-7] * 131_072, [[1]] * 9000 + [[2] * 95_000]])
def test_lists_of_integers_have_a_limit_of_their_own(ids: list[Any]) -> None:
    assert parse_json(json.dumps({"prompt": ids}).encode()) == {"prompt": ids}


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([5] * 10_000 + [True], "an array or object has more than 10000 items"),
        ([5] * 10_000 + [0.5], "an array or object has more than 10000 items"),
        ([5] * 10_000 + ["5"], "an array or object has more than 10000 items"),
        ({str(key): 1 for key in range(10_001)}, "an array or object has more than 10000 items"),
        ([["5"] * 9000] * 12, "more than 100000 values"),
        ([[True] * 9000] * 12, "more than 100000 values"),
        ([[5]] * 100_000, "more than 100000 values"),
        ([[5] * 1030] * 1024, "more than 1048576 token ids"),
    ],
)
def test_other_values_keep_theirs(value: Any, why: str) -> None:
    status, code, message = refusal(json.dumps({"prompt": value}).encode()) or (0, "", "")
    assert (status, code) == (400, "too_complex")
    assert why in message
