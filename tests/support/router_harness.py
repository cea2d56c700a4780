"""Scripts targets for the router, on an event loop with virtual time."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from tokenizers import Tokenizer

from actors.fleet.fleet_state import TargetState
from actors.routing.router import Router
from runtime.core.errors import OutriderError, TargetDied, Unavailable
from runtime.core.messages import Chunk, Logprob, Request, StandbyText, Stats
from runtime.core.sampling_params import SamplingParams
from runtime.models.detokenize import Detokenizer
from runtime.target.stop_checker import StopChecker
from runtime.target.target import resume_stop_checker
from runtime.telemetry.reports import TargetReport
from tests.support.harness import output
from tests.support.paths import ROOT

Result = TypeVar("Result")
Death = Literal["killed", "silent", "cancelled", "ended"]
DEATHS: tuple[Death, ...] = ("killed", "silent", "cancelled", "ended")
TOKENIZER = Tokenizer.from_file(str(ROOT / "models" / "target" / "tokenizer.json"))
PROMPT: tuple[int, ...] = tuple(TOKENIZER.encode("def größe").ids)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Jumps to its next timer; a wait without one raises AssertionError.

    It is for programs without threads and network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        look = selector.select

        def select(timeout: float | None = None) -> Any:
            events = look(0)
            if not events:
                assert timeout is not None, "nothing is left that could happen"
                self.now += timeout
            return events

        selector.select = select

    def time(self) -> float:
        return self.now


def played(program: Coroutine[Any, Any, Result]) -> Result:
    """Its result, on a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(program)


def finish_of(request: Request) -> StopChecker:
    text = Detokenizer(TOKENIZER, request.prompt)
    return StopChecker(request.sampling, frozenset(), text.decode, text.flush)


class Bare:
    """A target without heartbeats, which keeps no texts of others."""

    async def heartbeats(self) -> AsyncGenerator[None, None]:
        for _ in ():
            yield

    async def standby(self, updates: AsyncGenerator[Sequence[StandbyText], None]) -> None:
        pass


@dataclass(eq=False)
class Scripted(Bare):
    """One life of a target: continues `answer` from the request's place, dies before token `cut`.

    sizes     tokens of its chunks, in turn
    refuses   what it says to every request
    open      calls that are not over
    silent    set when it has fallen silent
    closed    set when its connection is closed
    """

    answer: Sequence[int]
    sizes: Sequence[int] = (1,)
    cut: int | None = None
    death: Death = "killed"
    refuses: OutriderError | None = None
    asked: list[Request] = field(default_factory=list)
    open: int = 0
    silent: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        self.asked.append(request)
        self.open += 1
        try:
            await asyncio.sleep(0)
            if self.refuses is not None:
                raise self.refuses
            for rounds, (start, chunk) in enumerate(spoken(self.answer, request, self.sizes)):
                if self.cut is not None and start + max(1, len(chunk.tokens)) > self.cut:
                    for last in await self.die(figures(request, start, rounds)):
                        yield last
                    return
                yield chunk
                await asyncio.sleep(0)
        finally:
            self.open -= 1

    async def die(self, stats: Stats) -> list[Chunk]:
        """What it still says."""
        match self.death:
            case "killed":
                self.refuses = Unavailable("connection refused")
                raise TargetDied("connection reset")
            case "silent":
                self.silent.set()
                await asyncio.Event().wait()
            case "cancelled":
                self.refuses = Unavailable("stopped")
                return [Chunk((), (), (), "cancelled", stats)]
            case "ended":
                self.refuses = Unavailable("stopped")
        return []

    async def close(self) -> None:
        self.closed = True


def figures(request: Request, completion: int, rounds: int) -> Stats:
    """Of one life: in each round one node more was verified than accepted."""
    accepted = completion - len(request.committed) - rounds
    verified = accepted + rounds
    return Stats(
        len(request.prompt),
        completion,
        rounds,
        verified,
        verified,
        accepted,
        0,
        (rounds,),
        {"d": accepted},
        {},
        1.0,
    )


def spoken(
    answer: Sequence[int], request: Request, sizes: Sequence[int]
) -> Iterator[tuple[int, Chunk]]:
    """The chunks that follow what was committed, each with the number of its first token."""
    finish, place = resume_stop_checker(finish_of(request), request), len(request.committed)
    for rounds, size in enumerate(itertools.cycle(sizes), 1):
        start, reason = place, None
        pieces: list[str] = []
        while len(pieces) < size and reason is None:
            delta = finish.feed(answer[place])
            place, reason = place + 1, delta.reason
            pieces.append(delta.text)
        tokens, count = tuple(answer[start:place]), place - start
        drafters = tuple("d" if index < count - 1 else "" for index in range(count))
        logprobs = tuple(
            Logprob(-token / 7, ((token, -token / 7), (0, -1.0 - number)))
            for number, token in enumerate(tokens, start)
        )
        stats = None if reason is None else figures(request, finish.count, rounds)
        yield start, Chunk(tuple(pieces), tokens, drafters, reason, stats, "", logprobs)
        if reason is not None:
            return


def there(
    name: str,
    incarnation: int = 0,
    state: Literal["starting", "ready", "draining"] = "ready",
    sessions: int = 0,
    slots: int = 0,
) -> TargetState:
    """A target whose address is NAME/INCARNATION."""
    return TargetState(
        name,
        f"{name}/{incarnation}",
        incarnation,
        state,
        sessions,
        TargetReport(kv_slots=slots),
        "node",
    )


# What is asked of them, and what a client hears

TEXT = "(größe):\n    x = '世界 STO'  # naïve 😀 STOP1\n    return 'STOP!' + x"
ANSWER: tuple[int, ...] = tuple(TOKENIZER.encode(TEXT).ids)
ASKED = Request(
    "s", PROMPT, SamplingParams(stop=("STOP!", "😀 END"), max_tokens=100, logprobs=1, seed=5)
)


@dataclass(frozen=True, slots=True)
class Heard:
    """All that a client sees, token by token."""

    pieces: tuple[str, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    reason: str | None
    usage: tuple[int, int] | None


def heard(chunks: Iterable[Chunk]) -> Heard:
    chunks = list(chunks)
    said = output(chunks)
    pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
    logprobs = tuple(logprob for chunk in chunks for logprob in chunk.logprobs)
    return Heard(
        pieces,
        said.tokens,
        logprobs,
        said.reason,
        (said.stats.prompt_tokens, said.stats.completion_tokens),
    )


PLAIN = heard(chunk for _, chunk in spoken(ANSWER, ASKED, (1,)))
COUNT = len(PLAIN.tokens)


def stage(*targets: Scripted) -> tuple[Router, list[TargetState]]:
    """A router that reaches these, named t0, t1, ...; they are there, with no session."""
    named = [there(f"t{number}") for number in range(len(targets))]
    by_address = {state.address: target for state, target in zip(named, targets, strict=True)}
    router = Router(by_address.__getitem__)
    router.update(named)
    return router, named


async def all_of(chunks: AsyncGenerator[Chunk, None]) -> list[Chunk]:
    async with aclosing(chunks):
        return [chunk async for chunk in chunks]
