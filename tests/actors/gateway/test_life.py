"""Requests end early: clients leave, deadlines pass, the gateway is full or drains."""

import asyncio
import contextlib
import json
import os
import random
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from actors.gateway.api_keys import ApiKeys
from runtime.config import LimitsConfig
from runtime.core.messages import Chunk, Request, Stats
from tests.support.gateway import MODEL, Running, Scripted, serving
from tests.support.harness import HANG_S

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DISCONNECTS = int(os.environ.get("OUTRIDER_TEST_DISCONNECTS", "20"))
TOKENS = 200


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with serving() as running:
        yield running


def stats(tokens: int = 1) -> Stats:
    return Stats(1, tokens, tokens, 0, 0, 0, 0, (tokens,))


class Gate:
    """Holds generations up until it is opened: each says a token, waits, says another."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def speak(self, request: Request) -> AsyncGenerator[Chunk, None]:
        yield Chunk(("a",), (5,), ("",))
        await self.open.wait()
        yield Chunk(("b",), (6,), ("",), "stop", stats(2))


@pytest.fixture
def gate() -> Gate:
    return Gate()


def let(gateway: Running, gate: Gate) -> None:
    gateway.network.loop.call_soon_threadsafe(gate.open.set)


def body(**fields: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": "import os",
        "seed": 1,
        "ignore_eos": True,
        "max_tokens": TOKENS,
        **fields,
    }


def raw(url: str, value: dict[str, Any]) -> bytes:
    data = json.dumps(value).encode()
    return (
        f"POST {url} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )


# Clients that leave


def test_clients_that_leave_at_any_point_free_everything(gateway: Running) -> None:
    """The client leaves after any number of bytes, streaming or not, with one choice or several."""
    chance = random.Random(1)
    with gateway.http() as client:
        expected = client.post(COMPLETIONS, json=body(max_tokens=30)).json()["choices"]
        for _ in range(DISCONNECTS):
            sent = raw(
                COMPLETIONS,
                body(
                    stream=chance.random() < 0.7,
                    n=chance.choice([1, 1, 3]),
                    prompt=["a", [5, 6]][: chance.choice([1, 2])],
                ),
            )
            with socket.create_connection(
                ("127.0.0.1", gateway.port()), timeout=HANG_S
            ) as connection:
                connection.sendall(
                    sent[: chance.choice([len(sent), len(sent), chance.randrange(len(sent))])]
                )
                if sent.find(b'"stream": true') > 0 and chance.random() < 0.7:
                    connection.settimeout(0.2)
                    with contextlib.suppress(TimeoutError):  # the request was cut off
                        connection.recv(chance.randrange(1, 4000))
                if chance.random() < 0.5:
                    connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
                    )  # a reset, in place of a goodbye
        gateway.eventually(gateway.free)
        assert client.post(COMPLETIONS, json=body(max_tokens=30)).json()["choices"] == expected


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_who_leaves_closes_all_choices_at_once(gate: Gate, stream: bool) -> None:
    scripted = Scripted(gate.speak)
    with serving(scripted) as gateway:
        with socket.create_connection(("127.0.0.1", gateway.port()), timeout=HANG_S) as connection:
            connection.sendall(raw(COMPLETIONS, body(n=4, prompt=["a", "b"], stream=stream)))
            gateway.eventually(lambda: scripted.open == 8)
            if stream:
                assert b"200 OK" in connection.recv(100)
        gateway.eventually(gateway.free)
        with gateway.http() as client:
            text = client.get("/metrics").text
        assert (
            'outrider:http_responses_total{code="499",model_name="toy",'
            f'route="{COMPLETIONS}"}} 1.0' in text
        )
        assert (
            'outrider:request_success_total{finished_reason="abort",model_name="toy"} 8.0' in text
        )


def test_a_client_that_does_not_read_is_cut_after_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.gateway.completion_handler.DEADLINE_GRACE_S", 0.1)

    async def endless(request: Request) -> AsyncGenerator[Chunk, None]:
        while True:
            yield Chunk(("a" * 50_000,), (5,), ("",))
            await asyncio.sleep(0)

    with (
        serving(Scripted(endless)) as gateway,
        socket.create_connection(("127.0.0.1", gateway.port()), timeout=HANG_S) as connection,
    ):
        connection.sendall(raw(COMPLETIONS, body(stream=True, timeout=0.3)))
        gateway.eventually(lambda: bool(gateway.service.limiter.active))
        gateway.eventually(gateway.free)


# Deadlines


@pytest.mark.parametrize("how", ["header", "field", "default"])
def test_the_deadline_travels_to_the_target(how: str) -> None:
    asked: list[Request] = []

    async def speak(request: Request) -> AsyncGenerator[Chunk, None]:
        asked.append(request)
        yield Chunk(("a",), (5,), ("",), "stop", stats())

    with (
        serving(Scripted(speak), LimitsConfig(request_seconds=333.0)) as gateway,
        gateway.http() as client,
    ):
        headers = {"x-request-timeout": "333"} if how == "header" else {}
        fields = {"timeout": 333} if how == "field" else {}
        assert client.post(COMPLETIONS, json=body(**fields), headers=headers).status_code == 200
    assert asked[0].deadline is not None
    assert 333 - HANG_S < asked[0].deadline <= 333


def test_a_target_that_never_answers_ends_with_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.gateway.completion_handler.DEADLINE_GRACE_S", 0.0)

    async def mute(request: Request) -> AsyncGenerator[Chunk, None]:
        await asyncio.Event().wait()
        yield Chunk((), (), ())

    with serving(Scripted(mute)) as gateway, gateway.http() as client:
        for stream in (False, True):
            answer = client.post(COMPLETIONS, json=body(timeout=0.1, stream=stream))
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                504,
                "deadline_exceeded",
            )
        gateway.eventually(gateway.free)


# Overload


def test_beyond_the_bounds_all_are_refused_at_once_and_those_inside_are_unharmed(
    gate: Gate, tmp_path: Any
) -> None:
    file = tmp_path / "keys"
    file.write_text("\n".join(f"user-{number}:a-key-for-user-{number}" for number in range(5)))
    file.chmod(0o600)
    scripted = Scripted(gate.speak)
    with (
        serving(scripted, LimitsConfig(requests=8, per_key=3), ApiKeys(file)) as gateway,
        ThreadPoolExecutor(64) as pool,
        gateway.http() as client,
    ):

        def ask(number: int, **fields: Any) -> httpx.Response:
            return client.post(
                COMPLETIONS,
                json=body(**fields),
                headers={"authorization": f"Bearer a-key-for-user-{number}"},
            )

        inside = [pool.submit(ask, number, stream=number == 0) for number in (0, 0, 1, 1)] + [
            pool.submit(ask, 2, n=3)
        ]
        gateway.eventually(lambda: scripted.open == 7)
        over_quota = [pool.submit(ask, 2) for _ in range(20)]
        assert {
            (found.result().status_code, found.result().json()["error"]["code"])
            for found in over_quota
        } == {(429, "rate_limit_exceeded")}
        too_many = ask(3, n=4)
        assert (too_many.status_code, too_many.json()["error"]["code"]) == (400, "too_many_choices")
        inside.append(pool.submit(ask, 3))
        gateway.eventually(lambda: scripted.open == 8)
        full = [pool.submit(ask, 4) for _ in range(60)]
        assert {
            (found.result().status_code, found.result().json()["error"]["code"]) for found in full
        } == {(503, "overloaded")}
        assert {found.result().headers["retry-after"] for found in (*over_quota, *full)} == {"1"}
        assert scripted.open == 8
        assert len(scripted.asked) == 8
        let(gateway, gate)
        assert {found.result().status_code for found in inside} == {200}
        assert all("ab" in found.result().text or '"a"' in found.result().text for found in inside)
        assert ask(4).status_code == 200
        gateway.eventually(gateway.free)


@pytest.mark.parametrize(
    "fields",
    [{"n": 2}, {"prompt": ["a", "b"]}, {"n": 3}, {"prompt": [[5], [6], [7]]}],
    ids=["n", "prompts", "n-alone", "prompts-alone"],
)
@pytest.mark.parametrize("limit", ["per_key", "requests"])
def test_each_choice_of_each_prompt_counts(
    gate: Gate, tmp_path: Any, fields: dict[str, Any], limit: str
) -> None:
    """Beside two others only one more may run, of the same key or of all."""
    file = tmp_path / "keys"
    file.write_text("one:a-key-for-user-one\ntwo:a-key-for-user-two")
    file.chmod(0o600)
    scripted, limits = Scripted(gate.speak), LimitsConfig(**{"per_key": 9, limit: 3})
    with (
        serving(scripted, limits, ApiKeys(file)) as gateway,
        ThreadPoolExecutor(4) as pool,
        gateway.http() as client,
    ):

        def ask(user: str, **fields: Any) -> httpx.Response:
            headers = {"authorization": f"Bearer a-key-for-user-{user}"}
            return client.post(COMPLETIONS, json=body(**fields), headers=headers)

        try:
            inside = [pool.submit(ask, "one", prompt=["a", "b"])]
            gateway.eventually(lambda: scripted.open == 2)
            asking = pool.submit(ask, "one" if limit == "per_key" else "two", **fields)
            gateway.eventually(lambda: asking.done() or scripted.open > 2)
            assert scripted.open == 2
            inside.append(pool.submit(ask, "one"))
            gateway.eventually(lambda: scripted.open == 3)
        finally:
            let(gateway, gate)
        refused = asking.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            (429, "rate_limit_exceeded") if limit == "per_key" else (503, "overloaded")
        )
        assert refused.headers["retry-after"] == "1"
        assert {found.result().status_code for found in inside} == {200}
        assert ask("one", n=3).status_code == 200
        gateway.eventually(gateway.free)


def test_a_full_gateway_refuses_before_it_reads_the_body(gate: Gate) -> None:
    scripted = Scripted(gate.speak)
    with (
        serving(scripted, LimitsConfig(requests=1)) as gateway,
        ThreadPoolExecutor(1) as pool,
        gateway.http() as client,
    ):
        first = pool.submit(client.post, COMPLETIONS, json=body())
        gateway.eventually(lambda: scripted.open == 1)
        with socket.create_connection(("127.0.0.1", gateway.port()), timeout=HANG_S) as connection:
            connection.sendall(
                f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n".encode()
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 503")
        let(gateway, gate)
        assert first.result().status_code == 200


def test_a_drain_refuses_new_requests_and_waits_for_those_under_way(gate: Gate) -> None:
    scripted = Scripted(gate.speak)
    with serving(scripted) as gateway, ThreadPoolExecutor(1) as pool, gateway.http() as client:
        first = pool.submit(client.post, COMPLETIONS, json=body())
        gateway.eventually(lambda: scripted.open == 1)
        drained: Future[None] = gateway.network.submit(gateway.service.drain())
        gateway.eventually(lambda: gateway.service.limiter.draining)
        with gateway.http() as other:
            refused = other.post(COMPLETIONS, json=body())
            assert (
                refused.status_code,
                refused.json()["error"]["code"],
                refused.headers["retry-after"],
            ) == (503, "draining", "5")
            assert other.get("/ready").status_code == 503
            assert other.get("/health").status_code == 200
        assert not drained.done()
        let(gateway, gate)
        drained.result(HANG_S)
        assert first.result().json()["choices"][0]["text"] == "ab"


def test_readiness_follows_the_targets() -> None:
    there = threading.Event()

    async def never(request: Request) -> AsyncGenerator[Chunk, None]:
        yield Chunk((), (), ())

    with serving(Scripted(never), ready=there.is_set) as gateway, gateway.http() as client:
        assert client.get("/ready").status_code == 503
        there.set()
        assert client.get("/ready").status_code == 200
