"""Sessions on real targets that are lost in mid-stream continue to the same end."""

import asyncio
import functools
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

import grpc
import pytest

from actors.routing.router import Router
from actors.rpc.client import GrpcTarget
from actors.rpc.server import TargetService, serve
from runtime.core.errors import TargetDied, TargetsLost, Unavailable
from runtime.core.messages import Chunk, Request, StandbyText
from runtime.core.sampling_params import SamplingParams
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from runtime.target.target import Target
from tests.contracts.link_contract import PATIENCE_S, process_of, soon
from tests.support.fakes import HOST
from tests.support.harness import Known, attached, hosted, running
from tests.support.router_harness import (
    PROMPT,
    Bare,
    Heard,
    all_of,
    finish_of,
    heard,
    there,
)

TOKENS = 40
MODEL = ToyModel(vocabulary=1024, sharpness=3.0)
FREE = SamplingParams(
    temperature=0.7,
    seed=11,
    max_tokens=TOKENS,
    logprobs=2,
    frequency_penalty=0.3,
    repetition_penalty=1.1,
)


@asynccontextmanager
async def target() -> AsyncIterator[Target]:
    async with running(MODEL, Fixed(4), finish=finish_of) as found:
        yield found


async def plainly(sampling: SamplingParams) -> Heard:
    async with target() as alone:
        return heard(
            await all_of(alone.generate(Request("plain", PROMPT, sampling, speculation=False)))
        )


@dataclass(eq=False)
class Mortal(Bare):
    """Is a target in this process that is lost after `left` tokens, within the next piece."""

    body: Target
    left: int = 10**9
    asked: list[Request] = field(default_factory=list)

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        self.asked.append(request)
        async with aclosing(self.body.generate(request)) as chunks:
            async for chunk in chunks:
                self.left -= len(chunk.tokens)
                if self.left < 0:
                    raise Unavailable("killed by the test")
                yield chunk

    async def close(self) -> None:
        pass


def test_a_target_lost_before_any_token_is_followed_exactly() -> None:
    """Covers sampling, penalties, logprobs, stop strings, multi-token characters and a drafter."""

    async def main() -> None:
        free = await plainly(FREE)
        place = next(
            place
            for place in range(TOKENS - 8, TOKENS)
            if len(free.pieces[place]) > 1 and free.pieces[place + 1]
        )
        stop = free.pieces[place][1:] + free.pieces[place + 1][:1]
        sampling = replace(FREE, stop=(stop, "".join(free.pieces[3:6]) + "\0"))
        plain = await plainly(sampling)
        assert plain.reason == "stop"
        assert len(plain.tokens) == place + 2
        assert "" in plain.pieces
        known = Known([*PROMPT, *plain.tokens], MODEL.vocabulary, branches=2)
        grouped = 0
        async with target() as first, target() as second, hosted(known) as drafter:
            await attached(first, "d", drafter)
            await attached(second, "d", drafter)
            for cut in range(len(plain.tokens)):
                bodies = {"t0/0": Mortal(first, cut), "t1/0": Mortal(second)}
                router = Router(bodies.__getitem__)
                router.update([there("t0"), there("t1")])
                found = heard(await all_of(router.generate(Request(f"s{cut}", PROMPT, sampling))))
                assert replace(found, logprobs=()) == replace(plain, logprobs=())
                for one, other in zip(found.logprobs, plain.logprobs, strict=True):
                    assert one.chosen == pytest.approx(other.chosen, abs=1e-5)
                    assert [token for token, _ in one.top] == [token for token, _ in other.top]
                (follower,) = bodies["t1/0"].asked
                assert follower.epoch == 1
                assert len(follower.committed) <= cut
                grouped += len(follower.committed) < cut
        assert grouped, "some cuts fell into a piece of several tokens"

    asyncio.run(main())


def test_the_next_life_of_the_same_target_takes_over() -> None:
    async def main() -> None:
        plain = await plainly(FREE)
        async with target() as body:
            lives = {f"t/{life}": Mortal(body, 10) for life in range(5)}
            router = Router(lives.__getitem__)
            router.update([there("t")])
            reading = asyncio.ensure_future(all_of(router.generate(Request("s", PROMPT, FREE))))
            for life in range(5):
                router.update([there("t", life)])
                await soon(functools.partial(over, reading, lives[f"t/{life}"]))
            assert replace(heard(await reading), logprobs=()) == replace(plain, logprobs=())

    asyncio.run(main())


def over(reading: asyncio.Future[list[Chunk]], life: Mortal) -> bool:
    return reading.done() or life.left < 0


@dataclass(eq=False)
class Paced:
    """Is a target that says a piece of a session only when the test permits it.

    So no session ends before its target does, however slow the machine is.
    """

    body: Target
    permits: defaultdict[str, asyncio.Semaphore]

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        async with aclosing(self.body.generate(request)) as chunks:
            async for chunk in chunks:
                await self.permits[request.session].acquire()
                yield chunk

    async def standby(self, updates: AsyncIterator[Sequence[StandbyText]]) -> None:
        await self.body.standby(updates)


def permits() -> defaultdict[str, asyncio.Semaphore]:
    return defaultdict(lambda: asyncio.Semaphore(0))


@dataclass(slots=True)
class Served:
    """A target behind its own server."""

    body: Target
    server: grpc.aio.Server
    address: str


@asynccontextmanager
async def served(
    paced: defaultdict[str, asyncio.Semaphore] | None = None,
) -> AsyncIterator[Served]:
    async with target() as body:
        speaker = body if paced is None else Paced(body, paced)
        server, port = await serve([TargetService(speaker)], HOST)
        try:
            yield Served(body, server, f"{HOST}:{port}")
        finally:
            await server.stop(None)


def test_servers_that_go_are_followed_and_drop_what_they_held() -> None:
    """Two of three targets stop during sessions; the router sees only closed connections."""
    asked = [Request(f"s{number}", PROMPT, replace(FREE, seed=number)) for number in range(6)]

    async def main() -> None:
        plain = [await plainly(request.sampling) for request in asked]
        paced = permits()

        async def next_piece(request: Request, stream: AsyncGenerator[Chunk, None]) -> Chunk:
            paced[request.session].release()
            return await anext(stream)

        async with AsyncExitStack() as stack:
            targets = [await stack.enter_async_context(served(paced)) for _ in range(3)]
            router = Router(GrpcTarget)
            stack.push_async_callback(router.close)
            router.update(
                [
                    replace(there(f"t{number}"), address=one.address)
                    for number, one in enumerate(targets)
                ]
            )
            streams = [router.generate(request) for request in asked]
            pairs = list(zip(asked, streams, strict=True))
            said: list[list[Chunk]] = [[await next_piece(*pair)] for pair in pairs]
            assert [len(one.body._sessions) for one in targets] == [2, 2, 2]
            for one in targets[:2]:
                await one.server.stop(None)
                for pair, chunks in zip(pairs, said, strict=True):
                    chunks.append(await next_piece(*pair))
            for request in asked:
                for _ in range(TOKENS):
                    paced[request.session].release()
            found = [
                heard([*chunks, *await all_of(stream)])
                for stream, chunks in zip(streams, said, strict=True)
            ]
            assert [replace(one, logprobs=()) for one in found] == [
                replace(one, logprobs=()) for one in plain
            ]
            assert sum(router.lost.values()) >= 4
            await soon(lambda: not any(one.body._sessions for one in targets))

    asyncio.run(main())


def test_a_router_lets_go_of_a_target_that_is_not_named_any_more() -> None:
    """Though it lives, and a client does not read just now: its work is cancelled."""

    async def main() -> None:
        plain = await plainly(FREE)
        async with served() as old, served() as new:
            router = Router(GrpcTarget)
            router.update([replace(there("t0"), address=old.address)])
            stream = router.generate(Request("s", PROMPT, FREE))
            said = [await anext(stream)]
            router.update([replace(there("t1"), address=new.address)])
            await soon(lambda: not old.body._sessions)
            said += await all_of(stream)
            assert replace(heard(said), logprobs=()) == replace(plain, logprobs=())
            await router.close()

    asyncio.run(main())


# A process of its own


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_stops_is_left_in_time(blow: signal.Signals) -> None:
    async def main(process: subprocess.Popen[str], address: str) -> float:
        async with served() as other:
            router = Router(GrpcTarget)
            router.update(
                [
                    replace(there("t0"), address=address),
                    replace(there("t1", sessions=1), address=other.address),
                ]
            )
            stream = router.generate(Request("s", PROMPT, FREE))
            said = [await anext(stream)]
            os.kill(process.pid, blow)
            struck = time.monotonic()
            async with asyncio.timeout(3 * PATIENCE_S):
                said.append(await anext(stream))
            gap = time.monotonic() - struck
            said += await all_of(stream)
            plain = await plainly(FREE)
            assert replace(heard(said), logprobs=()) == replace(plain, logprobs=())
            await router.close()
            return gap

    with process_of("tests.actors.routing.test_failover") as (process, address):
        assert (
            asyncio.run(main(process, address)) < 5.0
        )  # about 2 s by design; a busy machine may be late


def test_a_request_that_ends_two_processes_is_given_to_no_third() -> None:
    async def main(addresses: list[str]) -> None:
        async with served() as third:
            router = Router(GrpcTarget)
            deadly = [
                replace(there(f"t{number}"), address=address)
                for number, address in enumerate(addresses)
            ]
            router.update([*deadly, replace(there("t2", sessions=5), address=third.address)])
            with pytest.raises(TargetsLost, match="2 targets died while they held this request"):
                await all_of(router.generate(Request(DEADLY, PROMPT, FREE)))
            assert sum(router.lost.values()) == 2
            assert (
                heard(await all_of(router.generate(Request("s", PROMPT, FREE)))).reason == "length"
            )
            await router.close()

    with (
        process_of("tests.actors.routing.test_failover") as (one, first),
        process_of("tests.actors.routing.test_failover") as (other, second),
    ):
        asyncio.run(main([first, second]))
        assert one.wait(PATIENCE_S) == other.wait(PATIENCE_S) == 1


def test_what_a_target_says_itself_is_not_its_death() -> None:
    async def main() -> None:
        async with served() as drained, served() as gone:
            await drained.body.drain()
            await gone.server.stop(None)
            for address in (drained.address, gone.address):
                called = GrpcTarget(address)
                with pytest.raises(Unavailable) as found:
                    await all_of(called.generate(Request("s", PROMPT, FREE)))
                assert not isinstance(found.value, TargetDied)
                await called.close()

    asyncio.run(main())


DEADLY = "deadly"  # a session that ends its target


class Halting:
    """Says the first token, and nothing more."""

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        if request.session == DEADLY:
            os._exit(1)
        async with target() as body, aclosing(body.generate(request)) as chunks:
            yield await anext(chunks)
            await asyncio.Event().wait()

    async def standby(self, updates: AsyncIterator[Sequence[StandbyText]]) -> None:
        async for _ in updates:
            pass


async def halting() -> None:
    server, port = await serve([TargetService(Halting())], HOST)
    print(port, flush=True)  # noqa: T201 - read by the test that started this process
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(halting())
