"""Links to processes that die, stop or end: each is noticed."""

import asyncio
import os
import signal
import subprocess
import time

import pytest

from actors.rpc.client import GrpcLink
from actors.rpc.common import closing
from actors.rpc.server import DraftingService, serve
from runtime.core.errors import LinkLost
from tests.contracts.link_contract import PATIENCE_S, draft_for, process_of
from tests.support.fakes import HELLO, HOST, Feed, ScriptedDrafter, opening


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_drafter_that_dies_or_stops_is_noticed(how: signal.Signals) -> None:
    async def main(process: subprocess.Popen[str], address: str) -> float:
        async with (
            asyncio.timeout(3 * PATIENCE_S),
            closing(GrpcLink(address, HELLO).speculate(Feed(opening()))) as replies,
        ):
            await draft_for(replies, "s")
            os.kill(process.pid, how)
            start = time.monotonic()
            with pytest.raises(LinkLost, match="UNAVAILABLE"):
                await anext(replies)
            return time.monotonic() - start

    with process_of("tests.support.fakes") as (process, address):
        assert (
            asyncio.run(main(process, address)) < 5.0
        )  # about 2 s by design; a busy machine may be late


def test_a_server_that_stops_loses_the_link() -> None:
    async def main() -> None:
        server, port = await serve([DraftingService(ScriptedDrafter(), HELLO)], HOST)
        async with closing(GrpcLink(f"{HOST}:{port}", HELLO).speculate(Feed(opening()))) as replies:
            await draft_for(replies, "s")
            stopping = asyncio.create_task(server.stop(None))
            with pytest.raises(LinkLost):
                async with asyncio.timeout(PATIENCE_S):
                    await anext(replies)
            await stopping

    asyncio.run(main())
