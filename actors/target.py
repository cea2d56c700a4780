"""The process that hosts a target: its model runs on one thread, its gRPC server on another."""

import threading
from functools import lru_cache, partial

import grpc

from actors.calibration_store import save_target_state, target_state_file
from actors.cpu_affinity import import_at_low_priority, pin
from actors.rpc.client import GrpcLink
from actors.rpc.endpoints import ActorLocation, Endpoint, own_host, own_location
from actors.rpc.loop_thread import LoopThread
from actors.rpc.server import TargetService, serve
from protos.handshake import Hello
from runtime.config import ScheduleConfig, TargetConfig, TlsConfig
from runtime.core.errors import Unavailable, naming
from runtime.models.vocab_check import vocabulary_hash, vocabulary_size
from runtime.scheduler_factory import make_scheduler
from runtime.schedulers.base import Scheduler
from runtime.target.target import Target
from runtime.telemetry.reports import TargetReport
from runtime.telemetry.tracing import NO_TRACE, TARGET, Recording, Trace


class TargetActor:
    """Hosts a target, as a Ray actor or as a plain object.

    Ray calls place and configure it; requests and drafts travel over gRPC.
    """

    def __init__(
        self, config: TargetConfig, record: bool = False, tls: TlsConfig | None = None
    ) -> None:
        self.config, self.record, self.tls = config, record, tls
        self.address = ""
        self.lock = threading.Lock()  # Ray calls from several threads
        self.schedulers: dict[ScheduleConfig, Scheduler] = {}
        self.tokens: int | None = None  # columns of the logits
        self.peers: dict[str, Endpoint] = {}
        self.links: dict[Endpoint, GrpcLink] = {}

    def start(self) -> ActorLocation:
        """Loads the model and opens the server, if that has not been done; returns the location.

        Raises what the load or the server raises. (Ray would hide an error of the constructor.)
        """
        with self.lock:
            if not self.address:
                self._start()
        return self.where()

    def _start(self) -> None:
        pin(
            self.config.placement
        )  # before torch is loaded, so that the start does not use cores of running actors
        import_at_low_priority("actors.compose")
        from actors.compose import (
            build_target,
            freeze_gc,
        )  # loads torch, which only this process needs

        with naming(self.config.model):
            self.target, tokenizer, self.times = build_target(self.config, self.record)
        self.schedulers[self.config.schedule] = self.target.engine.scheduler
        self.hash_below = lru_cache(maxsize=8)(partial(vocabulary_hash, tokenizer))
        self.vocabulary_size = vocabulary_size(tokenizer)
        self.tokens = self.target.engine.model.vocabulary
        freeze_gc()
        self.network = LoopThread()
        host = self.config.placement.listen or own_host()
        self.server, port = self.network.run(start_serving(self.target, host, self.tls))
        self.address = f"{host}:{port}"

    def where(self) -> ActorLocation:
        return own_location(self.address)

    def report(self) -> TargetReport:
        """Returns the target's metrics. The controller uses the call as a health check too.

        Raises Unavailable if the engine's thread has ended.
        """
        if self.target.engine.over:
            raise Unavailable("the target's thread has ended: see its log")
        return self.target.report()

    def drain(self) -> None:
        """Refuses new sessions, and returns once the running ones have ended. Idempotent."""
        self.network.run(self.target.drain())

    def drafters(self, peers: list[Endpoint]) -> None:
        """Sets the current drafters.

        New drafters are attached, also to running sessions. Drafters not listed are detached, and
        their share of the tree is given to others.
        """
        with self.lock:
            wanted = {peer.name: peer for peer in peers}
            changed = [
                name for name in self.target.drafters if wanted.get(name) != self.peers.get(name)
            ]
            # A kept link keeps its strikes: a drafter in quarantine stays there.
            self.links = {peer: self.links.get(peer) or self._link(peer) for peer in peers}
            self.network.run(
                swap_links(
                    self.target,
                    changed,
                    {peer.name: link for peer, link in self.links.items() if not link.quarantined},
                )
            )
            self.peers = wanted

    def _link(self, peer: Endpoint) -> GrpcLink:
        hello = Hello(
            self.hash_below(self.vocabulary_size),
            self.config.model,
            peer.name,
            peer.incarnation,
            tokens=self.vocabulary_size,
        )
        return GrpcLink(
            peer.address, hello, tls=self.tls, tokens=self.tokens, hash_below=self.hash_below
        )

    def schedule(self, config: ScheduleConfig) -> None:
        """Uses this schedule from the next step on. A schedule that was used before keeps what it
        learned.
        """
        if config not in self.schedulers:
            self.schedulers[config] = make_scheduler(config, self.times)
        self.target.schedule(self.schedulers[config])

    def recording(self, on: bool) -> None:
        """Starts or stops recording a trace; drops what was recorded before."""
        self.target.engine.trace = Trace(TARGET) if on else NO_TRACE

    def trace(self) -> Recording:
        """Returns what was recorded since the last call."""
        return self.target.engine.trace.drain()

    def save_calibrations(self) -> None:
        """Saves what was learned about the drafters for the next process."""
        save_target_state(
            target_state_file(self.config),
            self.target.engine.requests.calibrations,
            tuple(self.schedulers.values()),
        )

    def attached(self) -> list[str]:
        """Returns the names of the connected drafters."""
        return list(self.target.drafters)

    def stop(self) -> None:
        """Ends sessions, links and the server."""
        self.network.run(stop_serving(self.target, self.server))
        self.network.stop()


# Outside the class: Ray treats a class with coroutines as an async actor, and would run all of
# its methods on an event loop.


async def start_serving(
    target: Target, host: str, tls: TlsConfig | None
) -> tuple[grpc.aio.Server, int]:
    target.start()
    return await serve([TargetService(target)], host, tls=tls)


async def swap_links(target: Target, leaving: list[str], links: dict[str, GrpcLink]) -> None:
    for name in leaving:
        await target.detach(name)
    for name, link in links.items():
        target.attach(name, link, link.strike)


async def stop_serving(target: Target, server: grpc.aio.Server) -> None:
    await target.stop()
    await server.stop(0.2)
