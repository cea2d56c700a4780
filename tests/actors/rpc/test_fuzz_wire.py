"""Malformed messages to targets and drafters are refused and leave other streams alone.

`OUTRIDER_FUZZ=5000` sends more of them.
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc
import pytest

from actors.rpc.client import GrpcLink, GrpcTarget
from actors.rpc.server import DraftingService, TargetService, serve
from protos import drafting_codec, target_codec
from protos import speculation_pb2 as pb
from runtime.core import limits
from runtime.core.messages import Close, Commit, Resync, Share
from runtime.drafters.model import ModelDrafter
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from tests.contracts.link_contract import PATIENCE_S, soon
from tests.support.fakes import DRAFTER, HELLO, HOST, chain, opening, raw_drafter
from tests.support.harness import asking, attached, hosted, output, plain, running

COUNT = int(os.environ.get("OUTRIDER_FUZZ", "500"))
FRAMES = 20  # on one stream
AT_ONCE = 8
TOY = ToyModel(vocabulary=24, memory=3, context=512)
CANARY = asking((3, 1, 4, 1, 5), session="canary", max_tokens=60, temperature=0.8, seed=11)

NUMBERS = (0, 1, -1, 23, 24, 2**31 - 1, -(2**31))
BIG = (0, 1, 2**32 - 1)
REALS = (0.0, -0.0, 1.0, -1.0, 1e308, float("nan"), float("inf"), -float("inf"))
TEXTS = (
    "",
    "s",
    "t",
    "\0",
    "../../etc/passwd",
    "x" * limits.NAME_LENGTH,
    "x" * (limits.NAME_LENGTH + 1),
    "\U0001f600" * 300,
)

Make = Callable[[Random], bytes]


def numbers(random: Random) -> list[int]:
    return [random.choice(NUMBERS) for _ in range(random.choice([0, 1, 2, 5, 40]))]


def sampling(random: Random) -> pb.Sampling:
    pick = random.choice
    found = pb.Sampling(
        temperature=pick(REALS),
        top_k=pick(NUMBERS),
        top_p=pick(REALS),
        min_p=pick(REALS),
        seed=pick((0, -1, 2**63 - 1)),
    )
    found.max_tokens, found.min_tokens = pick((*NUMBERS, 5)), pick(NUMBERS)
    found.repetition_penalty, found.presence_penalty, found.frequency_penalty = (
        pick(REALS),
        pick(REALS),
        pick(REALS),
    )
    found.stop.extend(pick(TEXTS) for _ in range(pick([0, 1, 9])))
    found.bias_tokens.extend(numbers(random))
    found.bias_values.extend(pick(REALS) for _ in range(pick([0, 1, 2, 400])))
    return found if random.random() < 0.5 else pb.Sampling(max_tokens=pick((1, 5, 600)))


def hostile_request(random: Random) -> bytes:
    prompt = numbers(random) if random.random() < 0.5 else [1, 2, 3]
    request = pb.GenerateRequest(
        session=random.choice(TEXTS),
        prompt=prompt,
        sampling=sampling(random),
        committed=numbers(random),
    )
    return bytes(request.SerializeToString())


def hostile_event(random: Random) -> bytes:
    pick = random.choice
    opened = pb.Open(
        session=pick(TEXTS),
        tokens=numbers(random),
        prompt=pick(BIG),
        share_index=pick(BIG),
        share_of=pick(BIG),
    )
    opened.sampling.CopyFrom(sampling(random))
    opened.style.CopyFrom(pb.Style(width=pick(BIG), branches=pick(BIG), passes=pick(BIG)))
    commit = pb.Commit(
        session=pick(TEXTS),
        epoch=pick(BIG),
        base=pick(BIG),
        tokens=numbers(random),
        key=pick((0, 2**64 - 1)),
    )
    share = pb.Share(session=pick(TEXTS), index=pick(BIG), of=pick(BIG))
    features = pb.Features(session=pick(TEXTS), epoch=pick(BIG), start=pick(BIG), width=pick(BIG))
    features.rows = random.randbytes(pick((0, 2, 4096, limits.FEATURE_BYTES + 2)))
    frames = (
        pb.ToDrafter(features=features),
        pb.ToDrafter(open=opened),
        pb.ToDrafter(commit=commit),
        pb.ToDrafter(share=share),
        pb.ToDrafter(hello=pb.Hello()),
    )
    return bytes(pick(frames).SerializeToString())


def hostile_reply(random: Random) -> bytes:
    if random.random() < 0.2:
        layers = [random.choice(BIG) for _ in range(random.choice((0, 1, 3, 10_000)))]
        asked = pb.FromDrafter(feature_request=pb.FeatureRequest(layers=layers))
        return bytes(asked.SerializeToString())
    nodes = random.choice([0, 1, 3, limits.DRAFT_NODES, limits.DRAFT_NODES + 1])
    parents, tokens, scores = (
        random.randbytes(8 * nodes),
        random.randbytes(4 * nodes),
        random.randbytes(4 * nodes),
    )
    draft = pb.Draft(
        session=random.choice(("canary", "s")),
        epoch=random.choice(BIG),
        parents=parents,
        tokens=tokens,
    )
    draft.scores = random.choice([scores, scores[:-1], bytes(4 * nodes)])
    return bytes(pb.FromDrafter(draft=draft).SerializeToString())


REQUESTS: tuple[Make, ...] = (
    lambda _: target_codec.encode_request(asking((1, 2, 3), max_tokens=4)),
    hostile_request,
)
EVENTS: tuple[Make, ...] = (
    lambda _: drafting_codec.encode_event(opening(tokens=(1, 2, 3))),
    lambda _: drafting_codec.encode_event(Commit("s", 1, 3, (4,), 99)),
    lambda _: drafting_codec.encode_event(Share("s", 0, 2)),
    lambda _: drafting_codec.encode_event(Close("s")),
    hostile_event,
    hostile_event,
)
REPLIES: tuple[Make, ...] = (
    lambda _: drafting_codec.encode_reply(chain("canary", 0, 5)),
    lambda _: drafting_codec.encode_reply(Resync("canary", DRAFTER)),
    hostile_reply,
    hostile_reply,
)


def spoiled(random: Random, makers: tuple[Make, ...]) -> bytes:
    """A frame with something wrong about it; now and then it is a valid one all the same."""
    frame = bytearray(random.choice(makers)(random))
    match random.randrange(6):
        case 0:
            return random.randbytes(random.choice([0, 1, 7, 300, 20_000]))
        case 1:
            return bytes(frame[: random.randrange(len(frame) + 1)])
        case 2:
            for _ in range(random.choice([1, 1, 8])):
                frame[random.randrange(len(frame))] ^= 1 << random.randrange(8)
        case 3:
            frame += random.choice(makers)(random)  # fields given twice
        case 4:
            start = random.randrange(len(frame))
            frame[start : start + random.randrange(9)] = random.randbytes(random.randrange(9))
        case _:
            pass
    return bytes(frame)


@dataclass(slots=True)
class Attack:
    """What was sent, and what came back."""

    random: Random
    codes: Counter[str] = field(default_factory=Counter)
    sent: int = 0

    async def on_target(self, channel: grpc.aio.Channel) -> None:
        self.sent += 1
        call = channel.unary_stream(f"/{target_codec.TARGET_SERVICE}/Generate")(
            spoiled(self.random, REQUESTS)
        )
        try:
            async with asyncio.timeout(PATIENCE_S):
                await call.read()
            self.codes["answered" if not call.done() else (await call.code()).name] += 1
        except grpc.aio.AioRpcError as error:
            self.codes[error.code().name] += 1
        finally:
            call.cancel()

    async def on_drafter(self, channel: grpc.aio.Channel) -> None:
        call = channel.stream_stream(f"/{drafting_codec.DRAFTING_SERVICE}/Speculate")()
        greeted = self.random.random() < 0.8
        try:
            async with asyncio.timeout(PATIENCE_S):
                if greeted:
                    await call.write(drafting_codec.encode_hello_to_drafter(HELLO))
                    await call.read()
                for _ in range(
                    FRAMES if greeted else 1
                ):  # a write behind the refusal would hide it
                    self.sent += 1
                    await call.write(spoiled(self.random, EVENTS))
                await call.done_writing()
                while await call.read() is not grpc.aio.EOF:
                    pass
                self.codes[(await call.code()).name] += 1
        except grpc.aio.AioRpcError:
            self.codes[(await call.code()).name] += 1
        finally:
            call.cancel()

    async def as_drafter(self, context: Any) -> None:
        await context.read()
        await context.write(drafting_codec.encode_hello_from_drafter(HELLO))
        while not context.cancelled():
            self.sent += 1
            await context.write(spoiled(self.random, REPLIES))


async def repeated(step: Callable[[], Awaitable[None]], attack: Attack) -> None:
    while attack.sent < COUNT:
        await step()


def test_malformed_messages_are_refused_and_a_stream_beside_them_is_as_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked, guessed, forged = (Attack(Random(seed)) for seed in range(3))

    async def main() -> None:
        async with (
            running(TOY, Fixed(4, 0.002)) as target,
            hosted(ModelDrafter(TOY), DRAFTER) as host,
        ):
            service = DraftingService(host, HELLO)
            drafting, port = await serve([service], HOST)
            serving, target_port = await serve([TargetService(target)], HOST)
            channels = [
                grpc.aio.insecure_channel(f"{HOST}:{number}") for number in (target_port, port)
            ]
            await attached(target, DRAFTER, GrpcLink(f"{HOST}:{port}", HELLO))
            client = GrpcTarget(f"{HOST}:{target_port}")

            async def canary() -> None:
                found = output([chunk async for chunk in client.generate(CANARY)])
                assert found.said() == plain(TOY, CANARY).said()

            async def sing() -> None:
                """Runs next to all of this, and next to a hostile drafter that always returns."""
                while asked.sent < COUNT or guessed.sent < COUNT:
                    target.attach("hostile", GrpcLink(hostile, HELLO))
                    await canary()

            async with raw_drafter(forged.as_drafter) as hostile, asyncio.timeout(240 + COUNT / 20):
                await asyncio.gather(
                    *(
                        repeated(lambda: asked.on_target(channels[0]), asked)
                        for _ in range(AT_ONCE)
                    ),
                    *(
                        repeated(lambda: guessed.on_drafter(channels[1]), guessed)
                        for _ in range(AT_ONCE)
                    ),
                    sing(),
                )
                await target.detach("hostile")
            await canary()
            await soon(lambda: not target.engine.requests.running and not host.draft_engine.states)
            assert host.alive
            assert service.counters["malformed"] > COUNT / 10
            assert target.drafters == (DRAFTER,), "the honest drafter is still there"
            await client.close()
            for channel in channels:
                await channel.close()
            await serving.stop(None)
            await drafting.stop(None)

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert caplog.records == [], "nothing went wrong that was not foreseen"
    assert forged.sent > 0
    assert set(asked.codes) <= {"answered", "OK", "INVALID_ARGUMENT"}, asked.codes
    assert set(guessed.codes) <= {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION"}, guessed.codes
    assert asked.codes["INVALID_ARGUMENT"] > COUNT / 2
    assert asked.codes["answered"] > 0, (
        "some are valid after all, or the frames would be too simple"
    )
