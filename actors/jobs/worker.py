"""Answers the items of a job: sends some at a time, saves their answers, retries refused ones."""

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

MAX_ATTEMPTS = 3  # of an item that the server answers with a fault
# 409: the request with this Idempotency-Key is still being answered.
RETRIED_STATUSES = (409, 500, 502, 504)
POLL_PERIOD_S = 1.0  # between two checks for cancellation
NO_ANSWER_TIMEOUT_S = 600.0  # until a deployment that refuses every item is given up

ShowTotals = Callable[[Totals], None]


@dataclass(frozen=True, slots=True)
class Attempt:
    item: Item | InvalidItem
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """An attempt to repeat if `why` is Overloaded or Unavailable; else the job cannot go on."""

    what: Attempt
    why: OutriderError


@dataclass(frozen=True, slots=True)
class Clock:
    """The clock of the loop; tests replace it."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


async def answer_job(
    job: Job, answerer: Answerer, most: int, show: ShowTotals, clock: Clock | None = None
) -> bool:
    """Answers all items, with at most `most` in flight; returns False if the job was cancelled.

    Raises Unavailable if all items were refused for NO_ANSWER_TIMEOUT_S, and any error of the
    answerer that concerns all items. In every case saved answers are kept, nothing is in flight
    afterwards, and the job can be resumed.
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
    """Holds the items in flight, and those to retry."""

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
        """Starts as many items as there is room for; returns False if none is in flight then."""
        if self.window.pause and not self.in_flight:
            await self.clock.sleep(self.window.pause)
        for attempt in await self._take(self.window.free(len(self.in_flight))):
            self.in_flight[asyncio.create_task(answer_item(self.answerer, attempt.item))] = attempt
        return bool(self.in_flight)

    async def collect(self) -> None:
        """Waits up to POLL_PERIOD_S for answers, and saves those that are there."""
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
        """Cancels all items in flight."""
        for task in self.in_flight:
            task.cancel()
        await asyncio.gather(*self.in_flight, return_exceptions=True)

    async def _take(self, room: int) -> list[Attempt]:
        """Returns up to `room` of the remaining items, those to retry first."""
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
                f"nothing was answered for {NO_ANSWER_TIMEOUT_S:g} s ({one.why}); run the same "
                "command again to resume"
            )
        self.retries.append(one.what)


async def answer_item(answerer: Answerer, item: Item | InvalidItem) -> Answer:
    return (
        error_answer(item.error) if isinstance(item, InvalidItem) else await answerer.answer(item)
    )


def attempt_outcome(attempt: Attempt, task: asyncio.Task[Answer]) -> AnsweredItem | FailedAttempt:
    """Returns the result of a finished task.

    A fault of the server, or of this process, is the item's answer after MAX_ATTEMPTS; at once if
    this item may be what kills targets.
    """
    match task.exception():
        case None:
            answer = task.result()
        case OutriderError() as error:
            return FailedAttempt(attempt, error)
        case error:
            # The error's message may quote the item.
            log.error("an item has failed: %s", type(error).__name__)
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
