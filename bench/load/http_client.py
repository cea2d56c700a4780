"""A cheap client for the gateway: plain HTTP/1.1 over a socket, one connection per request."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.chaos.clients import ReferenceCase

HOST = "127.0.0.1"
URL = "/v1/completions"


@dataclass(slots=True)
class Reply:
    """The reply to one request. Times are the event loop's.

    sent         when the request was sent
    reason       OpenAI's finish reason, or the code of the error that ended the stream
    piece_times  when each piece of text arrived
    ended        when the connection ended
    """

    sent: float
    status: int = 0
    text: str = ""
    reason: str = ""
    piece_times: list[float] = field(default_factory=list)
    ended: float = 0.0

    def is_correct(self, case: ReferenceCase) -> bool:
        """Check the reply against plain decoding."""
        return (self.status, self.text, self.reason) == (
            200,
            case.expected.text,
            case.expected.reason,
        )


def completion_body(model: str, case: ReferenceCase, **fields: Any) -> dict[str, Any]:
    sampling = case.sampling
    asked = {
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "max_tokens": sampling.max_tokens,
        "ignore_eos": True,
    }
    return {"model": model, "prompt": list(case.prompt), "stream": True, **asked, **fields}


def http_request(value: dict[str, Any]) -> bytes:
    data = json.dumps(value).encode()
    head = (
        f"POST {URL} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\nContent-Type: "
        f"application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def ask(port: int, data: bytes) -> Reply:
    """Read a stream to its end, or the refusal; status 0 means that the connection was lost."""
    now = asyncio.get_running_loop().time
    reply = Reply(sent=now())
    try:
        async with connection(port) as (reader, writer):
            writer.write(data)
            status = int((await reader.readline()).split()[1])
            while line := await reader.readline():
                if line.startswith(b"data: {"):  # each event is one line of one chunk
                    add_event(reply, json.loads(line.removeprefix(b"data: ")), now())
            reply.status = status
    except (OSError, LookupError) as error:
        reply.reason = type(error).__name__
    reply.ended = now()
    return reply


def add_event(reply: Reply, event: dict[str, Any], at: float) -> None:
    if "error" in event:
        reply.reason = event["error"]["code"]
    for choice in event.get("choices", ()):
        reply.text += choice["text"]
        reply.reason = choice["finish_reason"] or reply.reason
        if choice["text"]:
            reply.piece_times.append(at)
