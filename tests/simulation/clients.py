"""Clients of a simulated deployment, each of which checks all that it hears."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from actors.routing.router import DEADLINE_GRACE_S, Router
from runtime.core.errors import InvalidRequest, OutriderError, TargetsLost, Unavailable
from runtime.core.messages import Chunk
from tests.simulation.scenario import SessionPlan
from tests.simulation.toys import PlainOutput
from tests.simulation.virtual_time import World


class Client:
    """One request and its answer, compared token by token with plain decoding.

    outcome        how it ended, "" while it runs
    target_faults  number of faults of targets and the gateway, which explain some ends
    paused_since   tells for how long the gateway has been stopped since a time
    """

    def __init__(
        self,
        world: World,
        plan: SessionPlan,
        target_faults: int,
        paused_since: Callable[[float], float],
    ) -> None:
        self.world, self.plan, self.target_faults = world, plan, target_faults
        self.paused_since = paused_since
        self.name = plan.request.session
        self.plain = PlainOutput(plan.request)
        self.tokens = 0
        self.text = ""
        self.outcome = ""
        self.finished = False
        self.heard_at = plan.at

    async def run(self, router: Router) -> None:
        await asyncio.sleep(self.plan.at)
        self.world.log(self.name, f"asks: {self.plan.request}")
        try:
            if self.plan.cancel_after_s is None:
                await self.listen(router)
            else:
                async with asyncio.timeout(self.plan.cancel_after_s):
                    await self.listen(router)
        except TimeoutError:
            self.end("went away")
        except OutriderError as error:
            self.end(f"{type(error).__name__}: {error}")
            self.check_error(error)

    async def listen(self, router: Router) -> None:
        async with aclosing(router.generate(self.plan.request)) as chunks:
            async for chunk in chunks:
                self.hear(chunk)
                limit = self.plan.cancel_after_tokens
                if limit is not None and self.tokens >= limit and not self.finished:
                    self.end("went away")
                    return
        if not self.finished:
            self.end("silence")
            self.fail("the stream ended without a finish reason")

    def hear(self, chunk: Chunk) -> None:
        """Check a chunk, and take it in."""
        self.heard_at = self.world.now
        if self.finished:
            self.fail("a chunk follows the last one")
        self.world.log(
            self.name, f"hears {list(chunk.tokens)} {chunk.finish_reason or ''}".rstrip()
        )
        for token, piece in zip(chunk.tokens, chunk.pieces, strict=True) if chunk.tokens else ():
            self.check_token(token, piece)
        if not chunk.tokens:
            self.text += "".join(chunk.pieces)
        asked = self.plan.request.sampling.logprobs is not None
        if asked and len(chunk.logprobs) != len(chunk.tokens):
            self.fail(f"{len(chunk.logprobs)} logprobs of {len(chunk.tokens)} tokens")
        if chunk.finish_reason is not None:
            self.finished = True
            self.end(chunk.finish_reason)
            self.check_end(chunk)

    def check_token(self, token: int, piece: str) -> None:
        place = self.tokens
        self.tokens += 1
        self.text += piece
        if place >= self.plain.count:
            self.fail(f"token {token} follows the end of the text")
        elif token != self.plain.tokens[place]:
            self.fail(f"token {place} is {token}, without drafters {self.plain.tokens[place]}")
        elif piece != self.plain.pieces[place]:
            self.fail(f"text {piece!r} of token {place}, alone {self.plain.pieces[place]!r}")

    def check_end(self, chunk: Chunk) -> None:
        reason, request = chunk.finish_reason, self.plan.request
        if reason in ("stop", "length"):
            if (reason, self.tokens) != (self.plain.reason, self.plain.count):
                self.fail(
                    f"ends by {reason} after {self.tokens} tokens,"
                    f" without drafters by {self.plain.reason} after {self.plain.count}"
                )
        elif reason != "deadline" or not self.is_late():
            self.fail(f"ends by {reason} {chunk.error}".rstrip())
        if chunk.stats is None or (
            chunk.stats.completion_tokens,
            chunk.stats.prompt_tokens,
        ) != (self.tokens, len(request.prompt)):
            self.fail(f"usage is wrong after {self.tokens} tokens: {chunk.stats}")

    def is_late(self) -> bool:
        deadline = self.plan.request.deadline
        return deadline is not None and self.world.now >= self.plan.at + deadline - 1e-6

    def check_error(self, error: OutriderError) -> None:
        """Fail unless the scenario explains the error."""
        match error:
            case TargetsLost():
                explained = self.target_faults >= 2
            case Unavailable():
                explained = self.is_late()
            case InvalidRequest():
                explained = False
            case _:
                explained = False
        if not explained:
            self.fail(f"ends with {type(error).__name__}: {error}")

    def check_time(self, limit: float) -> None:
        """Fail if the session runs beyond its deadline, or `limit` seconds without one."""
        deadline = self.plan.request.deadline
        late = DEADLINE_GRACE_S + 0.5 if self.target_faults else 0.7
        most = limit if deadline is None else min(limit, deadline + late)
        paused = self.paused_since(self.plan.at)
        if not self.outcome and self.world.now > self.plan.at + most + paused:
            self.fail(f"has not ended within {most:g} s")

    def end(self, how: str) -> None:
        self.outcome = how
        self.world.log(self.name, f"ends: {how}, after {self.tokens} tokens")

    def fail(self, why: str) -> None:
        self.world.fail(f"{self.name}: {why}")
