"""The process of a gateway: HTTP and gRPC on one event loop, which runs on its own thread."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import ray

from actors.fleet import client
from actors.fleet.fleet_state import Fleet, TargetState, targets_of_model
from actors.gateway.api_keys import ApiKeys
from actors.gateway.app import build_app
from actors.gateway.server import build_server, check_exposure, listen
from actors.gateway.state import Service
from actors.openai.served_model import load_served_model
from actors.routing.router import Router
from actors.rpc.client import GrpcTarget
from actors.rpc.endpoints import ActorLocation, own_host
from actors.rpc.loop_thread import LoopThread
from runtime.config import Deployment
from runtime.core.errors import Unavailable, naming

log = logging.getLogger(__name__)

FLEET_POLL_PERIOD_S = 0.5
ANSWER_TIMEOUT_S = 2.0  # for the controller, which is asked again soon
STOP_TIMEOUT_S = 15.0
SWITCH_INTERVAL_S = 0.0005  # a thread that tokenises a long prompt delays streams no longer

GetFleet = Callable[[], Fleet]


class Gateway:
    """Serves HTTP.

    `get_fleet` returns the current fleet and is called on another thread; it raises Unavailable if
    the fleet is unknown. After any error it is asked again.
    """

    def __init__(self, plan: Deployment, get_fleet: GetFleet) -> None:
        self.plan, self.get_fleet = plan, get_fleet
        self.fleet: Fleet | None = None
        self._stopping = threading.Event()

    def start(self) -> str:
        """Opens the server; returns its URL. Raises InvalidRequest, ModelRefused, Unavailable."""
        config = self.plan.gateway
        check_exposure(config)
        keys = None if config.api_keys is None else ApiKeys(config.api_keys)
        with naming(self.plan.target.model):
            served = load_served_model(self.plan, int(time.time()))
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self.router = Router(lambda address: GrpcTarget(address, self.plan.security.tls))
        self.service = Service(
            served,
            self.router,
            self.plan.limits,
            keys,
            lambda: self.router.ready,
            lambda: self.fleet,
        )
        self.server = build_server(build_app(self.service, config.cors_origins), config)
        socket = listen(config.host, config.port)
        port = socket.getsockname()[1]
        self.network = LoopThread("gateway")
        self.serving: Future[None] = self.network.submit(self.server.serve(sockets=[socket]))
        self.watcher = threading.Thread(target=self._watch, name="fleet", daemon=True)
        self.watcher.start()
        host = own_host() if config.host in ("0.0.0.0", "::") else config.host
        scheme = "http" if config.tls is None else "https"
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        return self.url

    def drain(self) -> None:
        """Refuses new requests; returns once the running ones have ended."""
        self.network.run(self.service.drain())

    def stop(self) -> None:
        """Ends the server, after a grace period for running requests."""
        self._stopping.set()
        self.watcher.join()
        self.server.should_exit = True
        with contextlib.suppress(TimeoutError):
            self.serving.result(STOP_TIMEOUT_S)
        self.network.run(self.router.close(), STOP_TIMEOUT_S)
        self.network.stop()

    def _watch(self) -> None:
        while not self._stopping.is_set():
            try:
                self._update()
            except Unavailable as error:
                log.warning("the fleet cannot be updated: %s", error)
            except Exception as error:
                # Asked again: the view must not freeze for good.
                log.error("the fleet cannot be updated: %s", type(error).__name__, exc_info=error)
            self._stopping.wait(FLEET_POLL_PERIOD_S)

    def _update(self) -> None:
        self.fleet = self.get_fleet()
        # While a deployment changes, the fleet may have targets of another model too.
        targets = targets_of_model(self.fleet.targets, self.plan.target.model)
        self.network.run(update_router(self.router, targets))


async def update_router(router: Router, targets: Sequence[TargetState]) -> None:
    router.update(targets)


class GatewayActor(Gateway):
    """A gateway as a Ray actor. It asks its cluster's controller for the fleet."""

    def __init__(self, plan: Deployment) -> None:
        def get_fleet() -> Fleet:
            found = client.ask_controller("fleet", timeout_s=ANSWER_TIMEOUT_S)
            if not isinstance(found, Fleet):
                raise Unavailable(
                    "the controller does not say who is there:"
                    " install the same version on all nodes"
                )
            return found

        super().__init__(plan, get_fleet)

    def where(self) -> ActorLocation:
        """Returns the server's URL as a location. The controller uses the call as a health
        check.
        """
        return ActorLocation(self.url, os.getpid(), ray.get_runtime_context().get_node_id())
