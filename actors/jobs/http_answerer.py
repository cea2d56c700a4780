"""Answers items with any OpenAI-compatible gateway, over HTTP."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from actors.jobs.items import Answer, Item
from actors.jobs.proxies import proxy_note, proxy_of
from runtime.core.errors import InvalidRequest, Overloaded, Unavailable

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 3600.0
MAX_RETRY_AFTER_S = 30.0  # longer waits in Retry-After headers are cut to this
RETRIED_STATUSES = (408, 425, 429, 503)
UNAUTHORIZED = 401
BAD_GATEWAY = 502
URL_HINT = "give the URL of an OpenAI-compatible gateway, up to its /v1"


class HttpAnswerer:
    """Answers items with the gateway at `url`. Created by `open_gateway`."""

    def __init__(self, client: httpx2.AsyncClient, url: str) -> None:
        self._client, self._url = client, url

    async def answer(self, item: Item) -> Answer:
        """Answers an item as `Answerer` specifies.

        Raises InvalidRequest if the API key is rejected.
        """
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
            raise Overloaded(f"{self._url} answers {response.status_code}: server at capacity")
        if response.is_redirect:
            raise Unavailable(
                f"{self._url} redirects ({response.status_code}): give the URL that it redirects to"
            )
        return parse_answer(response)


@asynccontextmanager
async def open_gateway(
    url: str,
    key: str | None = None,
    authority: ssl.SSLContext | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> AsyncIterator[HttpAnswerer]:
    """Yields an answerer for the gateway at `url`, which ends in /v1.

    Raises Unavailable if no gateway answers there, and InvalidRequest if it rejects the API key.
    """
    url = url.rstrip("/")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    timeout = httpx2.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    via = proxy_note(url)
    async with httpx2.AsyncClient(
        headers=headers,
        timeout=timeout,
        transport=transport or direct_or_proxied(url, authority),
    ) as client:
        try:
            response = await client.get(f"{url}/models", timeout=CONNECT_TIMEOUT_S)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise Unavailable(unreachable_message(url, error)) from error
        if response.status_code == UNAUTHORIZED:
            raise InvalidRequest(wrong_key_message(url), "api_key_file")
        if not response.is_success and response.status_code not in RETRIED_STATUSES:
            raise Unavailable(f"{url}/models answers {response.status_code}{via}: {URL_HINT}")
        if response.is_success and "data" not in (json_object(response) or {}):
            raise Unavailable(f"{url}/models answers without a list of models{via}: {URL_HINT}")
        yield HttpAnswerer(client, url)


def direct_or_proxied(url: str, authority: ssl.SSLContext | None) -> httpx2.AsyncHTTPTransport:
    """Returns a transport to the gateway, through the proxy of the environment if one applies.

    Raises InvalidRequest if that proxy cannot be used.
    """
    try:
        return httpx2.AsyncHTTPTransport(
            verify=True if authority is None else authority,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            proxy=proxy_of(url),
        )
    except (ValueError, ImportError, httpx2.InvalidURL) as error:
        why = str(error).splitlines()[0]
        raise InvalidRequest(
            f"{url} cannot be reached{proxy_note(url)} ({why}): change http_proxy, or name the host"
            " in no_proxy",
            "url",
        ) from error


def read_key(file: Path) -> str:
    """Returns the API key in the file. Raises InvalidRequest if there is not exactly one."""
    try:
        key = file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"cannot read an API key from {file}: give a readable file that contains only the key",
            "api_key_file",
        ) from error
    if not key or not key.isprintable() or " " in key:
        raise InvalidRequest(
            f"{file} does not contain one API key: give a file that contains only the key",
            "api_key_file",
        )
    return key


def load_authority(file: Path) -> ssl.SSLContext:
    """Returns a TLS context that trusts only this authority. Raises InvalidRequest."""
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:  # includes SSLError
        raise InvalidRequest(
            f"cannot read a certificate from {file}: give the PEM file of the authority", "ca"
        ) from error


def retry_after_seconds(retry_after: str) -> float:
    """Returns the seconds of a Retry-After header; 0 for its other form, a date."""
    return min(float(retry_after), MAX_RETRY_AFTER_S) if retry_after.isdecimal() else 0.0


def parse_answer(response: httpx2.Response) -> Answer:
    """Returns the answer in a response.

    Errors, and JSON objects with choices, are the item's answer as they are. Anything else, such as
    a proxy's page, becomes a 502.
    """
    body, status = json_object(response), response.status_code
    if not response.is_error and not (
        body and isinstance(body.get("choices"), list) and body["choices"]
    ):
        status = BAD_GATEWAY
    if body is None or (status != response.status_code and "error" not in body):
        missing = "choices" if body else "a JSON object"
        message = f"the gateway answered {response.status_code} without {missing}"
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
    """Returns the body; None if it is not an object, or has numbers that JSON cannot represent."""
    try:
        body = response.json()
        json.dumps(body, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def unreachable_message(url: str, error: Exception) -> str:
    why, via = str(error) or type(error).__name__, proxy_note(url)
    past = ", or name its host in no_proxy" if via else ""
    return f"no gateway answers at {url}{via} ({why}): start it, or give another --url{past}"


def wrong_key_message(url: str) -> str:
    return f"{url} rejects the API key: give a valid one with --api-key-file"
