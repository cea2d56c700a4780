"""The loop of a job: ask what is left, some at a time, keep what is answered, ask again what was refused."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import islice

from actors.jobs.aimd import Window
from actors.jobs.answerer import Answerer
from actors.jobs.index import Totals
from actors.jobs.items import Answer, Item, Misfit, refusal
from actors.jobs.job import Answered, Job
from actors.openai.errors import TARGETS_LOST
from runtime.core.errors import OutriderError, Overloaded, Unavailable

log = logging.getLogger(__name__)

ATTEMPTS = 3  # of an item that is answered by a fault of the server
FAULTS = (409, 500, 502, 504)  # 409: the request under this Idempotency-Key is still being answered
LOOK = 1.0  # seconds between two looks whether the job is wanted
PATIENCE = 600.0  # seconds without any answer after which a deployment that refuses is given up

Show = Callable[[Totals], None]


@dataclass(frozen=True, slots=True)
class Try:
    item: Item | Misfit
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Refused:
    """To be asked again, if `why` is Overloaded or Unavailable; else no item will be answered."""

    what: Try
    why: OutriderError


@dataclass(frozen=True, slots=True)
class Clock:
    """What the loop knows of time."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


async def work(
    job: Job, answerer: Answerer, most: int, show: Show, clock: Clock | None = None
) -> bool:
    """Until nothing is left, and True then; or False, soon after the job was cancelled. At most `most` items are in flight.

    Raises Unavailable where all was refused for PATIENCE seconds, and what the answerer says of all items. Whatever ends it, what was
    kept is kept, nothing is in flight when it returns, and the job can be taken up again.
    """
    worker = Worker(job, answerer, Window(most), show, clock or Clock())
    try:
        while await worker.launch():
            await worker.land()
            if not await asyncio.to_thread(job.wanted):
                return False
    finally:
        await worker.ground()
    await asyncio.to_thread(job.finish)
    return True


class Worker:
    """What is in flight, and what waits to be asked again."""

    def __init__(
        self, job: Job, answerer: Answerer, window: Window, show: Show, clock: Clock
    ) -> None:
        self.job, self.answerer, self.window, self.show, self.clock = (
            job,
            answerer,
            window,
            show,
            clock,
        )
        self.flying: dict[asyncio.Task[Answer], Try] = {}
        self.again: deque[Try] = deque()
        self.left = job.left()
        self.heard = clock.now()
        show(job.totals)

    async def launch(self) -> bool:
        """As many as there is room for; False where nothing is left to ask or in flight."""
        if self.window.pause and not self.flying:
            await self.clock.sleep(self.window.pause)
        for attempt in await self._taken(self.window.room(len(self.flying))):
            self.flying[asyncio.create_task(ask(self.answerer, attempt.item))] = attempt
        return bool(self.flying)

    async def land(self) -> None:
        """Waits for some, a second at most, and keeps their answers together."""
        landed, _ = await asyncio.wait(
            self.flying, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED
        )
        found = [outcome(self.flying.pop(task), task) for task in landed]
        answered = [one for one in found if isinstance(one, Answered)]
        refused = [one for one in found if isinstance(one, Refused)]
        if answered:
            await asyncio.to_thread(self.job.keep, answered)
            self.heard = self.clock.now()
            self.show(self.job.totals)
        if refused:
            self.window.refused(len(self.flying) + len(answered))
        for _ in answered:
            self.window.answered()
        for one in refused:
            self._put_back(one)

    async def ground(self) -> None:
        for task in self.flying:
            task.cancel()
        await asyncio.gather(*self.flying, return_exceptions=True)

    async def _taken(self, room: int) -> list[Try]:
        """Up to so many of what is left, those that were refused first."""
        first = [self.again.popleft() for _ in range(min(room, len(self.again)))]
        if len(first) == room:
            return first
        return first + [
            Try(item)
            for item in await asyncio.to_thread(lambda: list(islice(self.left, room - len(first))))
        ]

    def _put_back(self, one: Refused) -> None:
        if not isinstance(one.why, Overloaded | Unavailable):
            raise one.why
        if not self.flying and self.clock.now() - self.heard > PATIENCE:
            raise Unavailable(
                f"nothing was answered for {PATIENCE:g} s ({one.why}); run the same command again to go on"
            )
        self.again.append(one.what)


async def ask(answerer: Answerer, item: Item | Misfit) -> Answer:
    return refusal(item.error) if isinstance(item, Misfit) else await answerer.answer(item)


def outcome(attempt: Try, task: asyncio.Task[Answer]) -> Answered | Refused:
    """What has come of a task that is over. A fault of the server, or of ours, is the item's answer when it has come
    ATTEMPTS times; at once if it may be the item that ends targets."""
    match task.exception():
        case None:
            answer = task.result()
        case OutriderError() as error:
            return Refused(attempt, error)
        case error:
            log.error(
                "an item has failed: %s", type(error).__name__
            )  # what it says may quote the item
            log.debug("", exc_info=error)
            answer = Answer(
                500,
                {
                    "error": {
                        "message": "internal error",
                        "type": "server_error",
                        "param": None,
                        "code": "internal_error",
                    }
                },
            )
    error = answer.body.get("error")
    hopeless = isinstance(error, dict) and error.get("code") == TARGETS_LOST
    if answer.status in FAULTS and not hopeless and attempt.attempts < ATTEMPTS:
        return Refused(
            replace(attempt, attempts=attempt.attempts + 1),
            Unavailable(f"an item was answered {answer.status}"),
        )
    return Answered(attempt.item, answer)
