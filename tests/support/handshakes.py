"""Many callers connect to one server while its certificates are renewed.

It is a process of its own, since gRPC ends the process if it fails here. Run
`python -m tests.support.handshakes FOLDER`: it writes certificates to FOLDER and prints how many
calls were answered afterwards.
"""

import asyncio
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

from actors.rpc.certificate_authority import CertificateAuthority
from actors.rpc.server import TargetService, serve
from tests.support.certificates import CHUNK, NOW, answered, write_certificates
from tests.support.fakes import HOST, ScriptedTarget

CALLERS, ROUNDS = 100, 20


async def main(folder: Path) -> int:
    authority = CertificateAuthority("ours", NOW, 30)
    ours, theirs = (
        write_certificates(folder / "server", authority),
        write_certificates(folder / "callers", authority),
    )
    server, port = await serve([TargetService(ScriptedTarget(CHUNK))], HOST, tls=ours)
    for number in range(ROUNDS):
        renewal = (
            [asyncio.to_thread(write_certificates, folder / "server", authority)]
            if number % 4 == 3
            else []
        )
        await asyncio.gather(asyncio.to_thread(crowd, port), *renewal)
    found = [await answered(f"{HOST}:{port}", theirs) for _ in range(3)]
    await server.stop(None)
    return found.count([CHUNK])


def crowd(port: int) -> None:
    """Opens and closes many connections at once; the server reads its certificates for each."""
    with ExitStack() as stack:
        for _ in range(CALLERS):
            stack.enter_context(socket.create_connection((HOST, port)))


if __name__ == "__main__":
    sys.stdout.write(f"{asyncio.run(main(Path(sys.argv[1])))} were answered\n")
