"""Clients that disconnect at any byte, while sending or receiving: everything is freed at once, and
memory does not grow."""

import asyncio
import contextlib
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from bench.chaos.chaos_report import percentile
from bench.chaos.clients import ReferenceCase
from bench.load.http_client import ask, completion_body, connection, http_request
from bench.load.served_fleet import ServedFleet, anonymous_memory

MAX_FREED_S, MAX_GROWTH_BYTES = 1.0, 20 << 20
GROUP_SIZE = 8
MAX_LISTEN_S = 0.3  # before a client disconnects
POLL_PERIOD_S = 0.005  # between two checks that all is freed
FREED_TIMEOUT_S = 30.0
LINGER_RESET = b"\1\0\0\0\0\0\0\0"  # for SO_LINGER: reset instead of close


@dataclass(frozen=True, slots=True)
class Disconnects:
    """The result of disconnecting clients.

    freed  seconds from the end of each group until nothing ran in the gateway and the target
    grown  growth in bytes, by process
    right  True if an answer afterwards was the same as before
    """

    clients: int
    freed: tuple[float, ...]
    grown: dict[str, int]
    right: bool

    @property
    def growth(self) -> int:
        """Sum the growth of the processes that grew."""
        return sum(max(0, grown) for grown in self.grown.values())

    @property
    def met(self) -> bool:
        return self.right and max(self.freed) <= MAX_FREED_S and self.growth <= MAX_GROWTH_BYTES

    def rows(self) -> list[tuple[str, str]]:
        times = ", ".join(
            f"{1e3 * percentile(self.freed, share):.0f} ms" for share in (50, 99, 100)
        )
        memory = ", ".join(
            f"{name} {grown / 2**20:+.1f}" for name, grown in sorted(self.grown.items())
        )
        return [
            (f"{self.clients} clients disconnect: freed after p50, p99, max (goal: 1 s)", times),
            (
                "memory, MiB (goal: growth at most 20)",
                f"{memory}; growth {self.growth / 2**20:.1f}",
            ),
        ]


async def disconnects(
    site: ServedFleet, cases: Sequence[ReferenceCase], clients: int, warm: int, seed: int
) -> Disconnects:
    """Disconnect clients in groups and measure.

    `warm` clients disconnect before memory is measured, so that all code and caches are in use.
    """
    draw = random.Random(seed)
    for _ in range(0, warm, GROUP_SIZE):
        await disconnect_group(site, cases, draw)
    before = {name: anonymous_memory(pid) for name, pid in site.pids.items()}
    freed = [await disconnect_group(site, cases, draw) for _ in range(0, clients, GROUP_SIZE)]
    grown = {name: anonymous_memory(pid) - before[name] for name, pid in site.pids.items()}
    last = await ask(site.port, http_request(completion_body(site.model, cases[0])))
    return Disconnects(GROUP_SIZE * len(freed), tuple(freed), grown, last.is_correct(cases[0]))


async def disconnect_group(
    site: ServedFleet, cases: Sequence[ReferenceCase], draw: random.Random
) -> float:
    """Disconnect a group of clients at once; return the time until they were freed."""
    await asyncio.gather(*(disconnect(site, draw.choice(cases), draw) for _ in range(GROUP_SIZE)))
    return await wait_until_free(site)


async def disconnect(site: ServedFleet, case: ReferenceCase, draw: random.Random) -> None:
    """Leave after a part of the request, or after all of it and a part of the answer; close or
    reset."""
    data = http_request(
        completion_body(site.model, case, stream=draw.random() < 0.7, n=draw.choice([1, 1, 3]))
    )
    sent = data[: draw.choice([len(data), len(data), draw.randrange(len(data))])]
    heard, reset = draw.randrange(4000), draw.random() < 0.5
    async with connection(site.port) as (reader, writer):
        writer.write(sent)
        await writer.drain()
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(MAX_LISTEN_S * draw.random()):
                await reader.read(heard)
        if reset:
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET
            )


async def wait_until_free(site: ServedFleet) -> float:
    """Return the seconds until nothing is running, or FREED_TIMEOUT_S if that does not happen."""
    now = asyncio.get_running_loop().time
    began = now()
    while now() - began < FREED_TIMEOUT_S:
        report = await asyncio.to_thread(site.report)
        if not report.live and not report.waiting and not await requests_in_flight(site.port):
            return now() - began
        await asyncio.sleep(POLL_PERIOD_S)
    return FREED_TIMEOUT_S


async def requests_in_flight(port: int) -> int:
    """Return the gateway's running and waiting requests, from its metrics."""
    async with connection(port) as (reader, writer):
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: load\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode()
    running = [
        line
        for line in text.splitlines()
        if line.startswith(("outrider:num_requests_running{", "outrider:num_requests_waiting{"))
    ]
    return round(sum(float(line.rpartition(" ")[2]) for line in running))
