"""Answers over HTTP belong to the item, are retried, or end the job."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx2
import pytest

from actors.jobs.http_answerer import (
    HttpAnswerer,
    load_authority,
    open_gateway,
    read_key,
    retry_after_seconds,
)
from actors.jobs.items import Answer, Item
from actors.jobs.worker import RETRIED_STATUSES
from runtime.core.errors import InvalidRequest, OutriderError, Overloaded, Unavailable

URL = "http://gateway.test/v1"
ITEM = Item(1, "a", "/v1/chat/completions", {"model": "m", "messages": [], "seed": 3}, "key-1")

DONE = {"choices": [{"text": "a"}], "usage": {"completion_tokens": 9}}

Handler = Callable[[httpx2.Request], httpx2.Response]


def models(answer: Handler) -> httpx2.MockTransport:
    """A gateway that lists its models and answers the rest so."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        return (
            httpx2.Response(200, json={"data": []})
            if request.url.path == "/v1/models"
            else answer(request)
        )

    return httpx2.MockTransport(handle)


def asked(transport: httpx2.MockTransport, key: str | None = None, url: str = URL) -> Answer:
    async def ask(answerer: HttpAnswerer) -> Answer:
        return await answerer.answer(ITEM)

    return asyncio.run(opened(transport, ask, key, url))


async def opened(
    transport: httpx2.MockTransport,
    act: Callable[[HttpAnswerer], Awaitable[Answer]],
    key: str | None = None,
    url: str = URL,
) -> Answer:
    async with open_gateway(url, key, transport=transport) as answerer:
        return await act(answerer)


@pytest.mark.parametrize("url", [URL, URL + "/"])
def test_the_body_goes_out_as_it_is_with_the_key(url: str) -> None:
    seen: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, json=DONE, headers={"x-request-id": "r-1"})

    found = asked(models(answer), "secret", url)
    assert found == Answer(200, DONE, "r-1")
    assert found.tokens == 9
    [request] = seen
    assert str(request.url) == "http://gateway.test/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["idempotency-key"] == ITEM.key
    assert json.loads(request.content) == ITEM.body


@pytest.mark.parametrize("status", [400, 403, 404, 413, 500, 504])
def test_an_error_is_the_items_answer(status: int) -> None:
    assert asked(
        models(lambda request: httpx2.Response(status, json={"error": {"code": "x"}}))
    ) == Answer(status, {"error": {"code": "x"}})


@pytest.mark.parametrize("content", [b"<html>", b"[1]", b""])
def test_an_answer_that_is_no_object_becomes_an_error_body(content: bytes) -> None:
    found = asked(models(lambda request: httpx2.Response(502, content=content)))
    assert found.status == 502
    assert found.body["error"]["code"] == "bad_gateway"


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (200, b"<html>log in first</html>"),
        (200, b""),
        (200, b"[]"),
        (200, b'{"choices": [{"text": "a"'),
        (200, b'{"status": "ok"}'),
        (200, b'{"choices": []}'),
        (200, b'{"choices": "a"}'),
        (200, b'{"choices": [{"logprob": NaN}]}'),
        (200, b'{"choices": [{"logprob": 1e999}]}'),
        (200, b'{"choices": ' + b"[" * 100_000),
        (202, b'{"status": "queued"}'),
        (204, b""),
    ],
    ids=range(12),
)
def test_what_is_no_answer_is_a_fault_of_the_gateway(status: int, content: bytes) -> None:
    """Whatever its status says: it is tried again, and is a failed item in the end."""
    found = asked(models(lambda request: httpx2.Response(status, content=content)))
    assert found.status in RETRIED_STATUSES
    assert found.body["error"]["code"] == "bad_gateway"
    assert str(status) in found.body["error"]["message"]


def test_an_error_behind_a_status_of_success_is_an_error() -> None:
    found = asked(
        models(lambda request: httpx2.Response(200, json={"error": {"code": "model_lost"}}))
    )
    assert (found.status, found.body) == (502, {"error": {"code": "model_lost"}})


@pytest.mark.parametrize("content", [b"<html>home</html>", b"[]", b"{}"])
def test_a_server_of_pages_is_no_gateway(content: bytes) -> None:
    with pytest.raises(Unavailable, match=r"gateway\.test.*list of models"):
        asked(httpx2.MockTransport(lambda request: httpx2.Response(200, content=content)))


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (429, Overloaded),
        (503, Overloaded),
        (408, Overloaded),
        (401, InvalidRequest),
        (307, Unavailable),
    ],
)
def test_what_is_not_the_items_matter_is_raised(status: int, error: type[OutriderError]) -> None:
    headers = {"location": "/elsewhere", "retry-after": "0"}
    with pytest.raises(error) as caught:
        asked(models(lambda request: httpx2.Response(status, headers=headers)), "secret")
    assert "secret" not in str(caught.value)


def test_a_gateway_that_goes_away_is_unavailable() -> None:
    def broken(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadError("reset", request=request)

    with pytest.raises(Unavailable, match=r"gateway\.test"):
        asked(models(broken))


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, InvalidRequest), (404, Unavailable), (500, Unavailable)],
    ids=["key", "another server", "broken"],
)
def test_what_is_no_gateway_is_found_out_before_anything_is_asked(
    status: int, error: type[OutriderError]
) -> None:
    with pytest.raises(error, match=r"gateway\.test"):
        asked(httpx2.MockTransport(lambda request: httpx2.Response(status)))


@pytest.mark.parametrize(
    "url", ["gateway", "ftp://gateway/v1", "http://[/v1", "http://127.0.0.1:1/v1"]
)
def test_a_url_where_nobody_is_is_named(url: str) -> None:
    async def enter() -> None:
        async with open_gateway(url):
            pytest.fail("somebody answered")

    with pytest.raises(Unavailable) as caught:
        asyncio.run(enter())
    assert url in str(caught.value)


PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


class Listener:
    """An HTTP server on a loopback port that answers everything alike; `seen` are request lines."""

    def __init__(self, body: bytes) -> None:
        self.body, self.seen = body, list[str]()

    async def __aenter__(self) -> "Listener":
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.seen.append(head.decode().splitlines()[0])
        size = len(self.body)
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % size)
        writer.write(self.body)
        await writer.drain()
        writer.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.9.9.9"])
def test_loopback_goes_past_proxies(environment: pytest.MonkeyPatch, host: str) -> None:
    """Whatever the variables say: one names a proxy of a kind that nobody knows."""

    async def enter() -> None:
        async with Listener(b'{"data": []}') as gateway, Listener(b"") as proxy:
            environment.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
            environment.setenv("all_proxy", "gopher://proxy:70")
            url = f"http://{host}:{gateway.port}/v1"
            if host == "127.9.9.9":
                gateway.server.close()
                with pytest.raises(Unavailable) as caught:
                    await open_gateway(url).__aenter__()
                assert "proxy" not in str(caught.value)
                assert not proxy.seen
                return
            async with open_gateway(url):
                pass
            assert gateway.seen == ["GET /v1/models HTTP/1.1"]
            assert not proxy.seen

    asyncio.run(enter())


def test_other_hosts_are_reached_through_the_proxy(environment: pytest.MonkeyPatch) -> None:
    async def enter() -> None:
        async with Listener(b'{"data": []}') as proxy:
            environment.setenv("HTTP_PROXY", f"me:SECRET@127.0.0.1:{proxy.port}")
            async with open_gateway(URL):
                pass
            assert proxy.seen == [f"GET {URL}/models HTTP/1.1"]
            proxy.body = b"<html>who are you?</html>"
            named = f"through the proxy http://127.0.0.1:{proxy.port}"
            with pytest.raises(Unavailable, match=named) as caught:
                await open_gateway(URL).__aenter__()
            assert "SECRET" not in str(caught.value)

    asyncio.run(enter())


@pytest.mark.parametrize(
    ("proxy", "error"),
    [
        ("http://127.0.0.1:1", Unavailable),
        ("gopher://127.0.0.1:70", InvalidRequest),
        ("socks9://a", InvalidRequest),
    ],
)
def test_a_proxy_that_does_not_work_is_named(
    environment: pytest.MonkeyPatch, proxy: str, error: type[OutriderError]
) -> None:
    async def enter() -> None:
        async with open_gateway(URL):
            pytest.fail("somebody answered")

    environment.setenv("all_proxy", proxy)
    with pytest.raises(error, match=f"through the proxy {proxy}") as caught:
        asyncio.run(enter())
    assert "no_proxy" in str(caught.value)
    environment.setenv("no_proxy", "example.org,gateway.test")
    with pytest.raises(Unavailable) as direct:
        asyncio.run(enter())
    assert "proxy" not in str(direct.value)


def test_a_retry_after_is_obeyed_within_reason() -> None:
    assert [
        retry_after_seconds(given)
        for given in ("2", "100000", "", "Wed, 21 Oct 2026 07:28:00 GMT", "-1")
    ] == [2.0, 30.0, 0.0, 0.0, 0.0]


def test_a_key_file_holds_one_key(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-abc\n")
    assert read_key(file) == "sk-abc"
    for content in (b"", b"two words", b"a\nb", b"\xff", b"a\x00b"):
        file.write_bytes(content)
        with pytest.raises(InvalidRequest, match=str(file)) as caught:
            read_key(file)
        assert "two" not in str(caught.value)
    with pytest.raises(InvalidRequest, match="nowhere"):
        read_key(tmp_path / "nowhere")


def test_an_authority_is_a_certificate(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("nonsense")
    for path in (file, tmp_path / "nowhere"):
        with pytest.raises(InvalidRequest, match=str(path)):
            load_authority(path)
