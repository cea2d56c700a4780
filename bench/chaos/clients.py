"""Clients that ask again and again, compare every answer with plain decoding, and measure what they see of a target's death."""

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
    """A request, and what plain decoding answers to it."""

    prompt: Tokens
    sampling: SamplingParams
    expected: Answer


@dataclass(slots=True)
class Call:
    """Of a session at one target: when it was asked, and when that was over."""

    address: str
    began: float
    ended: float = math.inf


@dataclass(slots=True)
class Observations:
    """What all clients have seen. Times are the event loop's, or seconds.

    calls     of each session under way, one after the other
    fault_times    by a target's address, when it was fault_times
    gaps      of all sessions, one for each target that they left
    down      by the name of each member that is lost, since when
    returned  how long those were away that are back
    wrong     one line for each answer that failed or differed
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    fault_times: dict[str, float] = field(default_factory=dict)
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
        """What this target says to this session, with when it was asked and when that was over."""
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
        """Who is away, and who is back."""
        members: list[TargetState | DrafterState] = [*fleet.targets, *fleet.drafters]
        for member in members:
            if member.restarts and member.state == "starting":
                self.down.setdefault(member.name, now)
            elif member.name in self.down and member.state == "ready":
                self.returned.append(now - self.down.pop(member.name))


class ObservedTarget(GrpcTarget):
    """A target that notes which sessions it is given, and how long it has them."""

    def __init__(self, address: str, seen: Observations) -> None:
        super().__init__(address)
        self._seen = seen

    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        return self._seen.record_call(self.address, request.session, super().generate(request))


async def build_cases(
    config: TargetConfig, count: int, tokens: int, seed: int
) -> list[ReferenceCase]:
    """So many requests, each answered by this target alone, in this process."""
    tokenizer = await asyncio.to_thread(load_tokenizer, config.model)
    target = (await asyncio.to_thread(build_target, config)).target
    target.start()
    try:
        asked = [
            (
                tuple(tokenizer.encode(PROMPTS[number % len(PROMPTS)])),
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
    """Ask one case after the other until it is over; what was asked before is answered to its end."""
    while not over.is_set():
        case, session = known[number % len(known)], f"chaos-{number}"
        try:
            await ask_and_compare(router, case, session, seen)
        except OutriderError as error:
            seen.counts["failed"] += 1
            seen.wrong.append(f"{session}: {type(error).__name__}: {error}")
        del seen.calls[session]
        number += len(known) * 1000 + 1  # a name of its own, the next case


async def ask_and_compare(
    router: Router, case: ReferenceCase, session: str, seen: Observations
) -> None:
    now = asyncio.get_running_loop().time
    chunks, gaps = list[Chunk](), list[Gap]()
    last, served = now(), 0  # the last piece, and which of the calls it came by
    calls = seen.calls[session] = list[Call]()
    async with aclosing(
        router.generate(Request(session, case.prompt, case.sampling, deadline=DEADLINE_S))
    ) as pieces:
        async for chunk in pieces:
            at = now()
            if len(calls) - 1 > served:
                left = calls[served]
                since = max(last, min(seen.fault_times.get(left.address, last), left.ended))
                gaps.append(
                    Gap(left.ended - since, calls[-1].began - left.ended, at - calls[-1].began)
                )
            last, served = at, len(calls) - 1
            chunks.append(chunk)
    if len(gaps) == 1 and (stats := chunks[-1].stats) is not None:
        gaps = [
            replace(gaps[0], prefill=stats.prefill)
        ]  # a lost target takes its own figures along: this is of the other
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
            f"{session}: differs at token {place}, on targets {targets}, temperature {case.sampling.temperature:g}"
        )
