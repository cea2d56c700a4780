"""`make test-load` in small, on a toy target: everything is counted and right."""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from actors.rpc.server import TargetService
from actors.rpc.server import serve as serve_grpc
from bench.chaos.clients import Answer, ReferenceCase
from bench.load.disconnects import Disconnects, disconnects
from bench.load.gateway_overhead import GatewayOverhead, gateway_overhead, mean_step
from bench.load.overload import Overload, overload
from bench.load.served_fleet import ServedFleet, anonymous_memory, cpu_seconds
from runtime.config import LimitsConfig
from runtime.core.messages import Request
from runtime.core.sampling_params import SamplingParams
from runtime.telemetry.reports import TargetReport
from tests.support.gateway import MODEL, Running, serving, tokenizer
from tests.support.harness import HANG_S, output

PLACES = 24
PROMPTS = ("import os", "def f(", "x = ")
TOKENS = 40


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with serving(limits=LimitsConfig(requests=PLACES)) as running:
        yield running


@pytest.fixture(scope="module")
def cases(gateway: Running) -> list[ReferenceCase]:
    async def plainly() -> list[ReferenceCase]:
        found = []
        for number, prompt in enumerate(PROMPTS):
            asked = (
                tuple(tokenizer().encode(prompt)),
                SamplingParams(
                    temperature=number / 2, seed=number, max_tokens=TOKENS, ignore_eos=True
                ),
            )
            said = output(
                [
                    chunk
                    async for chunk in gateway.body.generate(
                        Request(f"plain-{number}", *asked, speculation=False)
                    )
                ]
            )
            found.append(ReferenceCase(*asked, Answer(said.tokens, said.text, said.reason)))
        return found

    return gateway.network.run(plainly(), HANG_S)


@pytest.fixture(scope="module")
def site(gateway: Running) -> Iterator[ServedFleet]:
    """All in this process."""
    server, port = gateway.network.run(served(gateway.body), HANG_S)
    pids = {"gateway-0": os.getpid()}
    yield ServedFleet(gateway.port(), MODEL, f"127.0.0.1:{port}", gateway.body.report, pids)
    gateway.network.run(server.stop(None), HANG_S)


async def served(target: Any) -> Any:
    return await serve_grpc([TargetService(target)], "127.0.0.1")


def test_what_the_gateway_adds(site: ServedFleet, cases: list[ReferenceCase]) -> None:
    found = asyncio.run(gateway_overhead(site, cases, streams=4, rounds=2))
    assert found.wrong == 0
    assert min(found.step, found.direct, found.through) > 0
    wrong = replace(cases[0], expected=replace(cases[0].expected, text="?"))
    assert asyncio.run(gateway_overhead(site, [wrong], streams=1, rounds=1)).wrong == 1


def test_beyond_its_places_a_gateway_refuses_and_answers_the_others(
    site: ServedFleet, cases: list[ReferenceCase]
) -> None:
    with serving(limits=LimitsConfig(requests=2)) as small:
        found = asyncio.run(
            overload(
                replace(site, port=small.port()), cases, places=2, times=10.0, seconds=0.3, turns=1
            )
        )
    assert found.wrong == 0
    assert found.admitted > 0
    assert found.refused


def test_clients_that_leave_free_everything(
    gateway: Running, site: ServedFleet, cases: list[ReferenceCase]
) -> None:
    found = asyncio.run(disconnects(site, cases, clients=16, warm=8, seed=1))
    assert found.right
    assert (found.clients, len(found.freed)) == (16, 2)
    assert max(found.freed) < HANG_S
    gateway.eventually(gateway.free)


COST = GatewayOverhead(16, step=0.010, direct=0.011, through=0.0114, gateway=0.0002, wrong=0)
CROWD = Overload(10.0, 100.0, 20, (0.001, 0.049), calm=0.020, stormy=0.024, wrong=0)
LEFT = Disconnects(16, (0.1, 0.9), {"gateway-0": 2 << 20, "target-0": -(1 << 20)}, right=True)


@pytest.mark.parametrize(
    "bad",
    [
        replace(COST, through=0.012),
        replace(COST, wrong=1),
        replace(CROWD, refused=(0.051,)),
        replace(CROWD, refused=()),
        replace(CROWD, stormy=0.026),
        replace(CROWD, wrong=1),
        replace(LEFT, freed=(0.1, 1.1)),
        replace(LEFT, grown={"gateway-0": 21 << 20}),
        replace(LEFT, right=False),
    ],
)
def test_a_goal_is_met_only_where_all_of_it_is(
    bad: GatewayOverhead | Overload | Disconnects,
) -> None:
    assert COST.met
    assert CROWD.met
    assert LEFT.met
    assert not bad.met


def test_what_is_shown() -> None:
    shown = dict([*COST.rows(), *CROWD.rows(), *LEFT.rows()])
    assert "4.0%" in shown.values()
    assert "1.0 ms, 49.0 ms, 49.0 ms" in shown.values()
    assert "gateway-0 +2.0, target-0 -1.0; growth 2.0" in shown.values()


def test_the_step_and_what_a_process_takes() -> None:
    before = TargetReport(steps=10, computed=1.0, waited=0.5, bookkeeping=0.5)
    assert mean_step(
        before, replace(before, steps=20, computed=1.1, bookkeeping=0.6)
    ) == pytest.approx(0.02)
    assert anonymous_memory(os.getpid()) > 1 << 20
    assert cpu_seconds(os.getpid()) > 0
