"""Runs a gateway with a toy target on a port of its own; only the model and Ray are fake."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpx2 as httpx
import openai
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from actors.compose import stop_checker_factory
from actors.gateway.api_keys import ApiKeys
from actors.gateway.app import build_app
from actors.gateway.server import GatewayServer, build_server, listen
from actors.gateway.state import Service
from actors.gateway.streams import GenerationBackend
from actors.openai.served_model import ServedModel
from actors.rpc.loop_thread import LoopThread
from runtime.config import GatewayConfig, LimitsConfig
from runtime.core.messages import Chunk, Request
from runtime.core.sampler_reference import reference_sample
from runtime.draft.draft_engine import DraftEngine
from runtime.draft.draft_host import DraftHost
from runtime.drafters.model import ModelDrafter
from runtime.models.grammar import GrammarCompiler
from runtime.models.loader import load_tokenizer
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from runtime.target.engine import Engine
from runtime.target.target import Target
from runtime.target.verifier import Verifier
from tests.support.harness import HANG_S
from tests.support.pair import SHIPPED

MODEL = "toy"
CONTEXT = 400
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """The one that ships, with a chat template."""
    found = load_tokenizer(str(SHIPPED))
    found.chat_template = template
    return found


def served(template: str | None = TEMPLATE, context: int = CONTEXT) -> ServedModel:
    found = tokenizer(template)
    return ServedModel(MODEL, found, from_tokenizer(found), context, len(found), 1_700_000_000)


def toy_target() -> tuple[Target, DraftHost]:
    """Returns a target with varied texts and its drafter; start and stop them on one loop."""
    toy = ToyModel(vocabulary=len(tokenizer()), context=CONTEXT, memory=4)
    eos = frozenset({0})
    engine = Engine(toy, Verifier(reference_sample, eos), Fixed(3, 0.001), time.monotonic)
    grammars = GrammarCompiler(tokenizer(), toy.vocabulary, eos)
    target = Target(engine, stop_checker_factory(tokenizer(), eos), grammars, grammars.close)
    return target, DraftHost(DraftEngine(ModelDrafter(toy, branches=1), "d", 1))


class Scripted:
    """Answers each request with `speak(request)`; `open` counts running generations."""

    def __init__(self, speak: Callable[[Request], AsyncGenerator[Chunk, None]]) -> None:
        self.speak, self.open = speak, 0
        self.asked: list[Request] = []

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        self.asked.append(request)
        self.open += 1
        chunks = self.speak(request)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            self.open -= 1
            await chunks.aclose()


async def never(request: Request) -> AsyncGenerator[Chunk, None]:
    """For Scripted, where no request is to come so far."""
    assert not request, "a request has reached the target"
    yield Chunk((), (), ())


@dataclass
class Running:
    """A gateway that serves at `url`."""

    url: str
    service: Service
    app: Any
    network: LoopThread
    body: Any
    server: GatewayServer
    headers: dict[str, str] = field(default_factory=dict)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=HANG_S)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=HANG_S)

    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def eventually(self, done: Callable[[], bool]) -> None:
        """Returns when `done()`, asked on the event loop, has become true."""

        async def wait() -> None:
            while not done():  # noqa: ASYNC110 - it looks at many things
                await asyncio.sleep(0.005)

        self.network.run(wait(), HANG_S)

    def connections(self) -> list[Any]:
        """Those that are open, as the server counts them."""
        return [*self.server.server_state.connections]

    def free(self) -> bool:
        """Nothing is under way, here and at the target."""
        engine = getattr(self.body, "engine", None)
        idle = (
            self.body.open == 0
            if engine is None
            else not self.body._sessions and engine.requests.idle
        )
        return not self.service.limiter.active and idle


@contextmanager
def serving(
    body: GenerationBackend | None = None,
    limits: LimitsConfig | None = None,
    keys: ApiKeys | None = None,
    template: str | None = TEMPLATE,
    ready: Callable[[], bool] = lambda: True,
    config: GatewayConfig | None = None,
    fleet: Callable[[], Any] = lambda: None,
) -> Iterator[Running]:
    """A gateway over `body`; over a toy target with a drafter where that is not given."""
    config = config or GatewayConfig(port=0)
    network = LoopThread("gateway")
    stop: list[Callable[[], Any]] = [network.stop]
    try:
        if body is None:
            body, host = toy_target()
            network.run(begin(body, host))
            stop.insert(0, lambda: network.run(end(body, host)))
        service = network.run(
            made(served(template), body, limits or LimitsConfig(), keys, ready, fleet)
        )
        app = build_app(service, config.cors_origins)
        http = build_server(app, config)
        socket = listen(config.host, 0)
        serving = network.submit(http.serve(sockets=[socket]))
        stop.insert(0, lambda: serving.result(HANG_S))
        stop.insert(0, lambda: setattr(http, "should_exit", True))
        scheme = "https" if config.tls else "http"
        yield Running(
            f"{scheme}://127.0.0.1:{socket.getsockname()[1]}", service, app, network, body, http
        )
    finally:
        for step in stop:
            step()


async def made(*arguments: Any) -> Service:
    return Service(*arguments)


async def begin(target: Any, host: DraftHost) -> None:
    target.start()
    host.start()
    target.attach("d", host)


async def end(target: Any, host: DraftHost) -> None:
    await target.stop()
    await host.stop()
