"""The process that hosts a target: a model's thread, and a gRPC loop on a thread of its own."""

import threading

import grpc

from actors.calibration_store import save_calibrations
from actors.cpu_affinity import import_at_low_priority, pin
from actors.rpc.client import GrpcLink
from actors.rpc.endpoints import ActorLocation, Endpoint, own_host, own_location
from actors.rpc.loop_thread import LoopThread
from actors.rpc.server import TargetService, serve
from protos.handshake import Hello
from runtime.config import ScheduleConfig, TargetConfig, TlsConfig
from runtime.core.errors import Unavailable
from runtime.model_paths import calibration_file
from runtime.models.vocab_check import vocabulary_hash
from runtime.scheduler_factory import make_scheduler
from runtime.schedulers.base import Scheduler
from runtime.target.target import Target
from runtime.telemetry.reports import TargetReport
from runtime.telemetry.tracing import NO_TRACE, TARGET, Recording, Trace


class TargetActor:
    """A Ray actor, or used as it is. Ray's calls place and inform it; requests and drafts come by gRPC."""

    def __init__(
        self, config: TargetConfig, record: bool = False, tls: TlsConfig | None = None
    ) -> None:
        self.config, self.record, self.tls = config, record, tls
        self.address = ""
        self.lock = threading.Lock()  # Ray calls from several threads
        self.schedulers: dict[ScheduleConfig, Scheduler] = {}
        self.tokens: int | None = None  # of the vocabulary
        self.peers: dict[str, Endpoint] = {}
        self.links: dict[Endpoint, GrpcLink] = {}

    def start(self) -> ActorLocation:
        """Loads the model and opens the server, once; raises what is wrong with either. (Ray would hide it in a constructor.)"""
        with self.lock:
            if not self.address:
                self._start()
        return self.where()

    def _start(self) -> None:
        pin(
            self.config.placement
        )  # before torch is loaded: who starts does not take the cores of those that serve
        import_at_low_priority("actors.compose")
        from actors.compose import (
            build_target,
            freeze_gc,
        )  # torch: only the process that computes pays for it

        self.target, tokenizer, self.times = build_target(self.config, self.record)
        self.schedulers[self.config.schedule] = self.target.engine.scheduler
        self.vocabulary, self.tokens = (
            vocabulary_hash(tokenizer),
            self.target.engine.model.vocabulary,
        )
        freeze_gc()
        self.network = LoopThread()
        host = self.config.placement.listen or own_host()
        self.server, port = self.network.run(start_serving(self.target, host, self.tls))
        self.address = f"{host}:{port}"

    def where(self) -> ActorLocation:
        return own_location(self.address)

    def report(self) -> TargetReport:
        """What it has done, and a sign of life. Raises Unavailable where the thread that decides has ended."""
        if self.target.engine.over:
            raise Unavailable("the target's thread has ended: see its log")
        return self.target.report()

    def drain(self) -> None:
        """Refuses new sessions from now on; returns when those under way are over. May be called again."""
        self.network.run(self.target.drain())

    def drafters(self, peers: list[Endpoint]) -> None:
        """Who is there now: new ones are attached, also to sessions under way; those not named are let go, their share is taken back."""
        with self.lock:
            wanted = {peer.name: peer for peer in peers}
            changed = [
                name for name in self.target.drafters if wanted.get(name) != self.peers.get(name)
            ]
            # A link that is kept remembers what it has been through: one that broke the protocol too often stays shut for a while.
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
        hello = Hello(self.vocabulary, self.config.model, peer.name, peer.incarnation)
        return GrpcLink(peer.address, hello, tls=self.tls, tokens=self.tokens)

    def schedule(self, config: ScheduleConfig) -> None:
        """Schedule like this from the next step on. A policy that comes back knows what it had learned."""
        if config not in self.schedulers:
            self.schedulers[config] = make_scheduler(config, self.times)
        self.target.schedule(self.schedulers[config])

    def recording(self, on: bool) -> None:
        """Whether it records what it does, from now on. What was recorded before is forgotten."""
        self.target.engine.trace = Trace(TARGET) if on else NO_TRACE

    def trace(self) -> Recording:
        """What was recorded since the last call."""
        return self.target.engine.trace.drain()

    def save_calibrations(self) -> None:
        """Keep what was learned of the drafters for the next life."""
        save_calibrations(
            calibration_file(self.config.model, "target"), self.target.engine.requests.calibrations
        )

    def attached(self) -> list[str]:
        """Names of the drafters whose links are up."""
        return list(self.target.drafters)

    def stop(self) -> None:
        """Ends sessions, links and server; the process may go then."""
        self.network.run(stop_serving(self.target, self.server))
        self.network.stop()


# Outside the class: Ray would take a class with coroutines for an async actor and run all of it on a loop of its own.


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
