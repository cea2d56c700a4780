"""Runs targets and drafters in lock-step on one thread, or with threads as in production."""

import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from runtime.core.draft_nodes import DraftNodes
from runtime.core.errors import LinkLost
from runtime.core.links import DraftLink
from runtime.core.messages import (
    Chunk,
    Event,
    FeatureRequest,
    FinishReason,
    Logprob,
    Reply,
    Request,
    Round,
    Stats,
    Style,
)
from runtime.core.sampler_reference import Sampler, reference_sample
from runtime.core.sampling_params import SamplingParams
from runtime.draft.commands import EventReceived
from runtime.draft.draft_engine import DraftEngine
from runtime.draft.draft_host import DraftHost
from runtime.drafters.base import Drafter, ExpandRequest, Text
from runtime.models.base import Model
from runtime.schedulers.base import Plan, Scheduler, SessionView
from runtime.schedulers.fixed import Fixed
from runtime.scoring.calibration import Calibration
from runtime.target.commands import AddRequest, Join, Leave, ReplyReceived
from runtime.target.engine import Engine
from runtime.target.stop_checker import StopChecker
from runtime.target.target import GrammarCompiler, Target
from runtime.target.verifier import Verifier
from tests.contracts.link_contract import soon

HANG_S = 60.0  # a wait that takes so long is a fault, and fails
NOBODY: frozenset[int] = frozenset()


# What is asked and what comes out


@dataclass(frozen=True, slots=True)
class Output:
    """Everything a caller sees of one generation."""

    text: str
    tokens: tuple[int, ...]
    drafters: tuple[str, ...]
    reason: FinishReason | None
    stats: Stats
    error: str
    logprobs: tuple[Logprob, ...] = ()

    def said(self) -> tuple[object, ...]:
        """What must not depend on drafters: text, ids, the reason of the end, usage."""
        return (
            self.text,
            self.tokens,
            self.reason,
            self.error,
            self.stats.prompt_tokens,
            self.stats.completion_tokens,
        )


def output(chunks: Iterable[Chunk]) -> Output:
    """Chunks joined; nothing follows the one with a finish reason."""
    *others, last = chunks
    assert last.stats is not None
    assert all(chunk.finish_reason is None for chunk in others)
    assert all(chunk.tokens or chunk.prompt_logprobs or any(chunk.pieces) for chunk in others)
    pieces, tokens, drafters = (
        tuple(itertools.chain(*parts))
        for parts in zip(*map(parallel, (*others, last)), strict=True)
    )
    logprobs = tuple(itertools.chain(*(chunk.logprobs for chunk in (*others, last))))
    return Output(
        "".join(pieces), tokens, drafters, last.finish_reason, last.stats, last.error, logprobs
    )


def parallel(chunk: Chunk) -> tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...]]:
    assert len(chunk.tokens) == len(chunk.drafters)
    assert len(chunk.pieces) == (len(chunk.tokens) or len(chunk.pieces[:1]))  # text held back
    assert len(chunk.logprobs) in (0, len(chunk.tokens))
    return chunk.pieces, chunk.tokens, chunk.drafters


def letter(token: int) -> str:
    """The text of a token, in tests that need no tokenizer."""
    return chr(ord("a") + token % 26)


def lettering(eos: frozenset[int] = NOBODY) -> Callable[[Request], StopChecker]:
    return lambda request: StopChecker(request.sampling, eos, letter, lambda: "")


def asking(
    prompt: Sequence[int], session: str = "s", speculation: bool = True, **sampling: Any
) -> Request:
    return Request(
        session, tuple(prompt), SamplingParams(**{"max_tokens": 24, **sampling}), speculation
    )


# Drafters


class Known:
    """Knows the output: its first guess is right; the others and all below them are wrong."""

    feature_spec = None

    def __init__(self, text: Sequence[int], vocabulary: int, branches: int = 1) -> None:
        self.text, self.vocabulary, self.branches = list(text), vocabulary, branches

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes]:
        return [self.guess(request.text, request.leaves) for request in requests]

    def guess(self, text: Text, leaves: Sequence[int]) -> DraftNodes:
        found: list[tuple[int, int, float]] = []
        for leaf in leaves:
            before = [*text.tokens, *text.tree.tokens_to(leaf)]
            right = len(before) < len(self.text) and before == self.text[: len(before)]
            first = self.text[len(before)] if right else before[-1]
            tokens = [
                (first + rank + (not right)) % self.vocabulary for rank in range(self.branches)
            ]
            found.extend(
                (leaf, token, -0.1 if rank == 0 else -2.0) for rank, token in enumerate(tokens)
            )
        return children(found)

    def close(self, session: str) -> None:
        pass


class Mute:
    feature_spec = None

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes]:
        return [children([]) for _ in requests]

    def close(self, session: str) -> None:
        pass


def children(found: Sequence[tuple[int, int, float]]) -> DraftNodes:
    parents, tokens, scores = zip(*found, strict=True) if found else ((), (), ())
    return DraftNodes(
        np.asarray(parents, np.int32), np.asarray(tokens, np.int32), np.asarray(scores, np.float32)
    )


# Lock-step: no thread, no clock, the same in every run


Tamper = Callable[[Any], Iterable[Any]]  # what becomes of one message on the way


def score_of(calibration: Calibration, rank: int, said: float) -> float:
    """Of one node."""
    return float(calibration.scores(np.array([rank]), np.array([said]))[0])


def engine_of(
    model: Model, rows: int = 8, eos: frozenset[int] = NOBODY, chooser: Sampler = reference_sample
) -> Engine:
    ticks = itertools.count()
    return Engine(model, Verifier(chooser, eos), Fixed(rows), lambda: float(next(ticks)))


class Lockstep:
    """Runs an engine and its draft engines on one thread.

    In each round every draft engine receives its events, makes `passes` passes and sends its
    replies; then the target makes one step.
    """

    def __init__(
        self,
        engine: Engine,
        *draft_engines: DraftEngine,
        passes: int = 2,
        tamper: Tamper = lambda message: [message],
        grammar: GrammarCompiler | None = None,
    ) -> None:
        self.engine, self.passes, self.tamper, self.grammar = engine, passes, tamper, grammar
        self.draft_engines: list[DraftEngine] = []
        self.sends: dict[str, Callable[[Event], None]] = {}
        for draft_engine in draft_engines:
            self.join(draft_engine)

    def join(self, draft_engine: DraftEngine) -> None:
        def reply(message: Reply) -> None:
            for arriving in self.tamper(message):
                self.engine.inbox.put(
                    ReplyReceived(replace(arriving, drafter=draft_engine.name), self.engine.clock())
                )

        def send(event: Event) -> None:
            for arriving in self.tamper(event):
                draft_engine.inbox.put(EventReceived(0, arriving, reply))

        self.draft_engines.append(draft_engine)
        self.sends[draft_engine.name] = send
        self.engine.handle(Join(draft_engine.name, send))
        if (spec := draft_engine.drafter.feature_spec) is not None:
            reply(FeatureRequest(spec, draft_engine.name))
            self.engine.receive(0.0)

    def leave(self, draft_engine: DraftEngine) -> None:
        self.draft_engines.remove(draft_engine)
        self.engine.handle(Leave(draft_engine.name, self.sends.pop(draft_engine.name)))

    def admit(self, request: Request) -> list[Chunk]:
        """Begins a session and reads its prompt; its chunks come into the list that is returned."""
        chunks: list[Chunk] = []
        guide = (
            self.grammar(request.sampling.constraint)
            if self.grammar and request.sampling.constraint
            else None
        )
        self.engine.handle(
            AddRequest(
                request,
                lettering(self.engine.runner.verifier.eos)(request),
                chunks.append,
                self.engine.clock(),
                guide,
            )
        )
        self.engine.requests.start(self.engine.scheduler.style)
        while (
            live := self.engine.requests.running.get(request.session)
        ) is not None and not live.ready:
            self.engine.prefill()
        return chunks

    def round(self) -> None:
        for draft_engine in self.draft_engines:
            draft_engine.receive(block=False)
            for _ in range(self.passes):
                draft_engine.step()
            draft_engine.send_unsent(())  # as if there had been no time for more
        self.engine.receive(0.0)
        self.engine.step()

    def run(self, *requests: Request) -> list[Output]:
        """All of them to their end, beside each other."""
        chunks = [self.admit(request) for request in requests]
        while self.engine.requests.running:
            self.round()
        for draft_engine in self.draft_engines:
            draft_engine.receive(block=False)
        return [output(of_one) for of_one in chunks]


def plain(
    model: Model,
    request: Request,
    eos: frozenset[int] = NOBODY,
    chooser: Sampler = reference_sample,
    grammar: GrammarCompiler | None = None,
) -> Output:
    """What the target says alone."""
    return Lockstep(engine_of(model, eos=eos, chooser=chooser), grammar=grammar).run(
        replace(request, speculation=False)
    )[0]


def continued(
    model: Model, prompt: Sequence[int], count: int, chooser: Sampler = reference_sample
) -> list[int]:
    """The prompt and `count` tokens more, as the target writes greedily."""
    return [*prompt, *plain(model, asking(prompt, max_tokens=count), chooser=chooser).tokens]


# In earnest: a target and drafters with their threads


@dataclass(frozen=True, slots=True)
class Patient:
    """Waits for `rows` nodes without a limit, so the number of rounds depends on the drafter alone.

    The output must be a multiple of rows + 1 tokens: at its end the tree stays shorter.
    """

    rows: int
    style: ClassVar[Style] = Style()
    gate: ClassVar[None] = None

    def plan(self, views: Sequence[SessionView]) -> Plan:
        rows = tuple(min(self.rows, len(view.gains)) for view in views)
        lacking = [view for view in views if view.drafters and len(view.gains) < self.rows]
        return Plan(rows, max((HANG_S - view.waited for view in lacking), default=0.0))

    def observe(self, step: Sequence[Round]) -> None:
        pass

    def on_growth(self, delay: float, first: bool, leaves: int) -> None:
        pass


@asynccontextmanager
async def running(
    model: Model,
    scheduler: Scheduler,
    eos: frozenset[int] = NOBODY,
    chooser: Sampler = reference_sample,
    finish: Callable[[Request], StopChecker] | None = None,
    grammar: GrammarCompiler | None = None,
) -> AsyncIterator[Target]:
    """A target on this event loop, stopped in the end."""
    target = Target(
        Engine(model, Verifier(chooser, eos), scheduler, time.monotonic),
        finish or lettering(eos),
        grammar,
    )
    target.start()
    try:
        yield target
    finally:
        await target.stop()


@asynccontextmanager
async def hosted(drafter: Drafter, name: str = "d", width: int = 1) -> AsyncIterator[DraftHost]:
    """A drafter with its thread, stopped in the end."""
    host = DraftHost(DraftEngine(drafter, name, width))
    host.start()
    try:
        yield host
    finally:
        await host.stop()


async def attached(target: Target, name: str, link: DraftLink) -> None:
    """Attaches a drafter and returns when the engine knows of it."""
    target.attach(name, link)
    await soon(lambda: name in target.engine.drafters)


async def answer(target: Target, request: Request) -> Output:
    """The whole output of one request."""
    return output([chunk async for chunk in target.generate(request)])


# Links that fail


class Dying:
    """A link that is lost after so many replies."""

    def __init__(self, inner: DraftLink, replies: int) -> None:
        self.inner, self.left = inner, replies

    async def speculate(self, events: AsyncIterator[Event]) -> AsyncIterator[Reply]:
        replies: Any = self.inner.speculate(events)
        async with aclosing(replies):
            async for reply in replies:
                if self.left == 0:
                    raise LinkLost("killed by the test")
                self.left -= 1
                yield reply


def transformers_greedy(module: Any, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """What transformers' own generate() writes after `prompt`."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        found = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return tuple(found[0, len(prompt) :].tolist())


def transformers_replay(
    module: Any, prompt: Sequence[int], tokens: Sequence[int]
) -> tuple[int, ...]:
    """Returns the most probable token at each place, in one pass: generate()'s own output."""
    with torch.inference_mode():
        logits = module(torch.tensor([[*prompt, *tokens]])).logits[0]
    return tuple(logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist())
