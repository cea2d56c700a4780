"""Runs an event loop on its own thread, so that the network is served while a model computes."""

import asyncio
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

Result = TypeVar("Result")

SIGNAL_POLL_S = 0.1


class LoopThread:
    """An event loop on a thread, started at once.

    A process that uses gRPC has exactly one: all of grpc.aio must run on one loop.
    """

    def __init__(self, name: str = "grpc") -> None:
        started: Future[asyncio.AbstractEventLoop] = Future()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._live(started)), name=name, daemon=True
        )
        self._thread.start()
        self.loop = started.result()

    async def _live(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        started.set_result(asyncio.get_running_loop())
        await self._stopping.wait()

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Runs the coroutine on the loop, from any thread. Cancelling the future cancels the
        coroutine.
        """
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, Result], timeout: float | None = None) -> Result:
        """Runs the coroutine on the loop and returns its result. Never call it on the loop's own
        thread.

        Raises TimeoutError after `timeout` seconds, and cancels the coroutine.
        """
        future = self.submit(coroutine)
        try:
            return result_of(future, timeout)
        finally:
            future.cancel()

    def stop(self) -> None:
        """Cancels running coroutines, lets them clean up, and ends the thread. Idempotent."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()


def result_of(future: Future[Result], timeout: float | None = None) -> Result:
    """Waits for the result on the main thread, where Ctrl-C always ends the wait.

    A signal that comes just before a wait without end does not wake it, so the wait is cut into
    short ones. Raises TimeoutError after `timeout` seconds.
    """
    began = time.monotonic()
    while timeout is None or time.monotonic() - began < timeout:
        left = SIGNAL_POLL_S if timeout is None else timeout - (time.monotonic() - began)
        if wait([future], min(SIGNAL_POLL_S, max(0.0, left))).done:
            break
    return future.result(0)
