"""Idempotency-Key: identical requests with the same key run once and share one response."""

import asyncio
import re
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from actors.gateway.streams import MakePieces, Pieces, cancel_all
from actors.openai.errors import ApiError

CACHE_TTL_S = 600.0
MAX_CACHE_ENTRIES = 1024
MAX_CACHE_BYTES = 64 << 20
KEY_PATTERN = re.compile(r"[\x21-\x7e]{1,128}")

CacheKey = tuple[str | None, str]  # of the API key; the Idempotency-Key


@dataclass(slots=True, eq=False)
class CachedResponse:
    """A response: its pieces so far, and how many clients read it."""

    digest: bytes
    pieces: list[bytes] = field(default_factory=list)
    listeners: int = 0
    over: bool = False
    expires: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def notify(self) -> None:
        """Wakes all readers."""
        self.changed.set()
        self.changed = asyncio.Event()


class IdempotencyCache:
    """Keeps complete responses for ten minutes, within limits; errors are not kept.

    A response that nobody reads any more is cancelled. The cache belongs to this process; other
    gateways do not share it. `now` returns seconds; `replayed` is called for every request that
    gets an earlier request's response.
    """

    def __init__(self, now: Callable[[], float], replayed: Callable[[], None]) -> None:
        self._now, self._replayed = now, replayed
        self.responses: dict[CacheKey, CachedResponse] = {}

    async def share(self, name: CacheKey, digest: bytes, make: MakePieces) -> Pieces:
        """Yields the response to the request with this digest; starts it with `make` if there is
        none.

        Raises ApiError (409) if the key was used with another request, and any error of the
        response.
        """
        run = self._run(name, digest, make)
        run.listeners += 1
        try:
            read = 0
            while True:
                changed = run.changed
                while read < len(run.pieces):
                    read += 1
                    yield run.pieces[read - 1]
                if run.over and run.task is not None:
                    run.task.result()
                    return
                await changed.wait()
        finally:
            run.listeners -= 1
            if run.listeners == 0 and run.task is not None:
                if not run.over:
                    self._forget(name, run)
                await cancel_all([run.task])

    def _run(self, name: CacheKey, digest: bytes, make: MakePieces) -> CachedResponse:
        self._expire()
        if (run := self.responses.get(name)) is None:
            run = self.responses[name] = CachedResponse(digest)
            run.task = asyncio.create_task(self._make(name, run, make))
        elif run.digest != digest:
            raise ApiError(
                409,
                "idempotency_key_reused",
                "the Idempotency-Key was used with another request: use a new one",
            )
        else:
            self._replayed()
        return run

    async def _make(self, name: CacheKey, run: CachedResponse, make: MakePieces) -> None:
        whole = False
        try:
            async with aclosing(make()) as pieces:
                async for piece in pieces:
                    run.pieces.append(piece)
                    run.notify()
            whole = True
        finally:
            if not whole:
                self._forget(name, run)
            run.over, run.expires = True, self._now() + CACHE_TTL_S
            run.notify()

    def _forget(self, name: CacheKey, run: CachedResponse) -> None:
        if self.responses.get(name) is run:
            del self.responses[name]

    def _expire(self) -> None:
        """Removes the oldest complete responses that have expired or exceed the limits."""
        whole = [(name, run) for name, run in self.responses.items() if run.over]
        held = sum(len(piece) for _, run in whole for piece in run.pieces)
        for name, run in whole:
            if (
                run.expires > self._now()
                and len(self.responses) < MAX_CACHE_ENTRIES
                and held <= MAX_CACHE_BYTES
            ):
                break
            held -= sum(map(len, run.pieces))
            self._forget(name, run)


def check_key(key: str) -> str:
    """Returns the key. Raises ApiError (400) if it is invalid."""
    if not KEY_PATTERN.fullmatch(key):
        raise ApiError(
            400,
            "invalid_value",
            "the Idempotency-Key is not allowed: give 1 to 128 printable characters",
            "Idempotency-Key",
        )
    return key
