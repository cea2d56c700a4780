"""A drafter that has broken the protocol too often: who calls it again, and when."""

import asyncio
from typing import Any, ClassVar

from actors.endpoints import Endpoint
from actors.grpc_links import STRIKE_S, GrpcLink
from actors.target import TargetActor
from protos import codec
from runtime.config import TargetConfig
from runtime.tree import text_key
from tests.fakes import HELLO, chain, raw_drafter
from tests.test_links import BAD, greeted, lost

ROOT = text_key((5, 6, 7))


def test_a_link_is_shut_for_a_minute_after_the_last_strike() -> None:
    now = [0.0]

    async def main() -> None:
        async with raw_drafter(lambda context: greeted(context, BAD, BAD, BAD)) as address:
            link = GrpcLink(address, HELLO, now=lambda: now[0])
            shut = [link.shut]
            await lost(link)
        for now[0] in (0.0, STRIKE_S - 1, STRIKE_S):
            shut.append(link.shut)
        assert shut == [False, True, True, False]

    asyncio.run(main())


def test_a_token_that_there_is_not_is_a_strike() -> None:
    async def main() -> None:
        known, beyond = (codec.encode_reply(chain("s", 1, ROOT, nodes)) for nodes in (10, 11))
        async with raw_drafter(lambda context: greeted(context, known, beyond, beyond, beyond)) as address:
            link = GrpcLink(address, HELLO, tokens=10)
            assert "token 10 of a vocabulary of 10" in await lost(link)
            assert link.counters["malformed"] == 3

    asyncio.run(main())


def test_a_target_does_not_call_a_drafter_in_quarantine() -> None:
    """It is told twice a second who drafts, which brings back what was lost: but not this one, until its minute is over."""

    class Attached:
        links: ClassVar[dict[str, GrpcLink]] = {}
        drafters = ()

        def attach(self, name: str, link: GrpcLink) -> None:
            self.links[name] = link

    class Network:
        run = staticmethod(asyncio.run)

    actor: Any = TargetActor(TargetConfig(model="m"))
    actor.target, actor.network, actor.vocabulary = Attached(), Network(), "v"
    peers = [Endpoint("bad-0", "h:1", 0), Endpoint("good-0", "h:2", 0)]
    actor.drafters(peers)
    assert list(Attached.links) == ["bad-0", "good-0"]
    link, now = Attached.links.pop("bad-0"), [0.0]
    link._now = lambda: now[0]
    link._strikes.extend([0.0, 0.0, 0.0])
    actor.drafters(peers)
    assert list(Attached.links) == ["good-0"]
    now[0] = STRIKE_S
    actor.drafters(peers)
    assert Attached.links["bad-0"] is link, "which still knows of its strikes"
