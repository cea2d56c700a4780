"""What a gateway holds for clients that read slowly, or not at all, is bounded."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from actors.gateway import connection
from actors.openai.response_builder import ResponseBuilder
from runtime.config import LimitsConfig
from runtime.core.messages import Chunk, Logprob, Request, Stats
from tests.support.gateway import MODEL, Scripted, serving
from tests.support.raw_http import COMPLETIONS, connected, flood

STATS = Stats(1, 1, 1, 0, 0, 0, 0, (1,))
LAST = Chunk(("a",), (5,), ("",), "stop", STATS, logprobs=(Logprob(-1.0, ((5, -1.0),)),))


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "x", "max_tokens": 10, **fields}


@pytest.mark.parametrize("stream", [True, False])
def test_logprobs_under_way_have_a_limit(stream: bool) -> None:
    """An answer may have to hold all of its logprobs until its client reads."""
    opened = asyncio.Event()

    async def speak(request: Request) -> AsyncGenerator[Chunk, None]:
        await opened.wait()
        yield LAST

    with serving(Scripted(speak), LimitsConfig(logprobs=40)) as gateway, gateway.http() as client:
        held: list[Any] = []
        fields = body(logprobs=1, n=2, stream=stream)
        waiting = threading.Thread(
            target=lambda: held.append(client.post(COMPLETIONS, json=fields))
        )
        waiting.start()
        gateway.eventually(lambda: len(gateway.body.asked) == 2)
        refused = client.post(COMPLETIONS, json=body(logprobs=0, max_tokens=1))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert "retry-after" in refused.headers
        gateway.network.loop.call_soon_threadsafe(opened.set)
        assert client.post(COMPLETIONS, json=body()).status_code == 200
        waiting.join()
        assert held[0].status_code == 200
        gateway.eventually(gateway.free)
        assert client.post(COMPLETIONS, json=fields).status_code == 200


@pytest.mark.parametrize("fields", [{"logprobs": 0}, {"logprobs": 1}])
def test_an_answer_with_logprobs_is_built_beside_the_event_loop(
    fields: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million of them take seconds, in which every other client would wait."""
    built: list[int | None] = []
    response = ResponseBuilder.response

    def noted(self: ResponseBuilder) -> dict[str, Any]:
        built.append(threading.get_ident())
        return response(self)

    async def speak(request: Request) -> AsyncGenerator[Chunk, None]:
        yield LAST

    monkeypatch.setattr(ResponseBuilder, "response", noted)
    with serving(Scripted(speak)) as gateway, gateway.http() as client:
        loops: list[int] = []
        gateway.network.loop.call_soon_threadsafe(lambda: loops.append(threading.get_ident()))
        assert client.post(COMPLETIONS, json=body(**fields)).status_code == 200
    assert len(built) == len(loops) == 1
    assert built != loops


def test_pipelined_answers_that_nobody_reads_stop_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway answers one request at a time, and reads no more while an answer waits."""
    long = Chunk(("x" * 200_000,), (5,), ("",), "stop", STATS)

    async def speak(request: Request) -> AsyncGenerator[Chunk, None]:
        yield long

    data = b'{"model":"toy","prompt":"x","max_tokens":1}'
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(data)
    ) + data
    with serving(Scripted(speak)) as gateway, connected(gateway, 4096) as client:
        client.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            flood(client, request * 1000)
        (found,) = gateway.connections()
        assert 0 < found.transport.get_write_buffer_size() < 1 << 20
        assert len(found.conn.trailing_data[0]) < 1 << 20
        assert 0 < len(gateway.body.asked) < 50
        monkeypatch.setattr(connection, "STALL_TIMEOUT_S", 0.5)
        gateway.eventually(lambda: not gateway.connections())
        gateway.eventually(gateway.free)
