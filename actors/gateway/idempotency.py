"""Idempotency-Key: the same request under the same key runs once, however many ask; all of them get the one answer, from its beginning."""

import asyncio
import re
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from actors.gateway.streams import Make, Pieces, ended
from actors.openai.errors import Refused

KEEP_SECONDS = 600.0
KEEP_ENTRIES = 1024
KEEP_BYTES = 64 << 20
SANE = re.compile(r"[\x21-\x7e]{1,128}")

Name = tuple[str | None, str]  # of the API key; the Idempotency-Key


@dataclass(slots=True, eq=False)
class Run:
    """One answer: what there is of it, and those who listen."""

    digest: bytes
    pieces: list[bytes] = field(default_factory=list)
    listeners: int = 0
    over: bool = False
    expires: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def tell(self) -> None:
        """Wakes all that listen."""
        self.changed.set()
        self.changed = asyncio.Event()


class Replays:
    """Whole answers are kept for ten minutes, while there is room; errors are not. An answer that nobody listens to any more ends.

    Kept in this process: another gateway knows nothing of them. `now`: seconds; `replayed` is called for each who gets an answer that
    was begun before.
    """

    def __init__(self, now: Callable[[], float], replayed: Callable[[], None]) -> None:
        self._now, self._replayed = now, replayed
        self.runs: dict[Name, Run] = {}

    async def share(self, name: Name, digest: bytes, make: Make) -> Pieces:
        """The pieces of the answer to the request that `digest` stands for; `make` begins it where there is none.

        Raises Refused: 409 where the key has been used with another request; and whatever the answer's own making raises.
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
                await ended([run.task])

    def _run(self, name: Name, digest: bytes, make: Make) -> Run:
        self._expire()
        if (run := self.runs.get(name)) is None:
            run = self.runs[name] = Run(digest)
            run.task = asyncio.create_task(self._make(name, run, make))
        elif run.digest != digest:
            raise Refused(
                409,
                "idempotency_key_reused",
                "the Idempotency-Key was used with another request: take a new one",
            )
        else:
            self._replayed()
        return run

    async def _make(self, name: Name, run: Run, make: Make) -> None:
        whole = False
        try:
            async with aclosing(make()) as pieces:
                async for piece in pieces:
                    run.pieces.append(piece)
                    run.tell()
            whole = True
        finally:
            if not whole:
                self._forget(name, run)
            run.over, run.expires = True, self._now() + KEEP_SECONDS
            run.tell()

    def _forget(self, name: Name, run: Run) -> None:
        if self.runs.get(name) is run:
            del self.runs[name]

    def _expire(self) -> None:
        """Of the answers that are whole, the oldest go: those whose time is over, and those for which there is no room."""
        whole = [(name, run) for name, run in self.runs.items() if run.over]
        held = sum(len(piece) for _, run in whole for piece in run.pieces)
        for name, run in whole:
            if run.expires > self._now() and len(self.runs) < KEEP_ENTRIES and held <= KEEP_BYTES:
                break
            held -= sum(map(len, run.pieces))
            self._forget(name, run)


def sane(key: str) -> str:
    """Raises Refused (400) for a key that is none."""
    if not SANE.fullmatch(key):
        raise Refused(
            400,
            "invalid_value",
            "the Idempotency-Key is not allowed: give 1 to 128 printable characters",
            "Idempotency-Key",
        )
    return key
