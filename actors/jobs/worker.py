"""The loop of a job: ask what is left, some at a time, keep what is answered, ask again what was refused."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import islice

from actors.jobs.aimd import AimdWindow
from actors.jobs.answerer import Answerer
from actors.jobs.index import Totals
from actors.jobs.items import Answer, InvalidItem, Item, error_answer
from actors.jobs.job import AnsweredItem, Job
from actors.openai.errors import TARGETS_LOST
from runtime.core.errors import OutriderError, Overloaded, Unavailable

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # of an item that is answered by a fault of the server
RETRIED_STATUSES = (
    409,
    500,
    502,
    504,
)  # 409: the request under this Idempotency-Key is still being answered
POLL_PERIOD_S = 1.0  # seconds between two looks whether the job is wanted
NO_ANSWER_TIMEOUT_S = (
    600.0  # seconds without any answer after which a deployment that refuses is given up
)

ShowTotals = Callable[[Totals], None]


@dataclass(frozen=True, slots=True)
class Attempt:
    item: Item | InvalidItem
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """To be asked again, if `why` is Overloaded or Unavailable; else no item will be answered."""

    what: Attempt
    why: OutriderError


@dataclass(frozen=True, slots=True)
class Clock:
    """What the loop knows of time."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


async def answer_job(
    job: Job, answerer: Answerer, most: int, show: ShowTotals, clock: Clock | None = None
) -> bool:
    """Until nothing is left, and True then; or False, soon after the job was cancelled. At most `most` items are in flight.

    Raises Unavailable where all was refused for PATIENCE seconds, and what the answerer says of all items. Whatever ends it, what was
    kept is kept, nothing is in flight when it returns, and the job can be taken up again.
    """
    worker = JobWorker(job, answerer, AimdWindow(most), show, clock or Clock())
    try:
        while await worker.submit():
            await worker.collect()
            if not await asyncio.to_thread(job.renew):
                return False
    finally:
        await worker.cancel()
    await asyncio.to_thread(job.finish)
    return True


class JobWorker:
    """What is in flight, and what waits to be asked again."""

    def __init__(
        self, job: Job, answerer: Answerer, window: AimdWindow, show: ShowTotals, clock: Clock
    ) -> None:
        self.job, self.answerer, self.window, self.show, self.clock = (
            job,
            answerer,
            window,
            show,
            clock,
        )
        self.in_flight: dict[asyncio.Task[Answer], Attempt] = {}
        self.retries: deque[Attempt] = deque()
        self.remaining = job.remaining()
        self.last_answer = clock.now()
        show(job.totals)

    async def submit(self) -> bool:
        """As many as there is room for; False where nothing is left to ask or in flight."""
        if self.window.pause and not self.in_flight:
            await self.clock.sleep(self.window.pause)
        for attempt in await self._take(self.window.free(len(self.in_flight))):
            self.in_flight[asyncio.create_task(answer_item(self.answerer, attempt.item))] = attempt
        return bool(self.in_flight)

    async def collect(self) -> None:
        """Waits for some, a second at most, and keeps their answers together."""
        done, _ = await asyncio.wait(
            self.in_flight, timeout=POLL_PERIOD_S, return_when=asyncio.FIRST_COMPLETED
        )
        found = [attempt_outcome(self.in_flight.pop(task), task) for task in done]
        answered = [one for one in found if isinstance(one, AnsweredItem)]
        refused = [one for one in found if isinstance(one, FailedAttempt)]
        if answered:
            await asyncio.to_thread(self.job.save, answered)
            self.last_answer = self.clock.now()
            self.show(self.job.totals)
        if refused:
            self.window.on_refusal(len(self.in_flight) + len(answered))
        for _ in answered:
            self.window.on_answer()
        for one in refused:
            self._put_back(one)

    async def cancel(self) -> None:
        for task in self.in_flight:
            task.cancel()
        await asyncio.gather(*self.in_flight, return_exceptions=True)

    async def _take(self, room: int) -> list[Attempt]:
        """Up to so many of what is left, those that were refused first."""
        first = [self.retries.popleft() for _ in range(min(room, len(self.retries)))]
        if len(first) == room:
            return first
        return first + [
            Attempt(item)
            for item in await asyncio.to_thread(
                lambda: list(islice(self.remaining, room - len(first)))
            )
        ]

    def _put_back(self, one: FailedAttempt) -> None:
        if not isinstance(one.why, Overloaded | Unavailable):
            raise one.why
        if not self.in_flight and self.clock.now() - self.last_answer > NO_ANSWER_TIMEOUT_S:
            raise Unavailable(
                f"nothing was answered for {NO_ANSWER_TIMEOUT_S:g} s ({one.why}); run the same command again to go on"
            )
        self.retries.append(one.what)


async def answer_item(answerer: Answerer, item: Item | InvalidItem) -> Answer:
    return (
        error_answer(item.error) if isinstance(item, InvalidItem) else await answerer.answer(item)
    )


def attempt_outcome(attempt: Attempt, task: asyncio.Task[Answer]) -> AnsweredItem | FailedAttempt:
    """What has come of a task that is over. A fault of the server, or of ours, is the item's answer when it has come
    ATTEMPTS times; at once if it may be the item that ends targets."""
    match task.exception():
        case None:
            answer = task.result()
        case OutriderError() as error:
            return FailedAttempt(attempt, error)
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
    if answer.status in RETRIED_STATUSES and not hopeless and attempt.attempts < MAX_ATTEMPTS:
        return FailedAttempt(
            replace(attempt, attempts=attempt.attempts + 1),
            Unavailable(f"an item was answered {answer.status}"),
        )
    return AnsweredItem(attempt.item, answer)
