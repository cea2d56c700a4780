"""Limits the concurrent requests of a gateway.

Limits are checked against the set of active requests, so no counter can become wrong.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from actors.openai.errors import RETRY_AFTER_S, ApiError
from runtime.config import LimitsConfig

DRAIN_RETRY_AFTER_S = 5  # by then another gateway runs, or this one again


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """A running request.

    key        name of its API key
    sessions   its choices, known once its body is parsed
    logprobs   log-probabilities that its answer may have to hold, known then too
    has_token  a token has arrived
    """

    key: str | None
    sessions: int = 1
    logprobs: int = 0
    has_token: bool = False


class ConcurrencyLimiter:
    """The active requests of this gateway. A request of n choices counts n times."""

    def __init__(self, limits: LimitsConfig) -> None:
        self.limits, self.draining = limits, False
        self.active: set[ActiveRequest] = set()
        self._left = asyncio.Event()

    @contextmanager
    def admit(self, key: str | None) -> Iterator[ActiveRequest]:
        """Holds a place for a request. Raises ApiError: 503 (full, draining), 429 (quota of the
        key).
        """
        if self.draining:
            raise ApiError(
                503,
                "draining",
                "the gateway is shutting down: use another, or try again later",
                retry_after=DRAIN_RETRY_AFTER_S,
            )
        self._check(key, 1)
        entry = ActiveRequest(key)
        self.active.add(entry)
        try:
            yield entry
        finally:
            self.release(entry)

    def release(self, entry: ActiveRequest) -> None:
        """Releases its place. Idempotent."""
        self.active.discard(entry)
        self._left.set()

    def resize(self, entry: ActiveRequest, sessions: int, logprobs: int = 0) -> None:
        """Sets the number of its sessions and log-probabilities. Raises as `admit`; 400 if it
        exceeds a limit on its own.
        """
        most, name = self.limits.requests, "requests"
        if entry.key is not None and self.limits.per_key < most:
            most, name = self.limits.per_key, "per_key"
        if sessions > most:
            raise ApiError(
                400,
                "too_many_choices",
                f"{sessions} choices of all prompts are over limits.{name} of this server, {most}:"
                " lower n or send fewer prompts",
                "n",
            )
        if logprobs > self.limits.logprobs:
            raise ApiError(
                400,
                "too_many_logprobs",
                f"{logprobs} log-probabilities of all choices are over limits.logprobs of this"
                f" server, {self.limits.logprobs}: lower max_tokens, logprobs or n",
                "logprobs",
            )
        self._check(entry.key, sessions - entry.sessions)
        held = sum(other.logprobs for other in self.active)
        if logprobs and held + logprobs > self.limits.logprobs:
            raise at_capacity()
        entry.sessions, entry.logprobs = sessions, logprobs

    def sessions(self, key: str | None = None) -> int:
        """Returns the number of active sessions, of one key or of all."""
        return sum(entry.sessions for entry in self.active if key is None or entry.key == key)

    async def wait_idle(self) -> None:
        """Returns once no request is active."""
        while self.active:
            self._left.clear()
            await self._left.wait()

    def _check(self, key: str | None, more: int) -> None:
        if key is not None and self.sessions(key) + more > self.limits.per_key:
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"this key may have {self.limits.per_key} requests at once: wait for one to end",
                retry_after=RETRY_AFTER_S,
            )
        if self.sessions() + more > self.limits.requests:
            raise at_capacity()


def at_capacity() -> ApiError:
    return ApiError(
        503, "overloaded", "server at capacity: try again later", retry_after=RETRY_AFTER_S
    )
