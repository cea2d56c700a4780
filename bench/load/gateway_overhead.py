"""The time that the gateway adds to each token: the same streams from the target itself and through
the gateway, in alternation."""

import asyncio
import statistics
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from actors.rpc.client import GrpcTarget
from bench.chaos.clients import ReferenceCase
from bench.load.http_client import ask, completion_body, http_request
from bench.load.served_fleet import ServedFleet, cpu_seconds
from runtime.core.messages import Request
from runtime.telemetry.reports import TargetReport

MAX_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class GatewayOverhead:
    """The overhead for plain decoding, in seconds.

    In plain decoding each token is one step and one event, which is the most work for a gateway.

    step     the target's step with all streams in it
    direct   time between tokens of a stream from the target
    through  the same through the gateway
    gateway  the gateway's processor time per token
    wrong    answers that differed from plain decoding
    """

    streams: int
    step: float
    direct: float
    through: float
    gateway: float
    wrong: int

    @property
    def share(self) -> float:
        return (self.through - self.direct) / self.step

    @property
    def met(self) -> bool:
        return not self.wrong and self.share <= MAX_SHARE

    def rows(self) -> list[tuple[str, str]]:
        times = f"{1e3 * self.direct:.2f} ms, {1e3 * self.through:.2f} ms"
        return [
            (
                f"inter-token time at {self.streams} streams: target, through the gateway",
                times,
            ),
            (
                "the target's step; the gateway's processor time per token",
                f"{1e3 * self.step:.2f} ms; {1e3 * self.gateway:.2f} ms",
            ),
            (f"overhead / step (goal: at most {MAX_SHARE:.0%})", f"{self.share:.1%}"),
        ]


async def gateway_overhead(
    site: ServedFleet, cases: Sequence[ReferenceCase], streams: int, rounds: int
) -> GatewayOverhead:
    """Measure `rounds` rounds of concurrent streams each way; report medians over all streams."""
    asked = [cases[number % len(cases)] for number in range(streams)]
    direct, through = list[float](), list[float]()
    tokens, spent, wrong = 0, 0.0, 0
    before = await asyncio.to_thread(site.report)
    for _ in range(rounds):
        direct += await stream_from_target(site, asked)
        began = cpu_seconds(site.pids["gateway-0"])
        replies = await asyncio.gather(
            *(
                ask(
                    site.port,
                    http_request(completion_body(site.model, case, speculative={"enabled": False})),
                )
                for case in asked
            )
        )
        spent += cpu_seconds(site.pids["gateway-0"]) - began
        tokens += sum(len(case.expected.tokens) for case in asked)
        wrong += sum(not reply.is_correct(case) for reply, case in zip(replies, asked, strict=True))
        through += [
            inter_token_time(reply.piece_times, case)
            for reply, case in zip(replies, asked, strict=True)
        ]
    step = mean_step(before, await asyncio.to_thread(site.report))
    return GatewayOverhead(
        streams, step, statistics.median(direct), statistics.median(through), spent / tokens, wrong
    )


async def stream_from_target(site: ServedFleet, asked: Sequence[ReferenceCase]) -> list[float]:
    target = GrpcTarget(site.target)
    try:
        return await asyncio.gather(*(time_stream(target, case) for case in asked))
    finally:
        await target.close()


async def time_stream(target: GrpcTarget, case: ReferenceCase) -> float:
    now, piece_times = asyncio.get_running_loop().time, list[float]()
    async with aclosing(
        target.generate(Request(uuid.uuid4().hex, case.prompt, case.sampling, speculation=False))
    ) as chunks:
        async for _ in chunks:
            piece_times.append(now())
    return inter_token_time(piece_times, case)


def inter_token_time(piece_times: Sequence[float], case: ReferenceCase) -> float:
    """Return the mean seconds between tokens."""
    return (
        (piece_times[-1] - piece_times[0]) / (len(case.expected.tokens) - 1) if piece_times else 0.0
    )


def mean_step(before: TargetReport, after: TargetReport) -> float:
    spent = [report.computed + report.waited + report.bookkeeping for report in (before, after)]
    return (spent[1] - spent[0]) / (after.steps - before.steps)
