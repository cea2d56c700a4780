"""Clients that send requests in a loop, compare every answer with plain decoding, and measure what
they see of a target's death."""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from actors.compose import build_target
from actors.fleet.fleet_state import DrafterState, Fleet, TargetState
from actors.routing.router import Router
from actors.rpc.client import GrpcTarget
from bench.chaos.chaos_report import Gap
from runtime.config import TargetConfig
from runtime.core.errors import OutriderError
from runtime.core.messages import Chunk, FinishReason, Request, Tokens
from runtime.core.sampling_params import SamplingParams
from runtime.models.loader import load_tokenizer

PROMPTS = (
    "def copy_file(src, dst):\n",
    "import os\n\n\nclass Reader:\n",
    "for name in sorted(",
    "    if self._lock.acquire(",
    "class Error(Exception):\n    def __init__(self",
    "def test_parse(self):\n        self.assertEqual(",
    "try:\n    from collections import",
    "# größere Änderungen: é, 世界\nx = ",
)
TEMPERATURES = (0.0, 0.6, 1.0)
DEADLINE_S = 300.0


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: Tokens
    text: str
    reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class ReferenceCase:
    """A request with the answer of plain decoding."""

    prompt: Tokens
    sampling: SamplingParams
    expected: Answer


@dataclass(slots=True)
class Call:
    """The time during which a session was at one target."""

    address: str
    began: float
    ended: float = math.inf


@dataclass(frozen=True, slots=True)
class Hit:
    """When a fault hit a target, and the name of the signal."""

    at: float
    signal: str


@dataclass(slots=True)
class Observations:
    """The observations of all clients. Times are the event loop's, or seconds.

    calls        the calls of each running session, in order
    hits         the fault of each target that was hit, by address
    gaps         of all sessions, one for each target they left
    down         since when each lost member is away, by name
    returned     how long each returned member was away
    wrong        one line for each answer that failed or differed
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    hits: dict[str, Hit] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    down: dict[str, float] = field(default_factory=dict)
    returned: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(
        default_factory=Counter
    )  # "finished", "failed", "differing", "tokens"

    async def record_call(
        self, address: str, session: str, chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Chunk, None]:
        """Pass on a target's chunks for a session and record the start and end of the call."""
        now = asyncio.get_running_loop().time
        call = Call(address, now())
        self.calls.setdefault(session, []).append(call)
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
        finally:
            call.ended = now()

    def update_downtime(self, fleet: Fleet, now: float) -> None:
        """Note which members are away and which have returned."""
        members: list[TargetState | DrafterState] = [*fleet.targets, *fleet.drafters]
        for member in members:
            if member.restarts and member.state == "starting":
                self.down.setdefault(member.name, now)
            elif member.name in self.down and member.state == "ready":
                self.returned.append(now - self.down.pop(member.name))


class ObservedTarget(GrpcTarget):
    """A target client that records which sessions it gets, and for how long."""

    def __init__(self, address: str, seen: Observations) -> None:
        super().__init__(address)
        self._seen = seen

    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        return self._seen.record_call(self.address, request.session, super().generate(request))


async def build_cases(
    config: TargetConfig, count: int, tokens: int, seed: int
) -> list[ReferenceCase]:
    """Build `count` requests and answer each with this target alone, in this process.

    No two share their beginning: a cache of one text does not help another.
    """
    tokenizer = await asyncio.to_thread(load_tokenizer, config.model)
    target = (await asyncio.to_thread(build_target, config)).target
    target.start()
    try:
        asked = [
            (
                tuple(tokenizer.encode(f"# {number}\n{PROMPTS[number % len(PROMPTS)]}")),
                SamplingParams(
                    temperature=TEMPERATURES[number % len(TEMPERATURES)],
                    seed=seed + number,
                    max_tokens=tokens,
                    ignore_eos=True,
                ),
            )
            for number in range(count)
        ]
        plain = [
            Request(str(number), *request, speculation=False)
            for number, request in enumerate(asked)
        ]
        found = await asyncio.gather(
            *(collect_answer(target.generate(request)) for request in plain)
        )
        return [
            ReferenceCase(*request, expected)
            for request, expected in zip(asked, found, strict=True)
        ]
    finally:
        await target.stop()


async def collect_answer(chunks: AsyncGenerator[Chunk, None]) -> Answer:
    return join_chunks([chunk async for chunk in chunks])


def join_chunks(chunks: Sequence[Chunk]) -> Answer:
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    return Answer(
        tokens,
        "".join(piece for chunk in chunks for piece in chunk.pieces),
        chunks[-1].finish_reason,
    )


async def run_client(
    router: Router,
    known: Sequence[ReferenceCase],
    number: int,
    over: asyncio.Event,
    seen: Observations,
) -> None:
    """Send one case after the other until `over` is set; the last request still gets its full
    answer."""
    while not over.is_set():
        case, session = known[number % len(known)], f"chaos-{number}"
        try:
            await ask_and_compare(router, case, session, seen)
        except OutriderError as error:
            seen.counts["failed"] += 1
            seen.wrong.append(f"{session}: {type(error).__name__}: {error}")
        del seen.calls[session]
        number += len(known) * 1000 + 1  # a new session name and the next case


async def ask_and_compare(
    router: Router, case: ReferenceCase, session: str, seen: Observations
) -> None:
    now = asyncio.get_running_loop().time
    chunks, gaps = list[Chunk](), list[Gap]()
    last, served = now(), 0  # time and call index of the last piece
    calls = seen.calls[session] = list[Call]()
    async with aclosing(
        router.generate(Request(session, case.prompt, case.sampling, deadline=DEADLINE_S))
    ) as pieces:
        async for chunk in pieces:
            at = now()
            if len(calls) - 1 > served:
                left = calls[served]
                hit = seen.hits.get(left.address)
                if hit is not None and hit.at > left.ended:  # after the session had left it
                    hit = None
                since = last if hit is None else max(last, hit.at)
                gaps.append(
                    Gap(
                        left.ended - since,
                        calls[-1].began - left.ended,
                        at - calls[-1].began,
                        cause="" if hit is None else hit.signal,
                    )
                )
            last, served = at, len(calls) - 1
            chunks.append(chunk)
    if len(gaps) == 1 and (stats := chunks[-1].stats) is not None:
        gaps = [
            replace(gaps[0], prefill=stats.prefill)
        ]  # the stats come from the second target alone: the lost one reported none
    seen.gaps += gaps
    answer = join_chunks(chunks)
    seen.counts["tokens"] += len(answer.tokens)
    seen.counts["finished"] += 1
    if answer.reason in ("error", "deadline", "cancelled"):
        seen.counts["failed"] += 1
        seen.wrong.append(f"{session}: ended by {answer.reason}: {chunks[-1].error}")
    elif answer != case.expected:
        seen.counts["differing"] += 1
        place = next(
            (
                place
                for place, pair in enumerate(zip(answer.tokens, case.expected.tokens, strict=False))
                if len(set(pair)) > 1
            ),
            None,
        )
        targets = [call.address for call in calls]
        seen.wrong.append(
            f"{session}: differs at token {place}, on targets {targets}, temperature "
            f"{case.sampling.temperature:g}"
        )
