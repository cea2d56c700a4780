"""Handles one completion request, from its body to the last byte of its response.

Everything that it holds is released here, whatever happens.
"""

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

from actors.gateway.api_keys import ApiKey
from actors.gateway.concurrency_limiter import ActiveRequest
from actors.gateway.idempotency import check_key
from actors.gateway.metrics import CLIENT_CLOSED, RequestTimer
from actors.gateway.state import Service, now
from actors.gateway.streams import DONE, Pieces, merge_chunks, run_until_disconnect, sse, to_json
from actors.openai.echo import Echo, build_echoes
from actors.openai.errors import ApiError, to_api_error
from actors.openai.json_body import ClientDisconnected, parse_json, read_body
from actors.openai.protocol import AnyBody, CompletionBody, parse_body
from actors.openai.request_adapter import build_requests
from actors.openai.response_builder import ResponseBuilder
from runtime.core import limits
from runtime.core.errors import InvalidRequest, OutriderError
from runtime.core.messages import Chunk, Request

# A target ends a late session itself. This grace period ends responses that a client does not read.
DEADLINE_GRACE_S = 5.0
EVENT_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A valid request. Times are the event loop's."""

    body: AnyBody
    requests: list[Request]
    echoes: list[Echo]
    arrived: float
    until: float

    @property
    def longest(self) -> int:
        """Returns the index of the longest prompt: a target that accepts it accepts the others."""
        return max(range(len(self.requests)), key=lambda index: len(self.requests[index].prompt))

    @property
    def logprobs(self) -> int:
        """Returns the number of log-probabilities that the outputs may have."""
        asked = (request.sampling for request in self.requests)
        return sum(
            sampling.max_tokens * (1 + sampling.logprobs)
            for sampling in asked
            if sampling.logprobs is not None
        )


class CompletionHandler(Response):
    """The response to a request to `url`, generated while it is sent."""

    def __init__(self, service: Service, url: str) -> None:
        super().__init__()
        self.service, self.url = service, url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, key = Headers(scope=scope), scope["state"]["key"]
        writer = ResponseWriter(send)
        try:
            with self.service.limiter.admit(None if key is None else key.name) as entry:
                arrived = now()
                raw = await read_body(headers, receive)
                parsed = await self._parse(raw, headers, key, arrived)
                self.service.limiter.resize(entry, len(parsed.requests), parsed.logprobs)
                writer.stream = parsed.body.stream
                pieces = self._deduplicated(parsed, headers, key, raw, entry)
                await run_until_disconnect(
                    receive, writer.write(pieces), parsed.until + DEADLINE_GRACE_S
                )
        except ClientDisconnected:
            self.service.metrics.answered(self.url, CLIENT_CLOSED)
        except TimeoutError:
            late = ApiError(
                504,
                "deadline_exceeded",
                "the deadline has passed: allow more time, or ask for less",
            )
            await writer.write_error(late)
        except OutriderError as error:
            await writer.write_error(to_api_error(error))

    async def _parse(
        self, raw: bytes, headers: Headers, key: ApiKey | None, arrived: float
    ) -> ParsedRequest:
        """Parses the request. Raises InvalidRequest."""
        body, ignored = await asyncio.to_thread(
            lambda: parse_body(self.url, parse_json(raw), self.service.limits.strict)
        )
        self.service.metrics.ignored.inc(len(ignored))
        self.service.check_model(body.model, key)
        seconds = (
            request_timeout_s(headers.get("x-request-timeout"), body.timeout)
            or self.service.limits.request_seconds
        )
        name, seed = uuid.uuid4().hex, secrets.randbits(63)
        if (
            repeated := headers.get("idempotency-key")
        ) is not None:  # the same key gives the same text, even if the response is not cached
            seed = int.from_bytes(
                hashlib.sha256(f"{key and key.name}\n{repeated}".encode()).digest()[:8], signed=True
            )
        left = max(arrived + seconds - now(), 0.001)
        found = await asyncio.to_thread(
            build_requests, body, self.service.served, name, seed, left, self.service.limits
        )
        echoes = (
            await asyncio.to_thread(build_echoes, body, self.service.served, found)
            if isinstance(body, CompletionBody) and body.echo
            else []
        )
        return ParsedRequest(body, found, echoes, arrived, arrived + seconds)

    def _deduplicated(
        self,
        parsed: ParsedRequest,
        headers: Headers,
        key: ApiKey | None,
        raw: bytes,
        entry: ActiveRequest,
    ) -> Pieces:
        """Returns the response body, shared with earlier requests that have the same
        Idempotency-Key.
        """
        repeated = headers.get("idempotency-key")
        if repeated is None:
            return self._pieces(parsed, entry)
        digest = hashlib.sha256(self.url.encode() + b"\n" + raw).digest()
        return self.service.idempotency.share(
            (None if key is None else key.name, check_key(repeated)),
            digest,
            lambda: self._pieces(parsed, entry),
        )

    async def _pieces(self, parsed: ParsedRequest, entry: ActiveRequest) -> Pieces:
        """Yields the response body: all at once, or as events. Raises OutriderError.

        Nothing is yielded before a target has accepted the request.
        """
        answer = ResponseBuilder(
            parsed.body,
            self.service.served,
            parsed.requests,
            uuid.uuid4().hex,
            int(time.time()),
            parsed.echoes,
        )
        timer = RequestTimer(
            self.service.metrics, parsed.requests, parsed.body.n, parsed.arrived, now
        )
        held: bytes | None = (
            b"".join(map(sse, answer.opening_events())) if parsed.body.stream else b""
        )  # None once nothing is held back
        try:
            async with aclosing(merge_chunks(self.service.backend, parsed.requests)) as chunks:
                async for index, chunk in chunks:
                    timer.on_chunk(index, chunk)
                    entry.has_token = True
                    if not parsed.body.stream:
                        answer.add(index, chunk)
                        continue
                    events = (
                        await asyncio.to_thread(sse_events, answer, index, chunk)
                        if chunk.prompt_logprobs
                        else sse_events(answer, index, chunk)
                    )
                    if held is None:
                        if events:
                            yield events
                    elif index == parsed.longest:
                        yield held + events
                        held = None
                    else:
                        held += events
        except OutriderError as error:
            if not any(timer.counts):
                timer.open = 0  # refused: no generation has started
            if isinstance(error, InvalidRequest) or now() < parsed.until:
                raise
            raise answer.deadline_error() from error
        finally:
            timer.abort_unfinished()
        self.service.limiter.release(
            entry
        )  # before the client sees the end and may send its next request
        if parsed.body.stream:
            yield DONE
        elif parsed.echoes or parsed.logprobs:  # many take seconds
            yield await asyncio.to_thread(lambda: to_json(answer.response()))
        else:
            yield to_json(answer.response())


class ResponseWriter:
    """Sends one response. With `stream`, each piece is sent at once, as an event."""

    def __init__(self, send: Send) -> None:
        self.send, self.stream, self.started = send, False, False

    async def write(self, pieces: Pieces) -> None:
        """Sends the pieces.

        Raises their error if nothing was sent yet; otherwise the error is sent as an event.
        """
        async with aclosing(pieces):
            try:
                async for piece in pieces:
                    await (
                        self._write_event(piece) if self.stream else self.write_all(200, {}, piece)
                    )
            except OutriderError as error:
                if not self.started:
                    raise
                await self._write_event(sse(to_api_error(error).body()) + DONE)
        if self.stream:
            await self.send({"type": "http.response.body", "body": b""})

    async def write_error(
        self, error: ApiError, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Sends an error, unless a response has started."""
        if not self.started:
            await self.write_all(error.status, {**error.headers, **headers}, to_json(error.body()))

    async def write_all(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Sends a complete response."""
        await self._start(
            status, {"content-type": "application/json", "content-length": str(len(body))} | headers
        )
        await self.send({"type": "http.response.body", "body": body})

    async def _write_event(self, data: bytes) -> None:
        if not self.started:
            await self._start(200, EVENT_STREAM_HEADERS)
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.started = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})


def sse_events(answer: ResponseBuilder, index: int, chunk: Chunk) -> bytes:
    return b"".join(map(sse, answer.delta(index, chunk)))


def request_timeout_s(header: str | None, field: Any) -> float | None:
    """Returns the shorter of the timeouts of header and body, in seconds. Raises ApiError (400)."""
    if header is not None and (
        not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", header)
        or not 0 < float(header) <= limits.MAX_DEADLINE_S
    ):
        raise ApiError(
            400,
            "invalid_value",
            f"X-Request-Timeout is not allowed: give seconds up to {limits.MAX_DEADLINE_S:g}",
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
