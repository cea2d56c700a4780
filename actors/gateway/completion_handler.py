"""One request for text, from its body to the last byte of its answer. What it holds is freed here, whatever happens."""

import asyncio
import hashlib
import re
import secrets
import time
import uuid
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from actors.gateway.api_keys import Key
from actors.gateway.concurrency_limiter import Entry
from actors.gateway.idempotency import sane
from actors.gateway.metrics import GONE, Watch
from actors.gateway.state import Service, now
from actors.gateway.streams import DONE, Pieces, attended, encoded, merged, sse
from actors.openai.errors import Refused, refused
from actors.openai.json_body import ClientGone, parse, read_body
from actors.openai.protocol import AnyBody, read
from actors.openai.request_adapter import requests
from actors.openai.response_builder import Answer
from runtime.core import limits
from runtime.core.errors import InvalidRequest, OutriderError
from runtime.core.messages import Request

GRACE_SECONDS = 5.0  # beyond its deadline for the end of an answer: a target says itself that it is late; a client that does not read is cut
EVENTS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that can be served. Times are the event loop's."""

    body: AnyBody
    requests: list[Request]
    arrived: float
    until: float

    @property
    def longest(self) -> int:
        """The choice with the longest text: a target that takes it takes the others."""
        return max(range(len(self.requests)), key=lambda index: len(self.requests[index].prompt))


class Exchange(Response):
    """The answer to a request to `url`, found out while it is sent."""

    def __init__(self, service: Service, url: str) -> None:
        super().__init__()
        self.service, self.url = service, url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, key = Headers(scope=scope), scope["state"]["key"]
        speaker = Speaker(send)
        try:
            with self.service.ledger.enter(None if key is None else key.name) as entry:
                arrived = now()
                raw = await read_body(headers, receive)
                asked = await self._asked(raw, headers, key, arrived)
                self.service.ledger.widen(entry, len(asked.requests))
                speaker.stream = asked.body.stream
                pieces = self._shared(asked, headers, key, raw, entry)
                await attended(receive, speaker.say(pieces), asked.until + GRACE_SECONDS)
        except ClientGone:
            self.service.meter.answered(self.url, GONE)
        except TimeoutError:
            late = Refused(
                504,
                "deadline_exceeded",
                "the deadline has passed: allow more time, or ask for less",
            )
            await speaker.refuse(late)
        except OutriderError as error:
            await speaker.refuse(refused(error))

    async def _asked(self, raw: bytes, headers: Headers, key: Key | None, arrived: float) -> Asked:
        """Raises InvalidRequest."""
        body, ignored = await asyncio.to_thread(
            lambda: read(self.url, parse(raw), self.service.limits.strict)
        )
        self.service.meter.ignored.inc(len(ignored))
        self.service.check_model(body.model, key)
        seconds = (
            deadline(headers.get("x-request-timeout"), body.timeout)
            or self.service.limits.request_seconds
        )
        name, seed = uuid.uuid4().hex, secrets.randbits(63)
        if (
            repeated := headers.get("idempotency-key")
        ) is not None:  # should it be run again after all, its text will be the same
            seed = int.from_bytes(
                hashlib.sha256(f"{key and key.name}\n{repeated}".encode()).digest()[:8], signed=True
            )
        left = max(arrived + seconds - now(), 0.001)
        found = await asyncio.to_thread(requests, body, self.service.served, name, seed, left)
        return Asked(body, found, arrived, arrived + seconds)

    def _shared(
        self, asked: Asked, headers: Headers, key: Key | None, raw: bytes, entry: Entry
    ) -> Pieces:
        """The answer; that of an earlier request where both have one Idempotency-Key."""
        repeated = headers.get("idempotency-key")
        if repeated is None:
            return self._pieces(asked, entry)
        digest = hashlib.sha256(self.url.encode() + b"\n" + raw).digest()
        return self.service.replays.share(
            (None if key is None else key.name, sane(repeated)),
            digest,
            lambda: self._pieces(asked, entry),
        )

    async def _pieces(self, asked: Asked, entry: Entry) -> Pieces:
        """The body of the answer: all in one, or events. Nothing comes before a target has taken the request. Raises OutriderError."""
        answer = Answer(
            asked.body, self.service.served, asked.requests, uuid.uuid4().hex, int(time.time())
        )
        watch = Watch(self.service.meter, asked.requests, asked.body.n, asked.arrived, now)
        held: bytes | None = (
            b"".join(map(sse, answer.opening())) if asked.body.stream else b""
        )  # None: nothing is held back any more
        try:
            async with aclosing(merged(self.service.body, asked.requests)) as chunks:
                async for index, chunk in chunks:
                    watch.saw(index, chunk)
                    entry.speaks = True
                    if not asked.body.stream:
                        answer.add(index, chunk)
                        continue
                    events = b"".join(map(sse, answer.delta(index, chunk)))
                    if held is None:
                        if events:
                            yield events
                    elif index == asked.longest:
                        yield held + events
                        held = None
                    else:
                        held += events
        except OutriderError as error:
            if not any(watch.counts):
                watch.open = 0  # refused: there was nothing to end
            if isinstance(error, InvalidRequest) or now() < asked.until:
                raise
            raise answer.late() from error
        finally:
            watch.left()
        self.service.ledger.leave(entry)  # before the client can know that it may ask again
        yield DONE if asked.body.stream else encoded(answer.whole())


class Speaker:
    """Sends one answer. `stream`: as events, each at once."""

    def __init__(self, send: Send) -> None:
        self.send, self.stream, self.begun = send, False, False

    async def say(self, pieces: Pieces) -> None:
        """Raises what ends the pieces, where nothing was sent yet; else the client hears of it in the stream."""
        async with aclosing(pieces):
            try:
                async for piece in pieces:
                    await (self._event(piece) if self.stream else self.answer(200, {}, piece))
            except OutriderError as error:
                if not self.begun:
                    raise
                await self._event(sse(refused(error).body()) + DONE)
        if self.stream:
            await self.send({"type": "http.response.body", "body": b""})

    async def refuse(
        self, error: Refused, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Sends nothing after the begin of another answer."""
        if not self.begun:
            await self.answer(error.status, {**error.headers, **headers}, encoded(error.body()))

    async def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """All at once."""
        await self._begin(
            status, {"content-type": "application/json", "content-length": str(len(body))} | headers
        )
        await self.send({"type": "http.response.body", "body": body})

    async def _event(self, data: bytes) -> None:
        if not self.begun:
            await self._begin(200, EVENTS)
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.begun = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})


def deadline(header: str | None, field: Any) -> float | None:
    """Seconds, as the header or the body's field says; the shorter of both. Raises Refused (400)."""
    if header is not None and (
        not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", header)
        or not 0 < float(header) <= limits.DEADLINE
    ):
        raise Refused(
            400,
            "invalid_value",
            f"X-Request-Timeout is not allowed: give seconds up to {limits.DEADLINE:g}",
            "X-Request-Timeout",
        )
    return min(
        (
            seconds
            for seconds in (None if header is None else float(header), field)
            if seconds is not None
        ),
        default=None,
    )
