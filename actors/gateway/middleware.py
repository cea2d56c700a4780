"""Checks every HTTP request before it is routed.

It limits the head, checks the API key, adds an id to the response, and tells browsers which pages
may read it. A connection ends if its request's body was not read to the end.
"""

import asyncio
import re
import uuid
from collections.abc import Collection, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from actors.gateway.completion_handler import ResponseWriter
from actors.gateway.cors import cors_headers, is_preflight
from actors.gateway.state import Service, now
from actors.openai.errors import ApiError
from runtime.core import limits

REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,64}")
# Bytes of a body that are discarded until its sender reads the response.
MAX_DISCARDED_BYTES = 4 * limits.BODY_BYTES
DISCARD_TIMEOUT_S = 2.0  # for the next bytes of a discarded body

Message = MutableMapping[str, Any]


class GatewayMiddleware:
    """The middleware. `routes` are the paths that metrics name; others count as "other".

    `origins` are those of the web pages that may use the gateway.
    """

    def __init__(
        self, app: ASGIApp, service: Service, routes: frozenset[str], origins: Collection[str]
    ) -> None:
        self.app, self.service, self.routes, self.origins = app, service, routes, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, path = Headers(scope=scope), scope["path"]
        given = headers.get("x-request-id", "")
        answer_id = given if REQUEST_ID_PATTERN.fullmatch(given) else uuid.uuid4().hex
        body = BodyReader(headers, receive)
        shared = cors_headers(self.origins, scope["method"], headers)

        async def answering(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", answer_id.encode()),
                    *shared,
                ]
                if not body.whole:
                    message["headers"].append((b"connection", b"close"))
                self.service.metrics.answered(
                    path if path in self.routes else "other", message["status"]
                )
            elif not body.whole and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await body.discard()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        try:
            check_head(scope)
            if self.origins and is_preflight(scope["method"], headers):
                return await ResponseWriter(answering).write_all(200, {}, b"")
            key = self.service.authenticate(path, headers.get("authorization", ""))
        except ApiError as error:
            return await ResponseWriter(answering).write_error(error)
        scope.setdefault("state", {})["key"] = key
        return await self.app(scope, body.receive, answering)


class BodyReader:
    """Reads a request's body. `whole` is True once all of it was read, so the connection can be
    reused.
    """

    def __init__(self, headers: Headers, receive: Receive) -> None:
        empty = headers.get("content-length", "0") == "0"
        self.whole = empty and "transfer-encoding" not in headers
        self._receive, self._until = receive, now() + limits.BODY_TIMEOUT_S

    async def receive(self) -> Message:
        message = await self._receive()
        self.whole = self.whole or not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Discards the rest of the body, within limits.

        Unread bytes would reset the connection before the client has read the response.
        """
        left = MAX_DISCARDED_BYTES
        while not self.whole and left > 0:
            try:
                async with asyncio.timeout_at(min(now() + DISCARD_TIMEOUT_S, self._until)):
                    message = await self.receive()
            except TimeoutError:
                return
            left -= len(message.get("body", b""))


def check_head(scope: Scope) -> None:
    """Raises ApiError (400, 431) for a head that is too large or contradictory."""
    size = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if len(scope["headers"]) > limits.HEADERS or size > limits.HEADER_BYTES:
        raise ApiError(
            431,
            "headers_too_large",
            f"more than {limits.HEADERS} headers, or {limits.HEADER_BYTES >> 10} KiB of them:"
            " send fewer",
        )
    names = {name for name, _ in scope["headers"]}
    if b"transfer-encoding" in names and (
        b"content-length" in names or scope["http_version"] == "1.0"
    ):
        why = (
            "Transfer-Encoding is not allowed with Content-Length or in HTTP/1.0: send one of them"
        )
        raise ApiError(400, "invalid_http", why)
