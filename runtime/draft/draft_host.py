"""Hosts a drafting method and is itself the in-process link to it."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator

from runtime.core.messages import Draft, Event, FeatureRequest, Reply
from runtime.draft.commands import EventReceived, GrowthDropped, Stop, StreamClosed
from runtime.draft.draft_engine import DraftEngine

MAX_UNREAD_REPLIES = 256  # further drafts are dropped


class DraftHost:
    """Implements DraftLink for any number of targets. Owns the draft engine's thread."""

    def __init__(self, draft_engine: DraftEngine) -> None:
        self.draft_engine = draft_engine
        self._streams = itertools.count()
        self._thread = threading.Thread(target=draft_engine.run, name="drafter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Return False once the draft engine's thread has ended, by `stop` or by an error."""
        return self._thread.is_alive()

    async def stop(self) -> None:
        """Return when the draft engine's thread has ended."""
        self.draft_engine.inbox.put(Stop())
        await asyncio.to_thread(self._thread.join)

    async def speculate(self, events: AsyncIterator[Event]) -> AsyncIterator[Reply]:
        """See DraftLink. Drafts that are not read in time would be stale: they are dropped and
        counted. A method that needs hidden states of the target asks for them first.

        Re-raises an error of `events`.
        """
        loop, stream = asyncio.get_running_loop(), next(self._streams)
        waiting: asyncio.Queue[Reply | None] = asyncio.Queue()
        dropped: set[str] = set()
        if (spec := self.draft_engine.drafter.feature_spec) is not None:
            waiting.put_nowait(FeatureRequest(spec, self.draft_engine.name))

        def push(reply: Reply) -> None:
            if isinstance(reply, Draft) and waiting.qsize() >= MAX_UNREAD_REPLIES:
                self.draft_engine.counters["dropped replies"] += 1
                dropped.add(reply.session)
            else:
                waiting.put_nowait(reply)

        def send(reply: Reply) -> None:
            loop.call_soon_threadsafe(push, reply)

        async def listen() -> None:
            try:
                async for event in events:
                    self.draft_engine.inbox.put(EventReceived(stream, event, send))
            finally:
                waiting.put_nowait(None)

        listening = loop.create_task(listen())
        try:
            while (reply := await waiting.get()) is not None:
                yield reply
                if waiting.empty():
                    for session in dropped:
                        self.draft_engine.inbox.put(GrowthDropped(stream, session))
                    dropped.clear()
            await listening
        finally:
            listening.cancel()
            self.draft_engine.inbox.put(StreamClosed(stream))
