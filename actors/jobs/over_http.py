"""Items answered by any OpenAI-compatible gateway, over HTTP."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2

from actors.jobs.items import Answer, Item
from runtime.errors import InvalidRequest, Overloaded, Unavailable

CONNECT, ANSWER = 10.0, 3600.0  # seconds for a connection, and for the longest answer
LONGEST_WAIT = 30.0  # seconds that a Retry-After is obeyed
LATER = (408, 425, 429, 503)
KEY = 401


class HttpAnswerer:
    """Made by `gateway`."""

    def __init__(self, client: httpx2.AsyncClient, url: str) -> None:
        self._client, self._url = client, url

    async def answer(self, item: Item) -> Answer:
        """As in Answerer. Raises InvalidRequest where the gateway refuses the key."""
        try:
            response = await self._client.post(f"{self._url}{item.url.removeprefix('/v1')}", json=item.body)
        except httpx2.HTTPError as error:
            raise Unavailable(gone(self._url, error)) from error
        if response.status_code == KEY:
            raise InvalidRequest(refused(self._url), "api_key_file")
        if response.status_code in LATER:
            await asyncio.sleep(wait(response.headers.get("retry-after", "")))
            raise Overloaded(f"{self._url} answers {response.status_code}: too many requests, or too few targets")
        if response.is_redirect:
            raise Unavailable(f"{self._url} answers {response.status_code}, from elsewhere: give the URL that it redirects to")
        return Answer(response.status_code, content(response), response.headers.get("x-request-id", ""))


@asynccontextmanager
async def gateway(
    url: str, key: str | None = None, authority: ssl.SSLContext | None = None, transport: httpx2.AsyncBaseTransport | None = None
) -> AsyncIterator[HttpAnswerer]:
    """The gateway at `url`, which ends in /v1. Raises Unavailable where none answers there, InvalidRequest where it refuses the key."""
    url = url.rstrip("/")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx2.Timeout(ANSWER, connect=CONNECT)
    async with httpx2.AsyncClient(
        headers=headers, timeout=timeout, limits=limits, transport=transport, verify=True if authority is None else authority
    ) as client:
        try:
            response = await client.get(f"{url}/models", timeout=CONNECT)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise Unavailable(gone(url, error)) from error
        if response.status_code == KEY:
            raise InvalidRequest(refused(url), "api_key_file")
        if not response.is_success and response.status_code not in LATER:
            raise Unavailable(f"{url}/models answers {response.status_code}: give the URL of an OpenAI-compatible gateway, up to its /v1")
        yield HttpAnswerer(client, url)


def read_key(file: Path) -> str:
    """The key in this file. Raises InvalidRequest."""
    try:
        key = file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read a key from {file}: give a readable file with the key alone in it", "api_key_file") from error
    if not key or not key.isprintable() or " " in key:
        raise InvalidRequest(f"{file} does not hold one key: give a file with the key alone in it", "api_key_file")
    return key


def read_authority(file: Path) -> ssl.SSLContext:
    """Trusts the authority in this PEM file alone. Raises InvalidRequest."""
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:  # ssl's own are of that kind
        raise InvalidRequest(f"cannot read a certificate from {file}: give the authority's PEM file", "ca") from error


def wait(retry_after: str) -> float:
    """Seconds, of a Retry-After in seconds; its other form, a date, counts as none."""
    return min(float(retry_after), LONGEST_WAIT) if retry_after.isdecimal() else 0.0


def content(response: httpx2.Response) -> dict[str, object]:
    """The body; OpenAI's error body in place of one that is no JSON object."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict):
        return body
    message = f"the gateway answered {response.status_code} without a JSON object"
    return {"error": {"message": message, "type": "server_error", "param": None, "code": "bad_gateway"}}


def gone(url: str, error: Exception) -> str:
    return f"no gateway answers at {url} ({str(error) or type(error).__name__}): start it, or give another --url"


def refused(url: str) -> str:
    return f"{url} refuses the key: give the right one with --api-key-file"
