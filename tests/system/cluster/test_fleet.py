"""Drafters, targets and deployments change under a stream without changing a token."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.state import actors

from actors.controller.controller import Controller
from actors.fleet.client import NAME
from actors.fleet.fleet_state import Fleet
from actors.fleet.ray_session import cause_of
from actors.rpc.endpoints import ActorLocation
from runtime.config import Deployment, GatewayConfig
from runtime.core.errors import InvalidRequest, ModelRefused
from runtime.deployment_builder import build_deployment
from runtime.telemetry.tracing import COMPUTE, STEP, Span
from tests.support.pair import save_model
from tests.system.cluster.texts import PATIENCE_S, stream

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """Deep, so that a text outlasts a drafter's start."""
    model = str(
        save_model(tmp_path_factory.mktemp("models") / "deep", context=16_384, num_hidden_layers=24)
    )
    found = build_deployment(model, ("ngram",), 1, "auto", "cpu", local=True)
    return found.model_copy(update={"gateway": GatewayConfig(port=0)})


@pytest.fixture(scope="module")
def fleet(cluster: None, plan: Deployment) -> Iterator["Served"]:
    kind = ray.remote(Controller).options(
        name=NAME, lifetime="detached", max_restarts=-1, num_cpus=0, max_concurrency=8
    )
    served = Served(kind.remote(plan, served=True))
    served.ask("start")
    yield served
    served.ask("stop")
    ray.kill(served.handle)


class Served:
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def ask(self, method: str, *arguments: object) -> Any:
        return ray.get(getattr(self.handle, method).remote(*arguments), timeout=PATIENCE_S)

    def now(self) -> Fleet:
        found: Fleet = self.ask("fleet")
        return found

    def when(self, true: Callable[[Fleet], bool]) -> Fleet:
        """The first fleet of which it is true."""
        deadline = time.monotonic() + PATIENCE_S
        while not true(found := self.now()):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found

    def place(self, name: str) -> ActorLocation:
        found: ActorLocation = self.ask("places")[name]
        return found


def drafters(fleet: Fleet) -> list[tuple[str, str]]:
    return [(drafter.name, drafter.state) for drafter in fleet.drafters]


async def meanwhile(address: str, name: str, work: Callable[[], None]) -> None:
    """A text that is written while something is done to the fleet equals plain decoding."""
    async with (
        stream(address, name) as text,
        stream(address, f"{name}-plain", speculation=False) as plain,
    ):
        await text.more(5)
        await asyncio.to_thread(work)
        heard = await text.more(5)
        assert await plain.first(len(heard)) == heard


def test_drafters_come_and_go_while_a_text_is_written(fleet: Served) -> None:
    def change() -> None:
        for count, names in (
            (3, ["ngram-0", "ngram-1", "ngram-2"]),
            (0, []),
            (2, ["ngram-0", "ngram-1"]),
        ):
            fleet.ask("scale", "ngram", count)
            expected = [(name, "ready") for name in names]
            found = fleet.when(lambda fleet, expected=expected: drafters(fleet) == expected)  # type: ignore[misc]
            assert (found.pools[0].count, found.pools[0].ready) == (count, count)

    asyncio.run(meanwhile(fleet.now().targets[0].address, "scaled", change))
    assert fleet.now().replaced == 0, "those that were scaled away were not lost"


def test_a_service_is_recorded_while_that_is_asked_for(fleet: Served) -> None:
    fleet.when(lambda fleet: "ready" in [state for _, state in drafters(fleet)])

    def passes() -> Counter[str]:
        return Counter(
            event.name
            for part in fleet.ask("trace")
            for event in part.events
            if isinstance(event, Span)
        )

    found: Counter[str] = Counter()

    def look() -> None:
        fleet.ask("recording", True)
        deadline = time.monotonic() + PATIENCE_S
        while not (found[COMPUTE] and found[STEP]):
            assert time.monotonic() < deadline, found
            found.update(passes())
        fleet.ask("recording", False)

    asyncio.run(meanwhile(fleet.now().targets[0].address, "recorded", look))
    assert passes() == Counter()


def test_what_cannot_be_is_refused(fleet: Served, plan: Deployment, tmp_path: Path) -> None:
    broken = plan.model_copy(
        update={"target": plan.target.model_copy(update={"model": str(tmp_path)})}
    )
    for refused, method, arguments in (
        (InvalidRequest, "scale", ("nobody", 1)),
        (InvalidRequest, "scale", ("ngram", 65)),
        (InvalidRequest, "drain", ("nobody",)),
        (ModelRefused, "apply", (broken,)),
    ):
        with pytest.raises(ray.exceptions.RayTaskError) as caught:
            fleet.ask(method, *arguments)
        assert isinstance(cause_of(caught.value), refused), caught.value
    found = fleet.when(
        lambda fleet: (
            [(target.name, target.state) for target in fleet.targets] == [("target-0", "ready")]
        )
    )
    assert (found.model, found.targets[0].state, found.targets[0].incarnation) == (
        plan.target.model,
        "ready",
        0,
    )


def test_another_deployment_changes_what_is_other_in_it_and_nothing_else(
    fleet: Served, plan: Deployment
) -> None:
    before = fleet.place("target-0")
    changed = plan.model_copy(
        update={"pools": (plan.pools[0].model_copy(update={"width": 2, "count": 1}),)}
    )

    def change() -> None:
        assert ("ngram-2", "ready") in drafters(fleet.ask("apply", changed)), (
            "it returns when what is new is ready"
        )
        fleet.when(lambda fleet: drafters(fleet) == [("ngram-2", "ready")])

    asyncio.run(meanwhile(fleet.now().targets[0].address, "changed", change))
    assert fleet.place("target-0") == before
    assert fleet.ask("wanted") == changed


def test_a_controller_that_is_lost_finds_its_fleet_again(fleet: Served) -> None:
    before = fleet.ask("places")
    assert {"target-0", "gateway-0"} < set(before)

    def lose() -> None:
        os.kill(
            next(actor["Pid"] for actor in actors().values() if actor["Name"] == NAME),
            signal.SIGKILL,
        )
        deadline = time.monotonic() + PATIENCE_S
        while True:  # Ray says that it restarts, until it has
            try:
                assert fleet.ask("places") == before
                return
            except ray.exceptions.RayActorError:
                assert time.monotonic() < deadline
                time.sleep(0.1)

    asyncio.run(meanwhile(fleet.now().targets[0].address, "orphaned", lose))
    fleet.ask("scale", "ngram", 0)
    assert drafters(fleet.when(lambda fleet: not fleet.drafters)) == []


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_target_that_is_lost_is_replaced(blow: int, fleet: Served) -> None:
    lives = fleet.now().targets[0].incarnation
    os.kill(fleet.place("target-0").pid, blow)
    found = fleet.when(
        lambda fleet: fleet.targets[0].incarnation > lives and fleet.targets[0].state == "ready"
    )
    assert (found.targets[0].name, found.targets[0].restarts) == ("target-0", lives + 1)
    asyncio.run(meanwhile(found.targets[0].address, f"after-{blow}", lambda: None))


def test_a_target_that_is_drained_ends_when_its_sessions_are_over(fleet: Served) -> None:
    async def drained() -> None:
        async with stream(fleet.now().targets[0].address, "last") as text:
            await text.more(5)
            found: Fleet = await asyncio.to_thread(fleet.ask, "drain", "target-0")
            assert [target.state for target in found.targets] == ["draining"]
            await text.more(50)
        await asyncio.to_thread(fleet.when, lambda fleet: not fleet.targets)

    asyncio.run(drained())
