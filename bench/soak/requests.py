"""The requests of a soak, each with the answer of plain decoding, and how an answer is read."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bench.chaos.clients import PROMPTS, TEMPERATURES
from bench.load.http_client import HOST, connection

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
GRAMMARS: tuple[dict[str, Any], ...] = (
    {"type": "json_schema", "json_schema": {"name": "item", "schema": SCHEMA}},
    {"type": "regex", "regex": "[a-z]{3,8}(_[a-z]{2,6}){1,3}"},
)
CHOICES = 2
VARIANTS = 4  # of each kind


@dataclass(frozen=True, slots=True)
class ChoiceText:
    """A choice of an answer: what must be the same however it was decoded."""

    text: str
    tokens: tuple[str, ...]  # if logprobs were asked for
    reason: str


Said = tuple[ChoiceText, ...]


@dataclass(frozen=True, slots=True)
class SoakRequest:
    """A request of a kind, to be sent whole or streamed."""

    kind: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SoakCase:
    """A request and the answer of plain decoding."""

    request: SoakRequest
    expected: Said


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer; `said` is empty if it is an error, which `error` names."""

    status: int
    said: Said
    error: str


def build_requests(model: str, seed: int, tokens: int) -> list[SoakRequest]:
    """Return VARIANTS requests of each kind, greedy and sampled."""
    found = []
    for number in range(VARIANTS):
        prompt = PROMPTS[number % len(PROMPTS)]
        common: dict[str, Any] = {
            "model": model,
            "seed": seed + number,
            "temperature": TEMPERATURES[number % len(TEMPERATURES)],
            "max_tokens": tokens,
        }
        messages = [{"role": "user", "content": prompt}]
        form = GRAMMARS[number % len(GRAMMARS)]
        found += [
            SoakRequest("completion", COMPLETIONS, common | {"prompt": prompt}),
            SoakRequest("chat", CHAT, common | {"messages": messages}),
            SoakRequest("choices", COMPLETIONS, common | {"prompt": prompt, "n": CHOICES}),
            SoakRequest("logprobs", COMPLETIONS, common | {"prompt": prompt, "logprobs": 5}),
            SoakRequest("grammar", CHAT, common | {"messages": messages, "response_format": form}),
        ]
    return found


def plain(request: SoakRequest) -> dict[str, Any]:
    """Return the body that is answered without drafters."""
    return request.body | {"speculative": {"enabled": False}}


def http_post(url: str, body: dict[str, Any]) -> bytes:
    """Return the bytes of the request."""
    data = json.dumps(body).encode()
    head = (
        f"POST {url} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def ask(port: int, url: str, body: dict[str, Any]) -> HttpAnswer:
    """Send the request and read the whole answer; a lost connection has status 0."""
    try:
        async with connection(port) as (reader, writer):
            writer.write(http_post(url, body))
            return parse_answer(await reader.read())
    except OSError as error:
        return HttpAnswer(0, (), type(error).__name__)


def parse_answer(data: bytes) -> HttpAnswer:
    """Read an HTTP response whose body is one JSON object, or a stream of events.

    Each event is one line of one chunk, so the lines of chunked encoding are skipped.
    """
    head, _, body = data.partition(b"\r\n\r\n")
    words = head.split(maxsplit=2)
    if len(words) < 2:
        return HttpAnswer(0, (), "no answer")
    events = [
        json.loads(line.removeprefix(b"data: "))
        for line in body.splitlines()
        if line.startswith((b"data: {", b"{"))
    ]
    error = next((str(event["error"]) for event in events if "error" in event), "")
    status = int(words[1])
    return HttpAnswer(status, () if error or status != 200 else join_events(events), error)


def join_events(events: Sequence[dict[str, Any]]) -> Said:
    """Return the choices of an answer: of one object, or of a stream's events."""
    texts: dict[int, str] = {}
    tokens: dict[int, tuple[str, ...]] = {}
    reasons: dict[int, str] = {}
    for event in events:
        for choice in event.get("choices", ()):
            index = choice["index"]
            message = choice.get("message") or choice.get("delta") or {}
            text = choice.get("text") or message.get("content") or ""
            texts[index] = texts.get(index, "") + text
            logprobs = choice.get("logprobs") or {}
            tokens[index] = tokens.get(index, ()) + tuple(logprobs.get("tokens", ()))
            reasons[index] = choice.get("finish_reason") or reasons.get(index, "")
    return tuple(ChoiceText(texts[index], tokens[index], reasons[index]) for index in sorted(texts))


async def leave_early(port: int, url: str, body: dict[str, Any], after_s: float) -> None:
    """Send a request, and close the connection after this time, however far the answer is."""
    with suppress(OSError, TimeoutError):
        async with connection(port) as (reader, writer):
            writer.write(http_post(url, body))
            async with asyncio.timeout(after_s):
                await reader.read()
