"""Holds the contract of every link; a test module subclasses it and names an implementation."""

import asyncio
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

import pytest

from actors.rpc.client import GrpcLink
from actors.rpc.common import closing
from actors.rpc.server import DraftingService, serve
from runtime.core.links import DraftLink
from runtime.core.messages import Close, Commit, Draft, Event, Reply, Share
from runtime.core.node_keys import child_key, text_key
from tests.support.fakes import HELLO, HOST, Feed, opening
from tests.support.paths import ROOT

# Seconds; a longer wait is a fault. Without keepalive a silent peer would go unnoticed for 45.
PATIENCE_S = 30.0

Attach = Callable[[DraftLink], AbstractAsyncContextManager[DraftLink]]


@asynccontextmanager
async def in_process(body: DraftLink) -> AsyncIterator[DraftLink]:
    yield body


@asynccontextmanager
async def over_grpc(body: DraftLink) -> AsyncIterator[GrpcLink]:
    server, port = await serve([DraftingService(body, HELLO)], HOST)
    try:
        yield GrpcLink(f"{HOST}:{port}", HELLO)
    finally:
        await server.stop(None)


TRANSPORTS: dict[str, Attach] = {"in-process": in_process, "grpc": over_grpc}


@contextmanager
def process_of(module: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs this module as a process and yields the address it prints; kills it after the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", module], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, f"{HOST}:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


async def soon(condition: Callable[[], bool]) -> None:
    """Returns when it holds; raises TimeoutError where it does not within the test's patience."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - a thread sets no event here
            await asyncio.sleep(0.002)


async def draft_for(replies: AsyncIterator[Reply], session: str) -> Draft:
    """The next growth of this session, whatever comes before it."""
    async with asyncio.timeout(PATIENCE_S):
        async for reply in replies:
            if isinstance(reply, Draft) and reply.session == session:
                return reply
    raise AssertionError(f"the replies ended without a draft for {session}")


class LinkContract(ABC):
    """For a DraftLink that has something to say to every Open, whoever transports it."""

    @abstractmethod
    def drafter(self) -> AbstractAsyncContextManager[DraftLink]:
        """A fresh one, running."""

    @abstractmethod
    def held(self, drafter: DraftLink) -> int:
        """Sessions that it holds anything of."""

    @pytest.fixture(params=TRANSPORTS)
    def attach(self, request: pytest.FixtureRequest) -> Attach:
        return TRANSPORTS[request.param]

    def test_growth_continues_the_opened_text(self, attach: Attach) -> None:
        async def main() -> None:
            async with self.drafter() as body, attach(body) as link:
                opened = opening(epoch=7)
                async with closing(link.speculate(Feed(opened))) as replies:
                    draft = await draft_for(replies, "s")
                known = {text_key(opened.tokens)}
                for parent, token in zip(
                    draft.parents.tolist(), draft.tokens.tolist(), strict=True
                ):
                    assert parent in known
                    known.add(child_key(parent, token))
                assert draft.epoch == 7
                assert len(known) == len(draft.tokens) + 1 == len(draft.scores) + 1
                assert len(known) > 1

        asyncio.run(main())

    def test_ends_when_the_events_end(self, attach: Attach) -> None:
        async def main() -> None:
            async with self.drafter() as body, attach(body) as link:
                feed = Feed(opening())
                async with closing(link.speculate(feed)) as replies, asyncio.timeout(PATIENCE_S):
                    await draft_for(replies, "s")
                    feed.end()
                    async for reply in replies:
                        assert isinstance(reply, Draft)
                        assert reply.session == "s"
                    await soon(lambda: self.held(body) == 0)

        asyncio.run(main())

    def test_closing_the_iterator_leaves_nothing_running(self, attach: Attach) -> None:
        async def main() -> None:
            async with self.drafter() as body, attach(body) as link:
                async with closing(link.speculate(Feed(opening("a"), opening("b")))) as replies:
                    await draft_for(replies, "a")
                    await draft_for(replies, "b")
                    assert self.held(body) == 2
                await soon(lambda: self.held(body) == 0)

        asyncio.run(main())

    def test_cancelling_the_reader_leaves_nothing_running(self, attach: Attach) -> None:
        async def main() -> None:
            async with self.drafter() as body, attach(body) as link:

                async def read() -> None:
                    async with closing(link.speculate(Feed(opening()))) as replies:
                        async for _ in replies:
                            pass

                reading = asyncio.create_task(read())
                await soon(lambda: self.held(body) == 1)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                await soon(lambda: self.held(body) == 0)

        asyncio.run(main())

    def test_a_closed_session_is_forgotten_and_can_come_back(self, attach: Attach) -> None:
        async def main() -> None:
            async with self.drafter() as body, attach(body) as link:
                feed = Feed(opening())
                async with closing(link.speculate(feed)) as replies:
                    await draft_for(replies, "s")
                    feed.put(Close("s"))
                    feed.put(opening("t"))
                    await draft_for(replies, "t")
                    assert self.held(body) == 1
                    feed.put(opening("s", tokens=(9, 9), epoch=2))
                    while (await draft_for(replies, "s")).epoch != 2:
                        pass
                    assert self.held(body) == 2

        asyncio.run(main())

    def test_events_of_unknown_sessions_change_nothing(self, attach: Attach) -> None:
        async def main() -> None:
            async with self.drafter() as body, attach(body) as link:
                strays: list[Event] = [
                    Commit("ghost", 1, 4, (1,), 99),
                    Share("ghost", 0, 2),
                    Close("ghost"),
                ]
                async with closing(
                    link.speculate(Feed(*strays, opening(), *strays, opening()))
                ) as replies:
                    await draft_for(replies, "s")
                    assert self.held(body) == 1

        asyncio.run(main())

    def test_streams_of_two_targets_are_independent(self, attach: Attach) -> None:
        async def main() -> None:
            async with self.drafter() as body, attach(body) as link:
                feed = Feed(opening(tokens=(1, 2), epoch=2))
                async with closing(link.speculate(feed)) as new:
                    async with closing(
                        link.speculate(Feed(opening(tokens=(3, 4), epoch=1)))
                    ) as old:
                        assert (await draft_for(old, "s")).epoch == 1
                        assert (await draft_for(new, "s")).epoch == 2
                    await soon(lambda: self.held(body) == 1)
                    feed.put(opening("t", (8,), epoch=3))
                    assert (await draft_for(new, "t")).epoch == 3

        asyncio.run(main())
