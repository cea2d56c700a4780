"""The process that hosts a drafter: its model runs on one thread, its gRPC server on another."""

import threading

import grpc

from actors.calibration_store import save_calibrations
from actors.cpu_affinity import import_at_low_priority, pin
from actors.rpc.endpoints import ActorLocation, own_host, own_location
from actors.rpc.loop_thread import LoopThread
from actors.rpc.server import DraftingService, serve
from protos.handshake import Hello
from runtime.config import TRAINED_METHODS, DrafterConfig, TlsConfig
from runtime.core.errors import Unavailable, naming
from runtime.draft.draft_host import DraftHost
from runtime.model_paths import drafter_calibration_file
from runtime.models.vocab_check import vocabulary_hash, vocabulary_size
from runtime.telemetry.reports import DrafterReport
from runtime.telemetry.tracing import NO_TRACE, Recording, Trace


class DraftActor:
    """Hosts a drafter, as a Ray actor or as a plain object.

    Targets connect to it; it knows none of them.
    """

    def __init__(
        self,
        config: DrafterConfig,
        target: str,
        incarnation: int = 0,
        record: bool = False,
        tls: TlsConfig | None = None,
    ) -> None:
        self.config, self.target, self.incarnation, self.record, self.tls = (
            config,
            target,
            incarnation,
            record,
            tls,
        )
        self.address = ""
        self.lock = threading.Lock()  # Ray calls from several threads

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
            build_drafter,
            freeze_gc,
        )  # loads torch, which only this process needs
        from runtime.models.loader import load_tokenizer

        config = self.config
        with naming(config.model or self.target):
            self.host = build_drafter(config, self.target, self.record)
        own = (
            config.model if config.method not in TRAINED_METHODS else ""
        )  # a drafter trained for the target uses the target's tokenizer
        tokenizer = load_tokenizer(own or self.target)
        freeze_gc()
        self.network = LoopThread()
        host = config.placement.listen or own_host()
        hello = Hello(
            vocabulary_hash(tokenizer),
            config.model or config.method,
            config.name,
            self.incarnation,
            tokens=vocabulary_size(tokenizer),
        )
        self.host.start()
        self.server, port = self.network.run(
            serve([DraftingService(self.host, hello)], host, tls=self.tls)
        )
        self.address = f"{host}:{port}"

    def where(self) -> ActorLocation:
        return own_location(self.address)

    def report(self) -> DrafterReport:
        """Returns the drafter's metrics. The controller uses the call as a health check too.

        Raises Unavailable if the drafting thread has ended.
        """
        if not self.host.alive:
            raise Unavailable("the drafter's thread has ended: see its log")
        return self.host.draft_engine.report()

    def recording(self, on: bool) -> None:
        """Starts or stops recording a trace; drops what was recorded before."""
        self.host.draft_engine.trace = Trace(self.config.name) if on else NO_TRACE

    def trace(self) -> Recording:
        """Returns what was recorded since the last call."""
        return self.host.draft_engine.trace.drain()

    def save_calibrations(self) -> None:
        """Saves what was learned about this target for the next process."""
        save_calibrations(
            drafter_calibration_file(self.config, self.target), self.host.draft_engine.calibrations
        )

    def stop(self) -> None:
        """Ends all streams and the server."""
        self.network.run(stop_serving(self.host, self.server))
        self.network.stop()


async def stop_serving(host: DraftHost, server: grpc.aio.Server) -> None:
    await server.stop(0.2)
    await host.stop()
