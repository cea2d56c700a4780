"""Who is being served. Bounds are held by counting the entries, so that no counter can be wrong."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from actors.openai.errors import RETRY_AFTER_S, ApiError
from runtime.config import LimitsConfig

DRAIN_RETRY_AFTER_S = 5  # seconds until a client should ask again: another gateway is there by then, or this one again


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """A request under way. `key`: the name of its API key; `sessions`: its choices, known once its body is; `has_token`: a token has come."""

    key: str | None
    sessions: int = 1
    has_token: bool = False


class ConcurrencyLimiter:
    """The requests under way in this gateway. A request of n choices counts n times."""

    def __init__(self, limits: LimitsConfig) -> None:
        self.limits, self.draining = limits, False
        self.active: set[ActiveRequest] = set()
        self._left = asyncio.Event()

    @contextmanager
    def admit(self, key: str | None) -> Iterator[ActiveRequest]:
        """For as long as the request is under way. Raises ApiError: 503 (full, draining), 429 (the key's own quota)."""
        if self.draining:
            raise ApiError(
                503,
                "draining",
                "the gateway is about to end: ask another, or later",
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
        """Its place is free. May be called again."""
        self.active.discard(entry)
        self._left.set()

    def resize(self, entry: ActiveRequest, sessions: int) -> None:
        """The entry is of so many sessions. Raises as `admit`; 400 for more than could ever be."""
        most = (
            self.limits.requests
            if entry.key is None
            else min(self.limits.requests, self.limits.per_key)
        )
        if sessions > most:
            raise ApiError(
                400,
                "too_many_choices",
                f"{sessions} choices of all prompts: {most} may be under way, lower n or send fewer",
                "n",
            )
        self._check(entry.key, sessions - entry.sessions)
        entry.sessions = sessions

    def sessions(self, key: str | None = None) -> int:
        """Of one key, or of all."""
        return sum(entry.sessions for entry in self.active if key is None or entry.key == key)

    async def wait_idle(self) -> None:
        """Returns when nothing is under way."""
        while self.active:
            self._left.clear()
            await self._left.wait()

    def _check(self, key: str | None, more: int) -> None:
        if key is not None and self.sessions(key) + more > self.limits.per_key:
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"{self.limits.per_key} requests of this key may be under way: wait for one to end",
                retry_after=RETRY_AFTER_S,
            )
        if self.sessions() + more > self.limits.requests:
            raise ApiError(
                503,
                "overloaded",
                "all places are taken: try again later",
                retry_after=RETRY_AFTER_S,
            )
