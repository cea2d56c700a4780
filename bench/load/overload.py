"""Tenfold overload: refused requests are answered at once, and admitted requests are not slowed
down."""

import asyncio
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.chaos.chaos_report import percentile
from bench.chaos.clients import ReferenceCase
from bench.load.gateway_overhead import inter_token_time
from bench.load.http_client import Reply, ask, completion_body, http_request
from bench.load.served_fleet import ServedFleet

MAX_REFUSAL_S = 0.05
MAX_SLOWDOWN = 1.25  # relative to a gateway at capacity
AT_CAPACITY = 503


@dataclass(frozen=True, slots=True)
class Overload:
    """The result of an overload; times in seconds.

    offered  requests per second: `times` as many as are answered at capacity without refusals
    refused  how long each refused request waited for its refusal
    calm     time between tokens at capacity
    stormy   the same under overload
    wrong    admitted requests whose answer differed from plain decoding, or that failed
    """

    times: float
    offered: float
    admitted: int
    refused: tuple[float, ...]
    calm: float
    stormy: float
    wrong: int

    @property
    def met(self) -> bool:
        return (
            not self.wrong
            and bool(self.refused)
            and percentile(self.refused, 99) <= MAX_REFUSAL_S
            and self.stormy <= MAX_SLOWDOWN * self.calm
        )

    def rows(self) -> list[tuple[str, str]]:
        waits = (
            ", ".join(f"{1e3 * percentile(self.refused, share):.1f} ms" for share in (50, 99, 100))
            if self.refused
            else "none"
        )
        return [
            (
                f"requests per second, {self.times:g} x capacity; admitted, refused",
                f"{self.offered:.0f}; {self.admitted}, {len(self.refused)}",
            ),
            ("admitted or refused wrongly", str(self.wrong)),
            (
                f"time to refuse: p50, p99, max (goal: p99 at most {1e3 * MAX_REFUSAL_S:.0f} ms)",
                waits,
            ),
            (
                f"inter-token time: at capacity, overload (goal: at most {MAX_SLOWDOWN:g} x)",
                f"{1e3 * self.calm:.2f} ms, {1e3 * self.stormy:.2f} ms",
            ),
        ]


async def overload(
    site: ServedFleet,
    cases: Sequence[ReferenceCase],
    places: int,
    times: float,
    seconds: float,
    turns: int,
) -> Overload:
    """Alternate between load at capacity and overload, for `seconds` each.

    At capacity there are as many clients as places, and each sends again when it is answered. Under
    overload requests arrive at `times` that rate, regardless of the answers.
    """
    numbers, offered = itertools.count(), list[float]()
    calm, stormy = Exchanges(), Exchanges()
    for _ in range(turns):
        found = await run_at_capacity(site, cases, places, seconds, numbers)
        offered.append(times * len(found) / seconds)
        calm += found
        stormy += await run_at_rate(site, cases, offered[-1], seconds, numbers)
    served = [(reply, case) for reply, case in stormy if reply.status != AT_CAPACITY]
    return Overload(
        times=times,
        offered=statistics.mean(offered),
        admitted=len(served),
        refused=tuple(
            reply.ended - reply.sent for reply, _ in stormy if reply.status == AT_CAPACITY
        ),
        calm=median_inter_token_time(calm),
        stormy=median_inter_token_time(served),
        wrong=sum(not reply.is_correct(case) for reply, case in (*calm, *served)),
    )


Exchanges = list[tuple[Reply, ReferenceCase]]


async def run_at_capacity(
    site: ServedFleet,
    cases: Sequence[ReferenceCase],
    places: int,
    seconds: float,
    numbers: Iterator[int],
) -> Exchanges:
    now, found = asyncio.get_running_loop().time, Exchanges()
    until = now() + seconds

    async def client() -> None:
        while now() < until:
            found.append(await exchange(site, cases, next(numbers)))

    await asyncio.gather(*(client() for _ in range(places)))
    return found


async def run_at_rate(
    site: ServedFleet,
    cases: Sequence[ReferenceCase],
    rate: float,
    seconds: float,
    numbers: Iterator[int],
) -> Exchanges:
    asking = list[asyncio.Task[tuple[Reply, ReferenceCase]]]()
    async with asyncio.TaskGroup() as group:
        for _ in range(round(rate * seconds)):
            asking.append(group.create_task(exchange(site, cases, next(numbers))))
            await asyncio.sleep(1 / rate)
    return [task.result() for task in asking]


async def exchange(
    site: ServedFleet, cases: Sequence[ReferenceCase], number: int
) -> tuple[Reply, ReferenceCase]:
    case = cases[number % len(cases)]
    return await ask(site.port, http_request(completion_body(site.model, case))), case


def median_inter_token_time(served: Exchanges) -> float:
    """Return the median over all streams of the seconds between tokens."""
    return (
        statistics.median(inter_token_time(reply.piece_times, case) for reply, case in served)
        if served
        else 0.0
    )
