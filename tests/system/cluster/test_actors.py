"""The real actors on a local Ray: placed, talking gRPC, losing a drafter in mid-stream."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.controller.controller import Controller
from actors.fleet.ray_session import cause_of
from actors.rpc.client import GrpcTarget
from actors.rpc.endpoints import ActorLocation
from runtime.config import Deployment
from runtime.core.errors import ModelRefused
from runtime.core.messages import Chunk, Request
from runtime.core.sampling_params import SamplingParams
from runtime.deployment_builder import build_deployment
from tests.support.pair import save_model
from tests.system.cluster.texts import PATIENCE_S, stream

pytestmark = pytest.mark.cluster
LONG = SamplingParams(
    max_tokens=16_000, ignore_eos=True
)  # far more than a drafter's restart lasts; it is not read to its end


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """Uses the target as its own draft, so its tokens are right and the target waits for them.

    The model is deep, so that its output outlasts a restart.
    """
    folder = str(
        save_model(tmp_path_factory.mktemp("models") / "deep", context=16_384, num_hidden_layers=24)
    )
    return build_deployment(folder, (folder,), 1, "auto", "cpu", local=True, policy="sync")


@pytest.fixture(scope="module")
def controller(cluster: None, plan: Deployment) -> Iterator[Any]:
    handle = ray.remote(Controller).options(num_cpus=0, max_concurrency=4).remote(plan, "test-")
    yield handle
    ray.get(handle.stop.remote(), timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def address(controller: Any) -> str:
    return str(ray.get(controller.start.remote(), timeout=PATIENCE_S).targets[0].address)


@asynccontextmanager
async def asked(
    address: str, name: str, sampling: SamplingParams, speculation: bool = True
) -> AsyncIterator[AsyncIterator[Chunk]]:
    client = GrpcTarget(address)
    chunks = client.generate(Request(name, (5, 6, 7), sampling, speculation))
    try:
        yield chunks
    finally:
        await chunks.aclose()
        await client.close()


async def output(address: str, name: str, sampling: SamplingParams, speculation: bool) -> list[int]:
    async with asked(address, name, sampling, speculation) as chunks:
        return [token async for chunk in chunks for token in chunk.tokens]


def test_speculation_over_real_actors_changes_no_token(address: str) -> None:
    for temperature in (0.0, 0.9):
        sampling = SamplingParams(temperature=temperature, seed=3, max_tokens=200, ignore_eos=True)
        plain = asyncio.run(output(address, f"off-{temperature}", sampling, False))
        assert len(plain) == 200
        assert asyncio.run(output(address, f"on-{temperature}", sampling, True)) == plain


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_drafter_lost_in_mid_stream_is_replaced_and_no_token_changes(
    blow: int, address: str, controller: Any
) -> None:
    async def through_the_loss() -> list[int]:
        """Tokens up to the first that the new life of the drafter has guessed."""
        tokens: list[int] = []
        before = place(controller)
        struck, replaced = False, False
        async with asked(address, f"blow-{blow}", LONG) as chunks:
            async for chunk in chunks:
                tokens.extend(chunk.tokens)
                if before is not None and not struck and any(chunk.drafters):
                    os.kill(before.pid, blow)
                    struck = True
                elif struck and not replaced:
                    replaced = await asyncio.to_thread(place, controller) not in (before, None)
                elif replaced and any(chunk.drafters):
                    return tokens
        raise AssertionError(
            f"the output of {len(tokens)} tokens ended before the drafter was back"
        )

    async def all_of_it() -> None:
        """Plain decoding goes on beside it."""
        async with (
            asyncio.timeout(PATIENCE_S),
            stream(address, f"beside-{blow}", speculation=False) as plain,
        ):
            tokens = await through_the_loss()
            assert await plain.first(len(tokens)) == tokens

    lives = ray.get(controller.fleet.remote()).replaced
    asyncio.run(all_of_it())
    assert ray.get(controller.fleet.remote()).replaced == lives + 1


def place(controller: Any) -> ActorLocation | None:
    """Where the one drafter is; None while there is none."""
    found: dict[str, ActorLocation] = ray.get(controller.places.remote(), timeout=PATIENCE_S)
    return next((place for name, place in found.items() if name != "target-0"), None)


def test_what_an_actor_raises_at_its_start_reaches_the_caller(
    cluster: None, plan: Deployment, tmp_path: Path
) -> None:
    broken = build_deployment(str(tmp_path), (), 1, "auto", "cpu", local=True)
    handle = ray.remote(Controller).options(num_cpus=0, max_concurrency=4).remote(broken, "broken-")
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(handle.start.remote(), timeout=PATIENCE_S)
    error = cause_of(caught.value)
    assert isinstance(error, ModelRefused), error
    assert str(tmp_path) in str(error)
    ray.kill(handle)
