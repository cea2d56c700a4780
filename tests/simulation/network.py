"""The network between simulated processes.

A call is a connection of its own. It delivers in order, as TCP does, unless its messages are
`noisy`. A peer that is cut off or stopped is noticed by its silence, one that is killed at once.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import Any

from tests.simulation.calls import Call, ClientCall
from tests.simulation.virtual_time import ProcessLoop, World

Pair = frozenset[str]


@dataclass(frozen=True, slots=True)
class Noise:
    """Probabilities of what happens to a message between a target and a drafter, and the longest
    delay of any message in seconds.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    cut: float = 0.0
    flip: float = 0.0
    delay: float = 0.002


@dataclass(eq=False, slots=True)
class Server:
    """What listens at one address."""

    loop: ProcessLoop
    handlers: dict[str, Any]


class Network:
    """Addresses, cut links, and all open calls."""

    def __init__(self, world: World, noise: Noise) -> None:
        self.world, self.noise = world, noise
        self.random = Random(f"{world.random.random()}")
        self.servers: dict[str, Server] = {}
        self.cut_since: dict[Pair, float] = {}
        self.calls: list[Call] = []

    def serve(self, address: str, loop: ProcessLoop, *services: Any) -> None:
        """Serve these gRPC services, as actors.rpc.server.serve does."""
        handlers = {}
        for service in services:
            for method in ("Speculate", "Generate", "Heartbeats", "Standby"):
                path = f"/{service.name}/{method}"
                found = service.handler().service(SimpleNamespace(method=path))
                if found is not None:
                    handlers[path] = found.stream_stream or found.unary_stream
        self.servers[address] = Server(loop, handlers)

    def channel(self, address: str, *_: object, **__: object) -> "Channel":
        """Stands for actors.rpc.tls.channel, in the process that is running."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ProcessLoop)
        return Channel(self, loop, address)

    # Faults

    def cut(self, one: str, other: str) -> None:
        """Let nothing pass between two processes."""
        self.cut_since.setdefault(frozenset((one, other)), self.world.now)
        self.watch()

    def heal(self, one: str, other: str) -> None:
        if self.cut_since.pop(frozenset((one, other)), None) is None:
            return
        for call in tuple(self.calls):
            for end in (call.client, call.server):
                if {end.loop.name, end.peer.loop.name} == {one, other}:
                    end.flush()

    def watch(self) -> None:
        """Ping all peers, after something has become unreachable."""
        for call in self.calls:
            for end in (call.client, call.server):
                end.watch()

    def lost(self, loop: ProcessLoop) -> None:
        """Tell the peers of a killed process."""
        for call in tuple(self.calls):
            for end in (call.client, call.server):
                if end.loop is loop and not end.is_cut:
                    end.peer.loop.call_later(self.delay(), end.peer.fail, "connection reset")

    def delay(self) -> float:
        return self.random.uniform(0.0002, self.noise.delay)

    def open_calls(self) -> list[str]:
        """Return the methods of calls that have an end in a living process that is not over."""
        return [
            call.path
            for call in self.calls
            if (call.client.status is None and not call.client.loop.dead)
            or (call.is_accepted and call.server.status is None and not call.server.loop.dead)
        ]

    def garble(self, call: Call, data: bytes, is_first: bool) -> list[tuple[bytes, bool]]:
        """Return what arrives of a message, and whether in order.

        The first one, a hello, is mostly spared: nothing follows it if it is lost.
        """
        noise, random = self.noise, self.random
        if not call.noisy or (is_first and random.random() < 0.9):
            return [(data, True)]
        drawn = random.random()
        for kind in ("drop", "duplicate", "reorder", "cut", "flip"):
            drawn -= getattr(noise, kind)
            if drawn >= 0.0:
                continue
            self.world.log("network", f"{kind}: {len(data)} bytes from {call.path}")
            match kind:
                case "drop":
                    return []
                case "duplicate":
                    return [(data, True), (data, False)]
                case "reorder":
                    return [(data, False)]
                case "cut":
                    return [(data[: random.randrange(len(data))], True)]
                case _:
                    place = random.randrange(len(data))
                    changed = bytes([data[place] ^ (1 << random.randrange(8))])
                    return [(data[:place] + changed + data[place + 1 :], True)]
        return [(data, True)]


class Channel:
    """A grpc.aio.Channel. Its calls end with it."""

    def __init__(self, network: Network, loop: ProcessLoop, address: str) -> None:
        self.network, self.loop, self.address = network, loop, address
        self.calls: list[Call] = []

    def stream_stream(self, path: str) -> Callable[[], ClientCall]:
        return lambda: self._call(path, None)

    def unary_stream(self, path: str) -> Callable[[bytes], ClientCall]:
        return lambda data: self._call(path, data)

    def _call(self, path: str, data: bytes | None) -> ClientCall:
        call = Call(self.network, self.loop, self.address, path, data)
        self.calls.append(call)
        return ClientCall(call)

    async def close(self) -> None:
        for call in self.calls:
            call.client.cancel()

    async def __aenter__(self) -> "Channel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
