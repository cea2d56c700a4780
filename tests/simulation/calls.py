"""gRPC's calls, as the product makes and serves them, over the simulated network."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from actors.rpc.common import CALLER_SILENCE_MS, KEEPALIVE_MS, TARGET_SILENCE_MS
from protos.drafting_codec import DRAFTING_SERVICE
from runtime.core.errors import InvalidRequest
from tests.simulation.virtual_time import ProcessLoop

if TYPE_CHECKING:
    from tests.simulation.network import Network

WINDOW_BYTES = 64 << 10  # sent and not yet read: a sender waits beyond it
CONNECT_TIMEOUT_S = 2.0
PEER_SILENCE_S = (TARGET_SILENCE_MS + KEEPALIVE_MS) / 1000.0
CALLER_SILENCE_S = (CALLER_SILENCE_MS + KEEPALIVE_MS) / 1000.0
EOF = object()  # the other side has said all


@dataclass(eq=False, slots=True)
class Status:
    """How a call ended."""

    code: Any
    details: str = ""
    trailing: tuple[tuple[str, str], ...] = ()


class End:
    """One end of a call: what has arrived, and what may still be sent."""

    peer: "End"

    def __init__(self, call: "Call", loop: ProcessLoop, silence_s: float) -> None:
        self.call, self.loop, self.silence_s = call, loop, silence_s
        self.items: deque[Any] = deque()
        self.metadata: tuple[Any, ...] | None = None
        self.status: Status | None = None
        self.news = asyncio.Event()
        self.room = asyncio.Event()
        self.in_flight = self.sent = 0
        self.held: list[Callable[[], None]] = []  # waits for the network to heal
        self.last_arrival = 0.0
        self.has_said_all = False
        self.on_lost: Callable[[], object] = lambda: None

    @property
    def is_cut(self) -> bool:
        return frozenset((self.loop.name, self.peer.loop.name)) in self.call.network.cut_since

    def silent_since(self) -> float | None:
        """Return since when the peer is unreachable; None if it is not."""
        pair = frozenset((self.loop.name, self.peer.loop.name))
        times = (self.call.network.cut_since.get(pair), self.peer.loop.stopped_since)
        return min((time for time in times if time is not None), default=None)

    def watch(self) -> None:
        if self.status is None and self.silent_since() is not None:
            self.loop.call_later(self.silence_s + 0.001, self._ping)

    def _ping(self) -> None:
        since, now = self.silent_since(), self.call.network.world.now
        if self.status is None and since is not None and now - since >= self.silence_s:
            self.fail("ping timeout")
            self.transmit(lambda: self.peer.fail("connection reset"))

    def transmit(self, arrive: Callable[[], None], ordered: bool = True) -> None:
        """Let something arrive at the peer, after a delay. A dead process sends nothing."""
        if self.loop.dead:
            return
        if self.is_cut:
            self.held.append(arrive)
            return
        network = self.call.network
        at = network.world.now + network.delay()
        if ordered:
            at = self.last_arrival = max(at, self.last_arrival + 1e-7)
        else:
            at += network.random.uniform(0.0, 0.2)
        self.peer.loop.call_at(at, arrive)

    def flush(self) -> None:
        held, self.held = self.held, []
        if self.peer.loop.dead:
            self.loop.call_later(self.call.network.delay(), self.fail, "connection reset")
        for arrive in held:
            self.transmit(arrive)

    async def send(self, data: bytes) -> None:
        """Send a message, or what noise leaves of it. Waits while the window is full."""
        while self.status is None and self.in_flight + len(data) > WINDOW_BYTES and self.in_flight:
            self.room.clear()
            await self.room.wait()
        if self.status is not None:
            raise self.error()
        self.in_flight += len(data)
        self.sent += 1
        for sent, ordered in self.call.network.garble(self.call, data, self.sent == 1):
            self.transmit(lambda sent=sent: self.peer.arrive(sent), ordered)  # type: ignore[misc]
            data = b""
        if data:  # lost
            self.in_flight -= len(data)

    def arrive(self, data: bytes) -> None:
        if self.status is None and not self.has_heard_all:
            self.items.append(data)
            self.news.set()

    def end_of_messages(self) -> None:
        self.items.append(EOF)
        self.news.set()

    @property
    def has_heard_all(self) -> bool:
        return bool(self.items) and self.items[-1] is EOF

    def close(self, status: Status) -> None:
        """End the call here. Messages that have arrived can still be read."""
        if self.status is None:
            self.status = status
            self.news.set()
            self.room.set()
            self.on_lost()

    def fail(self, why: str) -> None:
        if self.status is None and self.call.network.random.random() < 0.5:
            self.items.clear()
        self.close(Status(grpc.StatusCode.UNAVAILABLE, why))

    def cancel(self) -> None:
        if self.status is None:
            self.close(Status(grpc.StatusCode.CANCELLED, "cancelled here"))
            self.transmit(
                lambda: self.peer.close(Status(grpc.StatusCode.CANCELLED, "cancelled there"))
            )

    def error(self) -> grpc.aio.AioRpcError:
        assert self.status is not None
        return grpc.aio.AioRpcError(
            self.status.code,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(*self.status.trailing),
            self.status.details,
        )

    def read_now(self) -> Any:
        """Take the next message; the peer may then send more."""
        data = self.items.popleft()
        size, peer = len(data), self.peer
        if not self.call.noisy:
            self.transmit(lambda: peer.credit(size))
        else:
            peer.credit(size)
        return data

    def credit(self, size: int) -> None:
        self.in_flight = max(0, self.in_flight - size)
        self.room.set()


class Call:
    """One call of a method at an address."""

    def __init__(
        self, network: "Network", loop: ProcessLoop, address: str, path: str, data: bytes | None
    ) -> None:
        self.network, self.path, self.data = network, path, data
        self.noisy = DRAFTING_SERVICE in path
        self.client = End(self, loop, PEER_SILENCE_S)
        server = network.servers.get(address)
        self.task: asyncio.Task[None] | None = None
        if server is None:
            raise InvalidRequest(f"no server at {address}")
        self.server = End(self, server.loop, PEER_SILENCE_S if self.noisy else CALLER_SILENCE_S)
        self.client.peer, self.server.peer = self.server, self.client
        self.handler = server.handlers[path]
        network.calls.append(self)
        if server.loop.dead and not self.client.is_cut:
            loop.call_later(network.delay(), self.client.fail, "connection refused")
        else:
            if self.client.is_cut:
                loop.call_later(CONNECT_TIMEOUT_S, self._connect_timeout)
            self.client.transmit(self._accept)
            self.client.watch()

    @property
    def is_accepted(self) -> bool:
        """Tell whether the server knows of it."""
        return self.task is not None

    def _connect_timeout(self) -> None:
        if self.task is None and self.client.is_cut:
            self.client.fail("connection timed out")

    def _accept(self) -> None:
        """Begin to serve, in the server's process."""
        if self.server.status is not None or self.client.status is not None:
            return
        self.task = self.server.loop.create_task(self._serve())
        self.server.on_lost = self.task.cancel
        self.server.watch()

    async def _serve(self) -> None:
        context = ServerContext(self)
        status = Status(grpc.StatusCode.OK)
        try:
            if self.data is None:
                await self.handler(None, context)
            else:
                await self.handler(self.data, context)
        except grpc.aio.AbortError:
            status = context.aborted
        except Exception as error:  # noqa: BLE001 (gRPC answers UNKNOWN, which no client expects)
            self.network.world.fail(f"{self.path} at {self.server.loop.name} raised {error!r}")
        if self.server.status is None:
            self.server.on_lost = lambda: None
            self.server.transmit(lambda: self.client.close(status))
            self.server.close(status)


class ClientCall:
    """The methods of a grpc.aio call that the product uses."""

    def __init__(self, call: Call) -> None:
        self.call, self.end = call, call.client

    async def read(self) -> Any:
        end = self.end
        while True:
            if end.items:
                return end.read_now()
            if end.status is not None:
                break
            end.news.clear()
            await end.news.wait()
        if end.status.code is grpc.StatusCode.OK:
            return grpc.aio.EOF
        if end.status.details == "cancelled here":
            raise asyncio.CancelledError
        raise end.error()

    async def write(self, data: bytes) -> None:
        if self.end.status is not None:
            raise asyncio.InvalidStateError("the call is over")
        await self.end.send(data)

    async def done_writing(self) -> None:
        if not self.end.has_said_all:
            self.end.has_said_all = True
            self.end.transmit(self.end.peer.end_of_messages)

    def cancel(self) -> None:
        self.end.cancel()

    async def initial_metadata(self) -> tuple[Any, ...]:
        return self.end.metadata or ()


class ServerContext:
    """The methods of a grpc.aio.ServicerContext that the product uses."""

    def __init__(self, call: Call) -> None:
        self.call, self.end = call, call.server
        self.aborted = Status(grpc.StatusCode.UNKNOWN)

    async def read(self) -> Any:
        end = self.end
        while not end.items:
            end.news.clear()
            await end.news.wait()
        if end.items[0] is EOF:
            return grpc.aio.EOF
        return end.read_now()

    async def write(self, data: bytes) -> None:
        await self.end.send(data)

    async def send_initial_metadata(self, metadata: tuple[Any, ...]) -> None:
        def arrive() -> None:
            self.end.peer.metadata = metadata

        self.end.transmit(arrive)

    async def abort(
        self, code: Any, details: str = "", trailing: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self.aborted = Status(code, details, trailing)
        raise grpc.aio.AbortError
