"""The chaos harness decides and counts; tests/system/cluster/test_chaos.py runs it."""

import asyncio
import random
from collections.abc import AsyncGenerator
from dataclasses import replace
from itertools import pairwise

import pytest

from actors.fleet.fleet_state import DrafterState, Fleet
from actors.routing.router import Router
from actors.rpc.endpoints import ActorLocation
from bench.chaos.chaos_report import ChaosReport, Gap, percentile
from bench.chaos.clients import Answer, Hit, Observations, ReferenceCase, run_client
from bench.chaos.faults import Fault, inject, next_count, next_fault
from runtime.core.errors import Unavailable
from runtime.core.messages import Chunk, Request
from tests.support.router_harness import ANSWER, ASKED, COUNT, PLAIN, Scripted, played, there

DRAFTER = DrafterState("d-0", "d", "d/0", 0, "ready", 0, None, "node")
FLEET = Fleet(
    "m",
    "m",
    "1",
    (there("t0"), there("t1")),
    (DRAFTER, replace(DRAFTER, name="d-1", state="starting")),
    (),
    (),
    0,
)
GAPS = (
    Gap(0.25, 0.0, 0.25),
    Gap(0.0, 0.5, 0.5, 0.25, cause="SIGKILL"),
    Gap(2.0, 0.0, 0.5, 0.125, cause="SIGSTOP"),
)
OUTCOME = ChaosReport(8, 2, 1, 0, 10.0, 30, 0, 0, 0, 900, 3, 0, {"target SIGKILL": 1}, GAPS)


def test_blows_fall_on_all_that_serve_but_never_on_the_last_target() -> None:
    draw = random.Random(0)
    blows = {blow.name for _ in range(100) if (blow := next_fault(FLEET, set(), draw))}
    assert blows == {"t0", "t1", "d-0"}
    blows = {blow.name for _ in range(100) if (blow := next_fault(FLEET, {("t0", 0)}, draw))}
    assert blows == {"d-0"}, "t1 is the last whole target"
    assert next_fault(replace(FLEET, drafters=()), {("t0", 0)}, draw) is None


def test_a_blow_misses_who_has_moved_or_is_gone() -> None:
    blow = next_fault(replace(FLEET, targets=()), set(), random.Random(0))
    assert isinstance(blow, Fault)
    assert not inject(blow, {})
    assert not inject(blow, {"d-0": ActorLocation("elsewhere", 1, "node")})
    assert not inject(blow, {"d-0": ActorLocation("d/0", 2**22 + 1, "node")}), (
        "no process has this number"
    )


def test_the_number_of_drafters_changes_each_time() -> None:
    draw, counts = random.Random(0), [0]
    for _ in range(50):
        counts.append(next_count(counts[-1], 4, draw))
    assert set(counts) == {0, 1, 2, 3, 4}
    assert all(one != other for one, other in pairwise(counts))


def test_percentiles() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (50, 99, 100)] == [50.0, 99.0, 100.0]
    assert percentile([7.0], 99) == 7.0


@pytest.mark.parametrize(
    "bad", [{"failed": 1}, {"differing": 1}, {"unfinished": 1}, {"finished": 0}]
)
def test_an_outcome_is_right_only_where_all_of_it_is(bad: dict[str, int]) -> None:
    wrong = ChaosReport(**{name: getattr(OUTCOME, name) for name in OUTCOME.__slots__} | bad)
    assert OUTCOME.passed
    assert not wrong.passed
    parts = OUTCOME.as_json()["parts"]
    assert (
        parts["gap at a target's death"]["p99"],
        parts["noticed"]["p50"],
        parts["read in"]["p99"],
    ) == (2.5, 0.25, 0.25)
    assert (parts["gap at SIGKILL"]["p99"], parts["gap at SIGSTOP"]["p99"]) == (1.0, 2.5)
    assert OUTCOME.as_json()["left_by_mistake"] == 1
    assert "1.00 s, 2.50 s, 2.50 s" in OUTCOME.grid().markdown()


def test_a_client_compares_and_measures() -> None:
    """A target falls silent after 9 tokens and is hit 2 s later; 4 s later it is missed."""

    async def main(expected: Answer) -> Observations:
        seen, over = Observations(), asyncio.Event()
        lives = {"t0/0": Scripted(ANSWER, cut=9, death="silent"), "t1/0": Scripted(ANSWER)}

        class Noted(Scripted):
            def __init__(self, address: str) -> None:
                super().__init__(ANSWER, cut=lives[address].cut, death=lives[address].death)
                self.address = address
                lives[address] = self

            def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
                return seen.record_call(self.address, request.session, super().generate(request))

        router = Router(Noted)
        router.update([there("t0"), there("t1")])
        asking = asyncio.ensure_future(
            run_client(
                router, [ReferenceCase(ASKED.prompt, ASKED.sampling, expected)], 0, over, seen
            )
        )
        await lives["t0/0"].silent.wait()
        await asyncio.sleep(2.0)
        seen.hits["t0/0"] = Hit(asyncio.get_running_loop().time(), "SIGSTOP")
        await asyncio.sleep(4.0)
        over.set()
        router.update([there("t1")])
        await asking
        return seen

    right = Answer(PLAIN.tokens, "".join(PLAIN.pieces), "stop")
    seen = played(main(right))
    assert (seen.counts["finished"], seen.counts["differing"], seen.counts["tokens"]) == (
        1,
        0,
        COUNT,
    )
    (gap,) = seen.gaps
    assert [gap.noticed, gap.placed, gap.answered] == pytest.approx([4.0, 0.0, 0.0])
    assert gap.cause == "SIGSTOP"
    assert not seen.wrong
    seen = played(main(replace(right, tokens=(*right.tokens[:-1], 5))))
    assert seen.counts["differing"] == 1
    assert f"differs at token {COUNT - 1}" in seen.wrong[0]


def test_who_is_away_is_timed_until_it_is_back() -> None:
    seen = Observations()
    seen.update_downtime(FLEET, 0.0)
    (target, *others) = FLEET.targets
    away, back = replace(target, state="starting", restarts=1), replace(target, restarts=1)
    for at, state in ((1.0, away), (2.0, away), (8.0, back), (9.0, back)):
        seen.update_downtime(replace(FLEET, targets=(state, *others)), at)
    assert seen.returned == [7.0]


def test_an_answer_that_fails_is_counted() -> None:
    async def main() -> Observations:
        seen, over = Observations(), asyncio.Event()
        router = Router(lambda _: Scripted(ANSWER, refuses=Unavailable("gone")))
        router.update([there("t0")])
        asking = asyncio.ensure_future(
            run_client(
                router,
                [ReferenceCase(ASKED.prompt, ASKED.sampling, Answer((), "", "stop"))],
                0,
                over,
                seen,
            )
        )
        over_soon = asyncio.get_running_loop().call_later(1.0, over.set)
        await asking
        over_soon.cancel()
        return seen

    seen = played(main())
    assert (seen.counts["failed"], seen.counts["finished"]) == (1, 0)
    assert "no target accepted the session" in seen.wrong[0]
