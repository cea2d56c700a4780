"""A target as its callers and drafters see it: `generate(request)` and attached links.

The engine decides, on a thread of its own.
"""

import asyncio
import itertools
import logging
import math
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace

from runtime.core import limits
from runtime.core.errors import InvalidRequest, LinkLost, ModelRefused, Overloaded, Unavailable
from runtime.core.links import DraftLink
from runtime.core.messages import Chunk, Event, FeatureRequest, Request, StandbyText, Tokens
from runtime.core.sampler_reference import GrammarState
from runtime.core.sampling_params import Constraint, SamplingParams, check_int
from runtime.schedulers.base import Scheduler
from runtime.target.commands import (
    AddRequest,
    Cancel,
    Join,
    Leave,
    ReplyReceived,
    SetScheduler,
    StandbyOver,
    StandbyReceived,
    Stop,
    ignore_strike,
)
from runtime.target.engine import Engine
from runtime.target.feature_sender import check_features
from runtime.target.stop_checker import StopChecker
from runtime.telemetry.reports import TargetReport

log = logging.getLogger(__name__)

GrammarCompiler = Callable[
    [Constraint], GrammarState
]  # the beginning of a text; may take a while, and be called from any thread

MAX_INBOX_MESSAGES = (
    4096  # links are not read while the inbox is longer, so a flood stalls its sender
)
MAX_PENDING_EVENTS = 1024  # unsent events after which a link ends


def check(request: Request, vocabulary: int, context: int) -> None:
    """Raise InvalidRequest if the model could not serve the request to its end."""
    check_tokens(request.committed, vocabulary)
    check_prompt(request.prompt, request.sampling, vocabulary, context)
    if request.max_rows is not None:
        check_int("max_rows", request.max_rows, 0)
    if request.deadline is not None and math.isnan(request.deadline):
        raise InvalidRequest("deadline nan is not allowed: give a number of seconds", "deadline")


def check_prompt(prompt: Tokens, sampling: SamplingParams, vocabulary: int, context: int) -> None:
    """Raise InvalidRequest if the model cannot continue this prompt by `max_tokens`."""
    if not prompt:
        raise InvalidRequest("the prompt is empty: give at least one token", "prompt")
    check_tokens(prompt, vocabulary)
    for token, _ in sampling.logit_bias:
        if token >= vocabulary:
            raise InvalidRequest(
                f"logit_bias token {token} is not in the vocabulary: "
                f"ids go from 0 to {vocabulary - 1}",
                "logit_bias",
            )
    length, most = len(prompt), sampling.max_tokens
    if length >= context + (most == 0):
        raise InvalidRequest(
            f"the prompt has {length} tokens, the model's context {context}: shorten the prompt",
            "prompt",
        )
    if length + most > context:
        raise InvalidRequest(
            f"prompt of {length} tokens + max_tokens {most} is over the context of {context}: "
            f"lower max_tokens to {context - length}",
            "max_tokens",
        )


def check_tokens(tokens: Tokens, vocabulary: int) -> None:
    """Raise InvalidRequest for the first token id outside the vocabulary."""
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise InvalidRequest(
                f"token id {token} is not in the vocabulary: ids go from 0 to {vocabulary - 1}",
                "prompt",
            )


def resume_stop_checker(stop_checker: StopChecker, request: Request) -> StopChecker:
    """Feed the committed tokens to `stop_checker`. Raises InvalidRequest if they already end the
    text.
    """
    for token in request.committed:
        if stop_checker.feed(token).reason is not None:
            raise InvalidRequest(
                f"the text ended with committed token {stop_checker.count}: nothing follows it",
                "committed",
            )
    return stop_checker


def resume_grammar(
    grammar: GrammarCompiler, constraint: Constraint, request: Request
) -> GrammarState:
    """Compile the constraint and feed it the committed tokens.

    Raises InvalidRequest if they break it.
    """
    guide = grammar(constraint)
    for place, token in enumerate(request.committed):
        try:
            guide.accept_token(token)
        except InvalidRequest as error:
            raise InvalidRequest(
                f"committed token {token}, at index {place}, breaks the response_format",
                "committed",
            ) from error
    return guide


class Target:
    """Owns the engine's thread. All methods run on the event loop that was running at `start`.

    `grammar` compiles constraints; without it, constrained requests are refused. `on_stop` runs
    when the last session is over.
    """

    def __init__(
        self,
        engine: Engine,
        finish: Callable[[Request], StopChecker],
        grammar: GrammarCompiler | None = None,
        on_stop: Callable[[], object] | None = None,
    ) -> None:
        self.engine, self.finish, self.grammar, self.on_stop = engine, finish, grammar, on_stop
        self.lost: Counter[str] = Counter()  # links that ended, by drafter
        self._links: dict[str, asyncio.Task[None]] = {}
        self._sessions: set[str] = set()
        self._sources = itertools.count()
        self._idle = asyncio.Event()
        self._draining = self._stopping = False
        self._thread = threading.Thread(target=engine.run, name="target", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End links and sessions; return when the engine's thread has ended."""
        self._stopping = True
        for name in tuple(self._links):
            await self.detach(name)
        self.engine.inbox.put(Stop())
        await asyncio.to_thread(self._thread.join)
        if self.on_stop is not None:
            await asyncio.to_thread(self.on_stop)

    async def drain(self) -> None:
        """Refuse new sessions; return when all admitted ones, waiting ones included, have ended."""
        self._draining = True
        while self._sessions:
            self._idle.clear()
            await self._idle.wait()

    def report(self) -> TargetReport:
        """Return what the target has done since its start, as of its last step. Thread-safe."""
        return replace(self.engine.report(), lost_links=dict(self.lost))

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Yield the output in chunks; the last one has a finish reason and the session's stats.

        Raises InvalidRequest, Overloaded or Unavailable before the first chunk. Closing the
        iterator frees everything that the session holds, here and at the drafters.
        """
        asked = self.engine.clock()
        check(request, self.engine.model.vocabulary, self.engine.model.context)
        if request.session in self._sessions:
            raise InvalidRequest(
                f"session {request.session!r} is running: give another name", "session"
            )
        if self._stopping or not self._thread.is_alive():
            raise Unavailable("the target has stopped: start it again")
        if self._draining:
            raise Unavailable("the target is draining: use another one")
        self.engine.requests.admission.check(request, self.engine.model.context)
        if len(self._sessions) >= (most := limits.SESSIONS + limits.QUEUED_REQUESTS):
            raise Overloaded(
                f"server at capacity: {len(self._sessions)} sessions are running or waiting, "
                f"the limit is {most}; try again later"
            )
        stop_checker = resume_stop_checker(self.finish(request), request)
        chunks: asyncio.Queue[Chunk] = asyncio.Queue()

        def deliver(chunk: Chunk) -> None:
            self._loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        self._sessions.add(request.session)
        over = False
        try:
            guide = await self._guide(request)
            self.engine.inbox.put(AddRequest(request, stop_checker, deliver, asked, guide))
            if self.engine.over:
                raise Unavailable("the target has stopped: start it again")
            while not over:
                chunk = await chunks.get()
                over = chunk.finish_reason is not None
                yield chunk
        finally:
            self._sessions.discard(request.session)
            self._idle.set()
            if not over:
                self.engine.inbox.put(Cancel(request.session))

    async def _guide(self, request: Request) -> GrammarState | None:
        """Compile the constraint on a separate thread, so that neither event loop nor
        model waits.
        """
        constraint = request.sampling.constraint
        if constraint is None:
            return None
        if self.grammar is None:
            raise InvalidRequest(
                "this target does not support response_format: send the request without it",
                "response_format",
            )
        return await asyncio.to_thread(resume_grammar, self.grammar, constraint, request)

    async def standby(self, updates: AsyncIterator[Sequence[StandbyText]]) -> None:
        """Prepare to take over texts that other targets write, until `updates` ends.

        Raises InvalidRequest for a token outside the vocabulary.
        """
        source = next(self._sources)
        try:
            async for texts in updates:
                for text in texts:
                    check_tokens(text.tokens, self.engine.model.vocabulary)
                while self.engine.inbox.qsize() > MAX_INBOX_MESSAGES:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                self.engine.inbox.put(StandbyReceived(source, texts))
        finally:
            self.engine.inbox.put(StandbyOver(source))

    def schedule(self, scheduler: Scheduler, heads: frozenset[str] | None = None) -> None:
        """Change the scheduler and the heads (None: all) from now on.

        Running sessions keep the style in which their drafters grow trees.
        """
        self.engine.inbox.put(SetScheduler(scheduler, heads))

    def attach(
        self, name: str, link: DraftLink, on_strike: Callable[[str], bool] = ignore_strike
    ) -> None:
        """Let this drafter guess for all sessions, running ones included.

        A link that ends is detached and counted. `on_strike` is called on the event loop with what
        was wrong with a message that no honest drafter sends; if it returns True the link ends.
        """
        if name not in self._links:
            self._links[name] = self._loop.create_task(self._follow(name, link, on_strike))

    async def detach(self, name: str) -> None:
        """Continue without this drafter; no error if it is not attached."""
        task = self._links.pop(name, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @property
    def drafters(self) -> tuple[str, ...]:
        """Return the names of the attached drafters."""
        return tuple(self._links)

    async def _follow(self, name: str, link: DraftLink, on_strike: Callable[[str], bool]) -> None:
        waiting: asyncio.Queue[Event] = asyncio.Queue(MAX_PENDING_EVENTS)
        this = asyncio.current_task()

        def push(event: Event) -> None:
            if not waiting.full():
                waiting.put_nowait(event)
            else:
                end(f"it has not taken its last {MAX_PENDING_EVENTS} events")

        def count(why: str) -> None:
            if on_strike(why):
                end(f"in quarantine for messages that no drafter may send, the last: {why}")

        def end(why: str) -> None:
            if this is not None and not this.cancelling():
                log.warning("drafter %s lost: %s", name, why)
                this.cancel()

        async def events() -> AsyncIterator[Event]:
            while True:
                yield await waiting.get()

        def send(event: Event) -> None:
            self._loop.call_soon_threadsafe(push, event)

        def strike(why: str) -> None:
            self._loop.call_soon_threadsafe(count, why)

        replies, has_asked = link.speculate(events()), False
        self.engine.inbox.put(Join(name, send, strike))
        try:
            async for reply in replies:
                while self.engine.inbox.qsize() > MAX_INBOX_MESSAGES:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                if isinstance(reply, FeatureRequest):
                    if has_asked:
                        count("features asked for twice")
                        continue
                    check_features(self.engine.model, reply.spec)
                    has_asked = True
                # The link names the drafter; the message is not trusted.
                self.engine.inbox.put(
                    ReplyReceived(replace(reply, drafter=name), self.engine.clock())
                )
        except (LinkLost, ModelRefused) as error:
            log.warning("drafter %s lost: %s", name, error)
        finally:
            self.engine.inbox.put(Leave(name, send))
            self.lost[name] += 1
            if self._links.get(name) is this:
                del self._links[name]
