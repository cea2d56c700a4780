"""Tells a target the texts that others write, so that it can take them over at once."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from actors.routing.routed_session import RoutedSession
from runtime.core.messages import StandbyText

STANDBY_PERIOD_S = 0.5  # between two updates
MAX_UPDATE_TOKENS = 1 << 15  # of one update, whose size a message limits


@dataclass(slots=True)
class ToldText:
    """The name of a text, and the number of its tokens that the target knows."""

    name: str
    count: int = 0


@dataclass(slots=True, eq=False)
class StandbyFeed:
    """The texts that one target keeps for others.

    texts    by session
    changed  sessions with tokens that the target has not been told
    over     names of texts that it need not keep any more
    """

    texts: dict[RoutedSession, ToldText] = field(default_factory=dict)
    changed: dict[RoutedSession, None] = field(default_factory=dict)
    over: list[str] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    names: int = 0

    def update(self, session: RoutedSession) -> None:
        """Tells the target what is new of this session, with the next update."""
        if session not in self.texts:
            self.names += 1
            self.texts[session] = ToldText(str(self.names))
        self.changed[session] = None
        self.news.set()

    def remove(self, session: RoutedSession) -> None:
        """Lets the target drop the text of this session; no error if it has none."""
        self.changed.pop(session, None)
        if (told := self.texts.pop(session, None)) is not None and told.count:
            self.over.append(told.name)
            self.news.set()

    async def updates(self) -> AsyncGenerator[tuple[StandbyText, ...], None]:
        """Yields what is new, at most once in STANDBY_PERIOD_S; a new reader gets all of it."""
        self.restart()
        while True:
            await self.news.wait()
            await asyncio.sleep(STANDBY_PERIOD_S)
            if some := self.take():
                yield some

    def restart(self) -> None:
        """Tells everything again: the target has forgotten it."""
        self.over.clear()
        for session, told in self.texts.items():
            told.count = 0
            self.changed[session] = None

    def take(self) -> tuple[StandbyText, ...]:
        """Returns the next update, and notes it as told."""
        found = [StandbyText(name, over=True) for name in self.over]
        self.over.clear()
        left = MAX_UPDATE_TOKENS
        for session in list(self.changed):
            if left <= 0:
                break
            told = self.texts[session]
            tokens = session.text_from(told.count, left)
            found.append(StandbyText(told.name, told.count, tokens))
            told.count += len(tokens)
            left -= len(tokens)
            if told.count == session.text_length:
                del self.changed[session]
        if not self.changed:
            self.news.clear()
        return tuple(found)
