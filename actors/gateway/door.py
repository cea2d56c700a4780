"""What every HTTP request passes before its route is looked for: bounds on its head, the API key, an id for the answer."""

import re
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from actors.gateway.errors import Refused
from actors.gateway.exchange import Speaker
from actors.gateway.service import Service
from runtime import limits

SANE = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class Door:
    """`routes`: the addresses that metrics name; all others are "other" there."""

    def __init__(self, app: ASGIApp, service: Service, routes: frozenset[str]) -> None:
        self.app, self.service, self.routes = app, service, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, path = Headers(scope=scope), scope["path"]
        given = headers.get("x-request-id", "")
        answer_id = given if SANE.fullmatch(given) else uuid.uuid4().hex

        async def answering(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", answer_id.encode())]
                self.service.meter.answered(path if path in self.routes else "other", message["status"])
            await send(message)

        try:
            check_head(scope)
            key = self.service.caller(path, headers.get("authorization", ""))
        except Refused as error:
            return await Speaker(answering).refuse(error, close=has_body(headers))
        scope.setdefault("state", {})["key"] = key
        return await self.app(scope, receive, answering)


def check_head(scope: Scope) -> None:
    """Raises Refused (431)."""
    size = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if len(scope["headers"]) > limits.HEADERS or size > limits.HEADER_BYTES:
        raise Refused(
            431, "headers_too_large", f"more than {limits.HEADERS} headers, or {limits.HEADER_BYTES >> 10} KiB of them: send fewer"
        )


def has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
