"""Parses and writes the lines of batch files, in OpenAI's format.

Input lines are {"custom_id", "method": "POST", "url", "body"}; output lines are {"id", "custom_id",
"response", "error"}.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from actors.openai.errors import sanitize, to_api_error
from actors.openai.json_body import parse_json
from actors.openai.protocol import BODY_TYPES
from runtime.core import limits
from runtime.core.errors import InvalidRequest

FIELDS = {"custom_id", "method", "url", "body"}
SEED_BYTES = 6  # JSON readers represent 48-bit integers exactly
DIGEST_BYTES = 16
LINE_PREFIX = b'{"id": "batch_req_'  # starts every line of an output


@dataclass(frozen=True, slots=True)
class Item:
    """A request.

    body  as in the file, with a seed (see `parse_item`); the gateway's functions validate it
    key   identifies the item among all items of all jobs, also after a restart of its job
    """

    line: int
    custom_id: str
    url: str
    body: dict[str, Any]
    key: str


@dataclass(frozen=True, slots=True)
class InvalidItem:
    """An item that is not a valid request. Its answer is the error, and nothing is asked."""

    line: int
    custom_id: str
    error: InvalidRequest


@dataclass(frozen=True, slots=True)
class Answer:
    """The response of a gateway over HTTP."""

    status: int
    body: dict[str, Any]
    request_id: str = ""

    @property
    def tokens(self) -> int:
        """The number of generated tokens."""
        usage = self.body.get("usage")
        count = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return count if isinstance(count, int) else 0


def parse_custom_id(line: int, raw: bytes) -> str:
    """Returns the custom_id of a line. Raises InvalidRequest if it has none."""
    return _checked_custom_id(line, _parse_object(line, raw))


def parse_item(line: int, raw: bytes, job: str) -> Item | InvalidItem:
    """Returns the item on a line. Raises InvalidRequest as `parse_custom_id`.

    An item without a seed gets one, derived from the job's ID and its custom_id.
    """
    found = _parse_object(line, raw)
    name = _checked_custom_id(line, found)
    try:
        body = _checked_body(found)
    except InvalidRequest as error:
        return InvalidItem(line, name, error)
    if body.get("seed") is None:
        body["seed"] = item_seed(job, name)
    return Item(line, name, found["url"], body, item_key(job, name))


def item_seed(job: str, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{job}\n{name}".encode()).digest()[:SEED_BYTES])


def item_key(job: str, name: str) -> str:
    return hashlib.sha256(f"{job}\n{name}".encode()).hexdigest()[:24]


def line_digest(raw: bytes) -> bytes:
    """Returns a digest that shows whether a line has changed."""
    return hashlib.sha256(raw).digest()[:DIGEST_BYTES]


def error_answer(error: InvalidRequest) -> Answer:
    """Returns the answer to an invalid request."""
    found = to_api_error(error)
    return Answer(found.status, found.body())


def output_line(job: str, name: str, answer: Answer) -> bytes:
    """Returns a line of the output, in ASCII, so that no character inside can end the line."""
    response = {"status_code": answer.status, "request_id": answer.request_id, "body": answer.body}
    found = {
        "id": f"batch_req_{item_key(job, name)}",
        "custom_id": name,
        "response": response,
        "error": None,
    }
    return json.dumps(found).encode() + b"\n"


def parse_output_line(raw: bytes) -> tuple[str, Answer]:
    """Returns the custom_id and the answer. Raises InvalidRequest if the line was changed."""
    try:
        found = json.loads(raw)
        response = found["response"]
        name, status, body = found["custom_id"], response["status_code"], response["body"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"invalid output line {sanitize(repr(raw))}: restore the output as the job left it",
            "o",
        ) from error
    return name, Answer(status, body, response.get("request_id", ""))


def _parse_object(line: int, raw: bytes) -> dict[str, Any]:
    try:
        return parse_json(raw)
    except InvalidRequest as error:
        raise InvalidRequest(f"line {line}: {error}", "line") from error


def _checked_custom_id(line: int, found: dict[str, Any]) -> str:
    name = found.get("custom_id")
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= limits.NAME_LENGTH
        or not name.isprintable()
    ):
        given = "no custom_id" if name is None else f"custom_id {sanitize(json.dumps(name))}"
        raise InvalidRequest(
            f"line {line} has {given}: give a printable string of 1 to {limits.NAME_LENGTH} "
            "characters",
            "custom_id",
        )
    return name


def _checked_body(found: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(found.keys() - FIELDS)
    if unknown:
        raise InvalidRequest(
            f"unknown field {sanitize(unknown[0])!r}: an item has custom_id, method, url and body",
            "line",
        )
    for field, allowed in (("method", ("POST",)), ("url", tuple(BODY_TYPES))):
        if found.get(field) not in allowed:
            given = (
                "is missing"
                if field not in found
                else f"{sanitize(json.dumps(found[field]))} is not allowed"
            )
            raise InvalidRequest(f"{field} {given}: give {' or '.join(allowed)}", field)
    body = found.get("body")
    if not isinstance(body, dict):
        raise InvalidRequest(
            "body is missing or not an object: give the body of the request", "body"
        )
    if body.get("stream"):
        raise InvalidRequest("stream is not supported in a batch: omit it", "stream")
    return body
