"""Idempotency-Key: a request that comes twice under one key runs once."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import httpx2 as httpx
import openai
import pytest

from actors.gateway import idempotency
from actors.gateway.api_keys import ApiKeys
from actors.gateway.idempotency import IdempotencyCache, check_key
from actors.openai.errors import ApiError
from runtime.core.messages import Chunk, Request
from tests.actors.gateway.test_life import COMPLETIONS, Gate, body, let, raw, stats
from tests.support.gateway import MODEL, Scripted, serving
from tests.support.harness import HANG_S


@pytest.fixture
def gate() -> Gate:
    return Gate()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def pieces(*said: bytes) -> AsyncGenerator[bytes, None]:
    for piece in said:
        yield piece


async def all_of(
    replays: IdempotencyCache, key: str, digest: bytes = b"", said: Sequence[bytes] = (b"x",)
) -> list[bytes]:
    async with aclosing(replays.share((None, key), digest, lambda: pieces(*said))) as shared:
        return [piece async for piece in shared]


def test_answers_are_kept_for_a_time_and_while_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        clock = Clock()
        replayed: list[None] = []
        replays = IdempotencyCache(clock, lambda: replayed.append(None))
        assert await all_of(replays, "a", said=[b"1", b"2"]) == [b"1", b"2"]
        assert await all_of(replays, "a", said=[b"3"]) == [b"1", b"2"]
        assert len(replayed) == 1
        with pytest.raises(ApiError) as refused:
            await all_of(replays, "a", digest=b"other")
        assert refused.value.status == 409
        clock.now = idempotency.CACHE_TTL_S
        assert await all_of(replays, "a", digest=b"other", said=[b"3"]) == [b"3"]
        monkeypatch.setattr(idempotency, "MAX_CACHE_BYTES", 10)
        for name in "bcdefg":
            await all_of(replays, name, said=[b"12345"])
        assert len(replays.responses) <= 3
        monkeypatch.setattr(idempotency, "MAX_CACHE_ENTRIES", 2)
        for name in "hijk":
            await all_of(replays, name, said=[b"1"])
        assert list(replays.responses) == [(None, "j"), (None, "k")]

    asyncio.run(main())


@pytest.mark.parametrize("fault", [KeyError("ours"), ApiError(503, "unavailable", "not now")])
def test_an_answer_that_failed_half_way_is_not_taken_for_whole(fault: Exception) -> None:
    """All that listen hear of it, and the next one under its key begins anew."""

    async def failing() -> AsyncGenerator[bytes, None]:
        yield b"1"
        await asyncio.sleep(0)
        raise fault

    async def heard(replays: IdempotencyCache, pieces: list[bytes]) -> None:
        async with aclosing(replays.share((None, "a"), b"", failing)) as shared:
            async for piece in shared:
                pieces += [piece]

    async def main() -> None:
        replays, first, second = (
            IdempotencyCache(Clock(), lambda: None),
            list[bytes](),
            list[bytes](),
        )
        ends = await asyncio.gather(
            heard(replays, first), heard(replays, second), return_exceptions=True
        )
        assert list(ends) == [fault, fault]
        assert first == second == [b"1"]
        assert await all_of(replays, "a", said=[b"2"]) == [b"2"]

    asyncio.run(main())


def test_what_is_kept_stays_within_its_bytes_and_the_oldest_goes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(idempotency, "MAX_CACHE_BYTES", 10)

    async def main() -> None:
        replays = IdempotencyCache(Clock(), lambda: None)
        for name, said in zip("abcd", ([b"12", b"34"], [b"1234"], [b"12"], [b"1"]), strict=True):
            assert await all_of(replays, name, said=said) == said
        await all_of(replays, "e", said=[])  # looks at what is there: 11 bytes, one too many
        assert [key for _, key in replays.responses] == ["b", "c", "d", "e"]
        await all_of(replays, "f", said=[b"1234567890"])
        await all_of(replays, "g", said=[])
        assert [key for _, key in replays.responses] == ["e", "f", "g"]
        await all_of(replays, "h", said=[b"1"])
        await all_of(replays, "i", said=[])
        assert [key for _, key in replays.responses] == ["g", "h", "i"]

    asyncio.run(main())


def test_while_an_abandoned_answer_is_still_being_cancelled_its_key_begins_anew() -> None:
    async def main() -> None:
        replays, cleaned = IdempotencyCache(Clock(), lambda: None), asyncio.Event()

        async def slow_to_end() -> AsyncGenerator[bytes, None]:
            try:
                yield b"1"
                await asyncio.Event().wait()
            finally:
                await cleaned.wait()

        first = replays.share((None, "a"), b"", slow_to_end)
        assert await anext(first) == b"1"
        leaving = asyncio.create_task(first.aclose())
        await asyncio.sleep(0)
        assert not leaving.done()
        assert await all_of(replays, "a", said=[b"2"]) == [b"2"]
        cleaned.set()
        await leaving
        assert await all_of(replays, "a", said=[b"3"]) == [b"2"]

    asyncio.run(main())


def test_errors_name_the_key_and_the_way_out() -> None:
    async def main() -> None:
        replays = IdempotencyCache(Clock(), lambda: None)
        await all_of(replays, "a")
        with pytest.raises(ApiError, match="used with another request: use a new one") as refused:
            await all_of(replays, "a", digest=b"other")
        assert (refused.value.status, refused.value.code) == (409, "idempotency_key_reused")

    asyncio.run(main())
    for key in ("", "x" * 129, "a b", "é", "a\n"):
        with pytest.raises(ApiError, match="give 1 to 128 printable characters") as invalid:
            check_key(key)
        assert (invalid.value.status, invalid.value.code) == (400, "invalid_value")
        assert invalid.value.param == "Idempotency-Key"
    for key in ("x", "!~" * 64):
        assert check_key(key) == key


# Over HTTP


def test_what_comes_twice_runs_once(gate: Gate) -> None:
    """Concurrent callers share the run, later ones its answer; other bodies and keys do not."""
    scripted = Scripted(gate.speak)
    with serving(scripted) as gateway, ThreadPoolExecutor(8) as pool, gateway.http() as client:

        def ask(name: str, **fields: Any) -> httpx.Response:
            return client.post(COMPLETIONS, json=body(**fields), headers={"idempotency-key": name})

        whole = [pool.submit(ask, "one") for _ in range(3)]
        streamed = [pool.submit(ask, "two", stream=True) for _ in range(3)]
        gateway.eventually(lambda: len(gateway.service.limiter.active) == 6 and scripted.open == 2)
        other = ask("one", max_tokens=5)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
        let(gateway, gate)
        assert len({found.result().content for found in whole}) == 1
        assert len({found.result().content for found in streamed}) == 1
        assert streamed[0].result().text.endswith("data: [DONE]\n\n")
        assert ask("one").content == whole[0].result().content
        assert ask("two", stream=True).content == streamed[0].result().content
        assert len(scripted.asked) == 2
        assert ask("three").status_code == 200
        assert len(scripted.asked) == 3
        assert (
            'outrider:idempotent_replays_total{model_name="toy"} 6.0' in client.get("/metrics").text
        )


def test_no_tenant_gets_what_another_one_was_answered(tmp_path: Any) -> None:
    """Their Idempotency-Keys may be equal, and their requests too."""
    file = tmp_path / "keys"
    file.write_text("one:a-key-for-user-one\ntwo:a-key-for-user-two")
    file.chmod(0o600)

    async def count(request: Request) -> AsyncGenerator[Chunk, None]:
        number = str(len(scripted.asked))
        yield Chunk((number,), (5,), ("",), "stop", stats())

    scripted = Scripted(count)
    with serving(scripted, keys=ApiKeys(file)) as gateway, gateway.http() as client:

        def ask(user: str, **fields: Any) -> str:
            headers = {"authorization": f"Bearer a-key-for-user-{user}", "idempotency-key": "k"}
            answer = client.post(COMPLETIONS, json=body(**fields), headers=headers)
            assert answer.status_code == 200
            text: str = answer.json()["choices"][0]["text"]
            return text

        assert [ask("one"), ask("two"), ask("one"), ask("two")] == ["1", "2", "1", "2"]
        assert scripted.asked[0].sampling.seed == scripted.asked[1].sampling.seed == 1
        assert len(scripted.asked) == 2


def test_a_run_goes_on_while_somebody_listens_and_ends_with_the_last(gate: Gate) -> None:
    scripted = Scripted(gate.speak)
    with serving(scripted) as gateway, ThreadPoolExecutor(1) as pool, gateway.http() as client:
        data = raw(COMPLETIONS, body(stream=True)).replace(
            b"\r\n", b"\r\nIdempotency-Key: k\r\n", 1
        )
        with socket.create_connection(("127.0.0.1", gateway.port()), timeout=HANG_S) as first:
            first.sendall(data)
            gateway.eventually(lambda: scripted.open == 1)
            second = pool.submit(
                client.post,
                COMPLETIONS,
                content=json.dumps(body(stream=True)),
                headers={"idempotency-key": "k", "content-type": "application/json"},
            )
            gateway.eventually(
                lambda: any(
                    run.listeners == 2 for run in gateway.service.idempotency.responses.values()
                )
            )
        gateway.eventually(
            lambda: all(
                run.listeners == 1 for run in gateway.service.idempotency.responses.values()
            )
        )
        let(gateway, gate)
        assert '"text":"b"' in second.result().text
        assert len(scripted.asked) == 1
        gate.open.clear()
        with socket.create_connection(("127.0.0.1", gateway.port()), timeout=HANG_S) as alone:
            alone.sendall(data.replace(b": k", b": l"))
            gateway.eventually(lambda: scripted.open == 1)
        gateway.eventually(gateway.free)
        assert [key for _, key in gateway.service.idempotency.responses] == ["k"]


def test_an_error_is_not_kept_and_a_second_try_says_the_same() -> None:
    seeds: list[int] = []

    async def at_the_second_try(request: Request) -> AsyncGenerator[Chunk, None]:
        seeds.append(request.sampling.seed)
        reason = "error" if len(seeds) == 1 else "stop"
        yield Chunk(("a",), (5,), ("",), reason, stats())  # type: ignore[arg-type]

    with serving(Scripted(at_the_second_try)) as gateway, gateway.openai() as client:
        asked: Any = {"model": MODEL, "prompt": "x", "extra_headers": {"idempotency-key": "k"}}
        with pytest.raises(openai.InternalServerError):
            client.completions.create(**asked)
        assert client.completions.create(**asked).choices[0].text == "a"
        assert seeds[0] == seeds[1]
