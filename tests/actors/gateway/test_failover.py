"""If a target dies behind a gateway, its streaming users see a pause and the same text."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import openai
import pytest

from actors.fleet.fleet_state import Fleet, TargetState
from actors.gateway.actor import Gateway
from actors.rpc.loop_thread import LoopThread
from actors.rpc.server import TargetService
from actors.rpc.server import serve as serve_grpc
from runtime.config import Deployment, GatewayConfig, TargetConfig
from runtime.core.messages import Chunk, Request, StandbyText
from runtime.target.target import Target
from tests.support.gateway import toy_target
from tests.support.harness import HANG_S
from tests.support.pair import SHIPPED

ASKED: Any = {"model": "shipped", "seed": 3, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
PROMPTS = ("import os", "def f(", "x = ", "class A:")


class Held:
    """Waits after each piece of a text until it is released.

    `open` counts the sessions and `waiting` those that wait.
    """

    def __init__(self, body: Target) -> None:
        self.body, self.open, self.waiting = body, 0, 0
        self.go_on = asyncio.Event()

    async def standby(self, updates: AsyncIterator[Sequence[StandbyText]]) -> None:
        await self.body.standby(updates)

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        self.open += 1
        try:
            async with aclosing(self.body.generate(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
                    if chunk.finish_reason is None:
                        self.waiting += 1
                        try:
                            await self.go_on.wait()
                        finally:
                            self.waiting -= 1
        finally:
            self.open -= 1


@dataclass(eq=False)
class Served:
    """One life of a target, behind a server of its own."""

    network: LoopThread
    body: Held
    server: grpc.aio.Server
    state: TargetState

    def die(self) -> None:
        """Its connections are cut; all that it would still say is lost."""
        self.network.run(self.server.stop(None), HANG_S)

    def let(self, go_on: bool) -> None:
        self.network.loop.call_soon_threadsafe(
            self.body.go_on.set if go_on else self.body.go_on.clear
        )


@contextmanager
def life(name: str) -> Iterator[Served]:
    network = LoopThread(name)
    target, _ = toy_target()
    body = Held(target)

    async def begin() -> tuple[grpc.aio.Server, int]:
        target.start()
        return await serve_grpc([TargetService(body)], "127.0.0.1")

    async def end() -> None:
        await server.stop(None)
        await target.stop()

    server, port = network.run(begin(), HANG_S)
    try:
        yield Served(
            network, body, server, TargetState(name, f"127.0.0.1:{port}", 0, "ready", 0, None, "")
        )
    finally:
        network.run(end(), HANG_S)
        network.stop()


@dataclass(eq=False)
class Behind:
    """A gateway, and two targets that it finds as a controller's fleet would tell."""

    gateway: Gateway
    targets: list[Served]

    def let(self, go_on: bool) -> None:
        """Of both targets, when nothing is under way there that would be stopped by it."""
        if not go_on:
            self.eventually(lambda: not any(target.body.open for target in self.targets))
        for target in self.targets:
            target.let(go_on)

    def eventually(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + HANG_S
        while not done():
            assert time.monotonic() < until
            time.sleep(0.005)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.gateway.url}/v1", api_key="none", max_retries=0, timeout=HANG_S
        )


@pytest.fixture
def behind() -> Iterator[Behind]:
    with ExitStack() as stack:
        targets = [stack.enter_context(life(f"target-{number}")) for number in range(2)]

        def look() -> Fleet:
            return Fleet(
                "m", "shipped", "0", tuple(target.state for target in targets), (), (), (), 0
            )

        gateway = Gateway(
            Deployment(
                target=TargetConfig(model=str(SHIPPED)),
                gateway=GatewayConfig(port=0, served_model="shipped"),
            ),
            look,
        )
        gateway.start()
        stack.callback(gateway.stop)
        found = Behind(gateway, targets)
        found.eventually(lambda: gateway.service.ready)
        yield found


def test_streams_outlive_their_targets(behind: Behind) -> None:
    """Four streams on two targets, of which one dies when each stream has said something."""
    behind.let(go_on=True)
    with behind.client() as client:
        expected = [
            client.completions.create(prompt=prompt, **ASKED).choices[0].text for prompt in PROMPTS
        ]
        behind.let(go_on=False)
        streams = [
            client.completions.create(prompt=prompt, stream=True, **ASKED) for prompt in PROMPTS
        ]
        texts = [next(stream).choices[0].text for stream in streams]
        assert [target.body.open for target in behind.targets] == [2, 2]
        struck = behind.targets[0]
        struck.die()
        behind.let(go_on=True)
        for number, stream in enumerate(streams):
            texts[number] += "".join(event.choices[0].text for event in stream)
    assert texts == expected
    assert behind.gateway.router.lost == {struck.state.name: 2}


def test_an_answer_in_one_piece_outlives_its_target(behind: Behind) -> None:
    behind.let(go_on=True)
    with behind.client() as client, ThreadPoolExecutor(1) as pool:
        expected = client.completions.create(prompt=PROMPTS[0], **ASKED)
        behind.let(go_on=False)
        asking = pool.submit(lambda: client.completions.create(prompt=PROMPTS[0], **ASKED))
        behind.eventually(lambda: any(target.body.waiting for target in behind.targets))
        next(target for target in behind.targets if target.body.waiting).die()
        behind.let(go_on=True)
        found = asking.result(HANG_S)
    assert found.choices[0].text == expected.choices[0].text
    assert found.usage is not None
    assert found.usage.completion_tokens == ASKED["max_tokens"]
    assert sum(behind.gateway.router.lost.values()) == 1
