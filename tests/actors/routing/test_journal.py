"""Each session has one history (SM3), whatever happens to its targets and the network."""

import asyncio
import math
from collections.abc import AsyncGenerator
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from actors.fleet.fleet_state import TargetState
from actors.routing.routed_session import RoutedSession
from actors.routing.router import Router
from runtime.core.errors import Unavailable
from runtime.core.messages import Chunk, Request, Tokens
from tests.support.router_harness import (
    ANSWER,
    ASKED,
    COUNT,
    PLAIN,
    Bare,
    VirtualLoop,
    heard,
    spoken,
    there,
)


def session(committed: Tokens = (), epoch: int = 0) -> RoutedSession:
    return RoutedSession(replace(ASKED, committed=committed, epoch=epoch), 0.0, math.inf)


def test_only_the_target_of_the_epoch_appends_each_token_at_its_place() -> None:
    journal = session((7,), epoch=3)
    assert journal.append(3, 1, (8, 9))
    assert not journal.append(3, 1, (8, 9)), "said before"
    assert not journal.append(3, 4, (5,)), "something is missing"
    assert not journal.append(2, 3, (5,)), "an older target"
    assert not journal.append(4, 3, (5,)), "a target that nobody has asked"
    assert journal.fence() == 4
    assert not journal.append(3, 3, (5,)), "fenced"
    assert journal.append(4, 3, ())
    assert journal.append(4, 3, (5,))
    assert journal.output == [7, 8, 9, 5]


def choice(text: Tokens) -> int:
    """What every target says after this."""
    return (31 * sum(text) + 17 * len(text)) % 97


class Histories(RuleBasedStateMachine):
    """Targets continue the journal they got; their messages arrive at any time, twice or never."""

    sent = Bundle("sent")

    def __init__(self) -> None:
        super().__init__()
        self.journal = session()
        self.seen: Tokens = ()  # by the client
        self.writers: dict[int, tuple[int, Tokens]] = {}  # by epoch: where it began, and its text

    @rule()
    def take_over(self) -> None:
        """Another target, or the same one again. The one before need not know."""
        self.writers[self.journal.fence()] = (len(self.journal.output), tuple(self.journal.output))

    @precondition(lambda self: self.writers)
    @rule(target=sent, data=st.data(), count=st.integers(0, 4))
    def write(self, data: st.DataObject, count: int) -> tuple[int, int, Tokens]:
        """Any target, fenced ones too."""
        epoch = data.draw(st.sampled_from(sorted(self.writers)))
        began, text = self.writers[epoch]
        for _ in range(count):
            text += (choice(text),)
        offset = len(self.writers[epoch][1])
        self.writers[epoch] = (began, text)
        return epoch, offset, text[offset:]

    @rule(message=sent)
    def arrive(self, message: tuple[int, int, Tokens]) -> None:
        epoch, offset, tokens = message
        before = tuple(self.journal.output)
        if self.journal.append(epoch, offset, tokens):
            assert epoch == self.journal.epoch
            assert self.journal.output == [*before, *tokens]
        else:
            assert self.journal.output == [*before]

    @rule(count=st.integers(0, 3))
    def read(self, count: int) -> None:
        self.seen += tuple(self.journal.output[len(self.seen) :][:count])

    @invariant()
    def one_history(self) -> None:
        tokens = tuple(self.journal.output)
        assert tokens[: len(self.seen)] == self.seen
        assert all(token == choice(tokens[:place]) for place, token in enumerate(tokens))


class Puppet(Bare):
    """Is one life of a target that sends its next chunk on request; `calls` are its open calls."""

    def __init__(self) -> None:
        self.calls: list[asyncio.Queue[int]] = []
        self.dead = False
        self.stopped = False

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        if self.dead:
            raise Unavailable("connection refused")
        orders: asyncio.Queue[int] = asyncio.Queue()
        self.calls.append(orders)
        try:
            said = spoken(ANSWER, request, (1,))
            while True:
                for _ in range(await orders.get()):
                    yield next(said)[1]
                if self.dead:
                    raise Unavailable("connection reset")
        finally:
            self.calls.remove(orders)

    def kill(self) -> None:
        self.dead = True
        for orders in self.calls:
            orders.put_nowait(0)

    async def close(self) -> None:
        pass


class Clusters(RuleBasedStateMachine):
    """Whatever fails, the client's stream of the real router is a prefix of the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.lives = {"a": 0, "b": 0}
        self.puppets: dict[str, Puppet] = {}
        self.router = Router(self.puppets.__getitem__, target_wait_s=1e4)
        self.chunks: list[Chunk] = []
        self.barren = 0  # restarts since the last of them
        self.reading = self.loop.create_task(self.listen())
        for name in self.lives:
            self.start(name)
        self.tell()

    async def listen(self) -> None:
        async for chunk in self.router.generate(ASKED):
            self.chunks.append(chunk)
            self.barren = 0

    def settle(self, seconds: float = 0.0) -> None:
        async def rest() -> None:
            await asyncio.sleep(seconds)
            for _ in range(20):
                await asyncio.sleep(0)

        self.loop.run_until_complete(rest())

    def start(self, name: str) -> None:
        self.puppets[f"{name}/{self.lives[name]}"] = Puppet()

    def truth(self) -> list[TargetState]:
        states = [(name, life, self.puppets[f"{name}/{life}"]) for name, life in self.lives.items()]
        return [
            there(name, life)
            for name, life, puppet in states
            if not puppet.dead and not puppet.stopped
        ]

    @rule()
    def tell(self) -> None:
        async def update() -> None:
            self.router.update(self.truth())

        self.loop.run_until_complete(update())
        self.settle()

    @rule(name=st.sampled_from("ab"), count=st.integers(1, 5))
    def speak(self, name: str, count: int) -> None:
        puppet = self.puppets[f"{name}/{self.lives[name]}"]
        if not puppet.dead and not puppet.stopped:
            for orders in puppet.calls:
                orders.put_nowait(count)
        self.settle()

    @rule(name=st.sampled_from("ab"))
    def kill(self, name: str) -> None:
        self.puppets[f"{name}/{self.lives[name]}"].kill()
        self.settle()

    @rule(name=st.sampled_from("ab"))
    def stop(self, name: str) -> None:
        self.puppets[f"{name}/{self.lives[name]}"].stopped = True

    @rule(name=st.sampled_from("ab"))
    def wake(self, name: str) -> None:
        self.puppets[f"{name}/{self.lives[name]}"].stopped = False

    @precondition(lambda self: self.barren < 4)  # far from where the router would blame the session
    @rule(name=st.sampled_from("ab"))
    def restart(self, name: str) -> None:
        self.barren += 1
        self.kill(name)
        self.lives[name] += 1
        self.start(name)

    @rule(seconds=st.floats(0.1, 5.0))
    def wait(self, seconds: float) -> None:
        self.settle(seconds)

    @invariant()
    def one_writer(self) -> None:
        assert sum(len(puppet.calls) for puppet in self.puppets.values()) <= 1

    @invariant()
    def one_history(self) -> None:
        tokens = tuple(token for chunk in self.chunks for token in chunk.tokens)
        pieces = tuple(piece for chunk in self.chunks for piece in chunk.pieces)
        assert tokens == PLAIN.tokens[: len(tokens)]
        assert pieces == PLAIN.pieces[: len(tokens)]

    def teardown(self) -> None:
        """In the end all of it is said: nothing was lost, and nobody waits for ever."""
        if not self.reading.done():
            for name in self.lives:
                self.restart(name)
            self.tell()
            self.settle(10.0)
            for _ in range(COUNT):
                for name in self.lives:
                    self.speak(name, 1)
        self.loop.run_until_complete(self.reading)
        assert heard(self.chunks) == PLAIN
        self.loop.run_until_complete(self.router.close())
        self.loop.close()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=200, stateful_step_count=40)
TestClusters = Clusters.TestCase
TestClusters.settings = settings(max_examples=100, stateful_step_count=30)
