"""Clients that ask again and again, compare every answer with plain decoding, and measure what they see of a target's death."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from actors.compose import build_target
from actors.grpc_links import GrpcTarget
from actors.router import Router
from runtime.config import TargetConfig
from runtime.errors import OutriderError
from runtime.messages import Chunk, FinishReason, Request, Tokens
from runtime.models.load import load_tokenizer
from runtime.sampling import Sampling

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
class Case:
    """A request, and what plain decoding answers to it."""

    prompt: Tokens
    sampling: Sampling
    expected: Answer


@dataclass(slots=True)
class Seen:
    """What all clients have seen. Times are the event loop's, or seconds.

    asked   addresses of the targets that each session under way was given to, one after the other
    struck  by a target's address, when it was struck
    gaps    of each session that has left a target: from the blow, or from the last piece where that came later, to the next piece
    wrong   one line for each answer that failed or differed
    """

    asked: dict[str, list[str]] = field(default_factory=dict)
    struck: dict[str, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # "finished", "failed", "differing", "tokens"


class Watched(GrpcTarget):
    """A target that notes which sessions it is given."""

    def __init__(self, address: str, seen: Seen) -> None:
        super().__init__(address)
        self._seen = seen

    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        self._seen.asked.setdefault(request.session, []).append(self.address)
        return super().generate(request)


async def cases(config: TargetConfig, count: int, tokens: int, seed: int) -> list[Case]:
    """So many requests, each answered by this target alone, in this process."""
    tokenizer = await asyncio.to_thread(load_tokenizer, config.model)
    target = (await asyncio.to_thread(build_target, config)).target
    target.start()
    try:
        asked = [
            (
                tuple(tokenizer.encode(PROMPTS[number % len(PROMPTS)])),
                Sampling(temperature=TEMPERATURES[number % len(TEMPERATURES)], seed=seed + number, max_tokens=tokens, ignore_eos=True),
            )
            for number in range(count)
        ]
        plain = [Request(str(number), *request, speculation=False) for number, request in enumerate(asked)]
        found = await asyncio.gather(*(answer_of(target.generate(request)) for request in plain))
        return [Case(*request, expected) for request, expected in zip(asked, found, strict=True)]
    finally:
        await target.stop()


async def answer_of(chunks: AsyncGenerator[Chunk, None]) -> Answer:
    return joined([chunk async for chunk in chunks])


def joined(chunks: Sequence[Chunk]) -> Answer:
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    return Answer(tokens, "".join(piece for chunk in chunks for piece in chunk.pieces), chunks[-1].finish_reason)


async def stream(router: Router, known: Sequence[Case], number: int, over: asyncio.Event, seen: Seen) -> None:
    """Ask one case after the other until it is over; what was asked before is answered to its end."""
    while not over.is_set():
        case, session = known[number % len(known)], f"chaos-{number}"
        try:
            await ask(router, case, session, seen)
        except OutriderError as error:
            seen.counts["failed"] += 1
            seen.wrong.append(f"{session}: {type(error).__name__}: {error}")
        del seen.asked[session]
        number += len(known) * 1000 + 1  # a name of its own, the next case


async def ask(router: Router, case: Case, session: str, seen: Seen) -> None:
    now = asyncio.get_running_loop().time
    chunks: list[Chunk] = []
    last, served = now(), 0  # the last piece, and which of the targets asked sent it
    asked = seen.asked[session] = list[str]()
    async with aclosing(router.generate(Request(session, case.prompt, case.sampling, deadline=DEADLINE_S))) as pieces:
        async for chunk in pieces:
            at = now()
            if len(asked) - 1 > served:
                seen.gaps.append(at - max(last, seen.struck.get(asked[served], last)))
            last, served = at, len(asked) - 1
            chunks.append(chunk)
    answer = joined(chunks)
    seen.counts["tokens"] += len(answer.tokens)
    seen.counts["finished"] += 1
    if answer.reason in ("error", "deadline", "cancelled"):
        seen.counts["failed"] += 1
        seen.wrong.append(f"{session}: ended by {answer.reason}: {chunks[-1].error}")
    elif answer != case.expected:
        seen.counts["differing"] += 1
        place = next(
            (place for place, pair in enumerate(zip(answer.tokens, case.expected.tokens, strict=False)) if len(set(pair)) > 1), None
        )
        seen.wrong.append(f"{session}: differs at token {place}, on targets {asked}, temperature {case.sampling.temperature:g}")
