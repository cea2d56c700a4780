"""Items answered by any OpenAI-compatible gateway, over HTTP."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from actors.jobs.items import Answer, Item
from runtime.core.errors import InvalidRequest, Overloaded, Unavailable

CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = (
    10.0,
    3600.0,
)  # seconds for a connection, and for the longest answer
MAX_RETRY_AFTER_S = 30.0  # seconds that a Retry-After is obeyed
RETRIED_STATUSES = (408, 425, 429, 503)
UNAUTHORIZED = 401
BAD_GATEWAY = 502
URL_HINT = "give the URL of an OpenAI-compatible gateway, up to its /v1"


class HttpAnswerer:
    """Made by `gateway`."""

    def __init__(self, client: httpx2.AsyncClient, url: str) -> None:
        self._client, self._url = client, url

    async def answer(self, item: Item) -> Answer:
        """As in Answerer. Raises InvalidRequest where the gateway refuses the key."""
        try:
            response = await self._client.post(
                f"{self._url}{item.url.removeprefix('/v1')}",
                json=item.body,
                headers={"Idempotency-Key": item.key},
            )
        except httpx2.HTTPError as error:
            raise Unavailable(unreachable_message(self._url, error)) from error
        if response.status_code == UNAUTHORIZED:
            raise InvalidRequest(wrong_key_message(self._url), "api_key_file")
        if response.status_code in RETRIED_STATUSES:
            await asyncio.sleep(retry_after_seconds(response.headers.get("retry-after", "")))
            raise Overloaded(
                f"{self._url} answers {response.status_code}: too many requests, or too few targets"
            )
        if response.is_redirect:
            raise Unavailable(
                f"{self._url} answers {response.status_code}, from elsewhere: give the URL that it redirects to"
            )
        return parse_answer(response)


@asynccontextmanager
async def open_gateway(
    url: str,
    key: str | None = None,
    authority: ssl.SSLContext | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> AsyncIterator[HttpAnswerer]:
    """The gateway at `url`, which ends in /v1. Raises Unavailable where none answers there, InvalidRequest where it refuses the key."""
    url = url.rstrip("/")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx2.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    async with httpx2.AsyncClient(
        headers=headers,
        timeout=timeout,
        limits=limits,
        transport=transport,
        verify=True if authority is None else authority,
    ) as client:
        try:
            response = await client.get(f"{url}/models", timeout=CONNECT_TIMEOUT_S)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise Unavailable(unreachable_message(url, error)) from error
        if response.status_code == UNAUTHORIZED:
            raise InvalidRequest(wrong_key_message(url), "api_key_file")
        if not response.is_success and response.status_code not in RETRIED_STATUSES:
            raise Unavailable(f"{url}/models answers {response.status_code}: {URL_HINT}")
        if response.is_success and "data" not in (json_object(response) or {}):
            raise Unavailable(f"{url}/models answers without a list of models: {URL_HINT}")
        yield HttpAnswerer(client, url)


def read_key(file: Path) -> str:
    """The key in this file. Raises InvalidRequest."""
    try:
        key = file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"cannot read a key from {file}: give a readable file with the key alone in it",
            "api_key_file",
        ) from error
    if not key or not key.isprintable() or " " in key:
        raise InvalidRequest(
            f"{file} does not hold one key: give a file with the key alone in it", "api_key_file"
        )
    return key


def load_authority(file: Path) -> ssl.SSLContext:
    """Trusts the authority in this PEM file alone. Raises InvalidRequest."""
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:  # ssl's own are of that kind
        raise InvalidRequest(
            f"cannot read a certificate from {file}: give the authority's PEM file", "ca"
        ) from error


def retry_after_seconds(retry_after: str) -> float:
    """Seconds, of a Retry-After in seconds; its other form, a date, counts as none."""
    return min(float(retry_after), MAX_RETRY_AFTER_S) if retry_after.isdecimal() else 0.0


def parse_answer(response: httpx2.Response) -> Answer:
    """An error is the item's answer as it is, and so is a JSON object with choices. Anything else, such as a proxy's page, is a 502."""
    body, status = json_object(response), response.status_code
    if not response.is_error and not (
        body and isinstance(body.get("choices"), list) and body["choices"]
    ):
        status = BAD_GATEWAY
    if body is None or (status != response.status_code and "error" not in body):
        message = f"the gateway answered {response.status_code} without {'choices' if body else 'a JSON object'}"
        body = {
            "error": {
                "message": message,
                "type": "server_error",
                "param": None,
                "code": "bad_gateway",
            }
        }
    return Answer(status, body, response.headers.get("x-request-id", ""))


def json_object(response: httpx2.Response) -> dict[str, Any] | None:
    """The body; None where it is no JSON object, or has a number in it that JSON cannot write."""
    try:
        body = response.json()
        json.dumps(body, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def unreachable_message(url: str, error: Exception) -> str:
    return f"no gateway answers at {url} ({str(error) or type(error).__name__}): start it, or give another --url"


def wrong_key_message(url: str) -> str:
    return f"{url} refuses the key: give the right one with --api-key-file"
