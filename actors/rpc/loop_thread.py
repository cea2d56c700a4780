"""Runs an event loop on its own thread, so that the network is served while a model computes."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


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
            return future.result(timeout)
        finally:
            future.cancel()

    def stop(self) -> None:
        """Cancels running coroutines, lets them clean up, and ends the thread. Idempotent."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
