"""Callers who shake hands with one server at the same time, while its certificates are renewed.

As a process of its own, since gRPC ends the process where it fails at this: `python -m tests.handshakes FOLDER`. It lays certificates into
FOLDER and prints how many were answered.
"""

import asyncio
import sys
from pathlib import Path

from actors.authority import Authority
from actors.grpc_server import TargetService, serve
from runtime.config import TlsConfig
from runtime.errors import Unavailable
from tests.fakes import HOST, ScriptedTarget
from tests.test_credentials import CHUNK, NOW, answered, lay

CALLERS, ROUNDS = 32, 6


async def main(folder: Path) -> int:
    authority = Authority("ours", NOW, 30)
    ours, theirs = lay(folder / "server", authority), lay(folder / "callers", authority)
    server, port = await serve([TargetService(ScriptedTarget(CHUNK))], HOST, tls=ours)
    count = 0
    for number in range(ROUNDS):
        renewal = [asyncio.to_thread(lay, folder / "server", authority)] if number % 2 else []
        calls = [asyncio.create_task(call(f"{HOST}:{port}", theirs)) for _ in range(CALLERS)]
        await asyncio.gather(*calls, *renewal)
        count += sum(one.result() for one in calls)
    await server.stop(None)
    return count


async def call(address: str, tls: TlsConfig) -> bool:
    """Whether it was answered: on a busy machine a connection may be given up."""
    try:
        return await answered(address, tls) == [CHUNK]
    except Unavailable:
        return False


if __name__ == "__main__":
    sys.stdout.write(f"{asyncio.run(main(Path(sys.argv[1])))} were answered\n")
