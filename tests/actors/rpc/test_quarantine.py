"""A drafter that breaks the protocol or floods its target is not called for a while."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from actors.rpc.client import MAX_STRIKES, STRIKE_WINDOW_S, GrpcLink
from actors.rpc.common import closing
from actors.rpc.endpoints import Endpoint
from actors.rpc.reply_budget import FRAMES_PER_EVENT, INITIAL_GRANT, NODE_BYTES, grant_for
from actors.rpc.server import DraftingService, serve
from actors.target import TargetActor
from protos import bundle, drafting_codec
from protos import speculation_pb2 as pb
from runtime.config import TargetConfig
from runtime.core import limits
from runtime.core.errors import LinkLost
from runtime.core.messages import DEFAULT_STYLE, Commit, Draft, Event, Reply, Resync
from runtime.core.node_keys import text_key
from runtime.drafters.model import ModelDrafter
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from tests.contracts.link_contract import PATIENCE_S, over_grpc, soon
from tests.support.fakes import DRAFTER, HELLO, HOST, Feed, chain, opening, raw_drafter
from tests.support.harness import answer, asking, attached, hosted, plain, running
from tests.support.raw_links import BAD, LATER, greeted, lost

TOY = ToyModel(vocabulary=24, memory=3, context=600)
ROOT = text_key((5, 6, 7))
WHOLE = chain("s", 1, ROOT, limits.DRAFT_NODES)
SAME = replace(WHOLE, parents=np.full_like(WHOLE.parents, ROOT), tokens=np.zeros_like(WHOLE.tokens))
FLOODS = {
    "growth": drafting_codec.encode_reply(WHOLE),
    "one guess again and again": drafting_codec.encode_reply(SAME),
    "growth of a session that there is not": drafting_codec.encode_reply(
        replace(WHOLE, session="ghost")
    ),
    "growth of another epoch": drafting_codec.encode_reply(replace(WHOLE, epoch=7)),
    "single nodes": drafting_codec.encode_reply(chain("s", 1, ROOT, 1)),
    "empty growth": drafting_codec.encode_reply(
        Draft("s", 1, DRAFTER, *map(np.array, ([], [], [])))
    ),
    "requests for the text": drafting_codec.encode_reply(Resync("s", DRAFTER)),
    "many requests at once": bundle.bundle_replies(
        [drafting_codec.encode_reply(Resync("s", DRAFTER))] * limits.FRAMES_PER_MESSAGE
    )[0],
    "frames of a later version": LATER,
    "long frames of a later version": LATER[:2]
    + bytes([0x80, 0x80, 0x3C])
    + bytes(limits.MESSAGE_BYTES * 15 // 16),
    "empty bundles": pb.FromDrafter(bundle=pb.Bundle()).SerializeToString(),
    "nothing": b"",
}


def test_a_link_is_shut_for_a_minute_after_the_last_strike() -> None:
    now = [0.0]

    async def main() -> None:
        async with raw_drafter(lambda context: greeted(context, BAD, BAD, BAD)) as address:
            link = GrpcLink(address, HELLO, now=lambda: now[0])
            shut = [link.quarantined]
            await lost(link)
        for now[0] in (0.0, STRIKE_WINDOW_S - 1, STRIKE_WINDOW_S):
            shut.append(link.quarantined)
        assert shut == [False, True, True, False]

    asyncio.run(main())


def test_a_token_that_there_is_not_is_a_strike() -> None:
    async def main() -> None:
        known, beyond = (
            drafting_codec.encode_reply(chain("s", 1, ROOT, nodes)) for nodes in (10, 11)
        )
        async with raw_drafter(
            lambda context: greeted(context, known, beyond, beyond, beyond)
        ) as address:
            link = GrpcLink(address, HELLO, tokens=10)
            assert "token 10 of a vocabulary of 10" in await lost(link)
            assert link.counters["malformed"] == 3

    asyncio.run(main())


def test_a_target_does_not_call_a_drafter_in_quarantine() -> None:
    """Drafters are announced twice a second, but this one returns only after its minute."""

    class Attached:
        links: ClassVar[dict[str, GrpcLink]] = {}
        drafters = ()

        def attach(self, name: str, link: GrpcLink, _: Any) -> None:
            self.links[name] = link

    class Network:
        run = staticmethod(asyncio.run)

    actor: Any = TargetActor(TargetConfig(model="m"))
    actor.target, actor.network = Attached(), Network()
    actor.hash_below, actor.vocabulary_size = str, 3
    peers = [Endpoint("bad-0", "h:1", 0), Endpoint("good-0", "h:2", 0)]
    actor.drafters(peers)
    assert list(Attached.links) == ["bad-0", "good-0"]
    link, now = Attached.links.pop("bad-0"), [0.0]
    link._now = lambda: now[0]
    link._strikes.extend([0.0, 0.0, 0.0])
    actor.drafters(peers)
    assert list(Attached.links) == ["good-0"]
    now[0] = STRIKE_WINDOW_S
    actor.drafters(peers)
    assert Attached.links["bad-0"] is link, "which still knows of its strikes"


# Floods


async def flooding(context: Any, frame: bytes) -> None:
    """A raw drafter that says hello, then this frame for ever, as fast as it can."""
    await context.read()
    await context.write(drafting_codec.encode_hello_from_drafter(HELLO))
    while not context.cancelled():
        await context.write(frame)


async def count(link: GrpcLink, events: AsyncIterator[Event], taken: Counter[str]) -> None:
    """Counts what the link lets through, until it is over."""
    async with asyncio.timeout(PATIENCE_S), closing(link.speculate(events)) as replies:
        async for reply in replies:
            taken["replies"] += 1
            taken["nodes"] += len(reply.tokens) if isinstance(reply, Draft) else 0


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_is_let_in_up_to_the_budget_and_ends_in_quarantine(flood: str) -> None:
    """However little time passes, and whatever it consists of."""
    taken: Counter[str] = Counter()
    opened = opening()
    granted = grant_for(opened.session, DEFAULT_STYLE, resting=False)

    async def main() -> None:
        async with raw_drafter(lambda context: flooding(context, FLOODS[flood])) as address:
            link = GrpcLink(address, HELLO, now=lambda: 0.0)
            with pytest.raises(LinkLost, match="quarantined after 3 strikes, the last: surplus"):
                await count(link, Feed(opened), taken)
        assert link.counters["surplus"] == MAX_STRIKES
        assert link.quarantined
        assert taken["replies"] + link.counters["unknown"] <= INITIAL_GRANT.frames + granted.frames
        assert taken["nodes"] <= (INITIAL_GRANT.size + granted.size) // NODE_BYTES

    asyncio.run(main())


class Talkative:
    """A DraftLink that answers each Open and Commit with all that the budget has for one event."""

    async def speculate(self, events: AsyncIterator[Event]) -> AsyncIterator[Reply]:
        async for event in events:
            key = event.key if isinstance(event, Commit) else ROOT
            yield chain(event.session, 1, key, limits.DRAFT_NODES)
            for _ in range(FRAMES_PER_EVENT - 1):
                yield chain(event.session, 1, key, 1)


def test_each_commit_renews_the_budget() -> None:
    commits = 200

    async def main() -> None:
        async with over_grpc(Talkative()) as link, asyncio.timeout(PATIENCE_S):
            feed = Feed(opening())
            async with closing(link.speculate(feed)) as replies:
                for number in range(commits):
                    found = [await anext(replies) for _ in range(FRAMES_PER_EVENT)]
                    assert all(isinstance(reply, Draft) for reply in found)
                    feed.put(Commit("s", 1, 3 + number, (8,), number))
            assert isinstance(link, GrpcLink)
            assert link.counters == {}

    asyncio.run(main())


def test_a_flood_changes_no_output_and_an_honest_drafter_beside_it_stays() -> None:
    requests = [asking((3, 1, 4, 1, 5), name, max_tokens=150) for name in ("s", "t", "u")]

    async def main() -> None:
        async with (
            running(TOY, Fixed(4, 0.002)) as target,
            hosted(ModelDrafter(TOY), DRAFTER) as host,
        ):
            server, port = await serve([DraftingService(host, HELLO)], HOST)
            honest = GrpcLink(f"{HOST}:{port}", HELLO)
            async with raw_drafter(lambda context: flooding(context, FLOODS["growth"])) as address:
                flooder = GrpcLink(address, HELLO)
                await attached(target, DRAFTER, honest)
                target.attach("flood", flooder)
                for found, request in zip(
                    await asyncio.gather(*(answer(target, one) for one in requests)),
                    requests,
                    strict=True,
                ):
                    assert found.said() == plain(TOY, request).said()
                await soon(lambda: flooder.quarantined and "flood" not in target.drafters)
            assert target.drafters == (DRAFTER,)
            assert honest.counters == {}
            await server.stop(None)

    asyncio.run(main())
