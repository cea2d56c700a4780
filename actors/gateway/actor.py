"""The process of a gateway: HTTP on an event loop of its own thread, requests to the targets by gRPC on the same loop."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import ray

from actors.controller import client
from actors.controller.fleet_view import Fleet, TargetState, targets_of_model
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
from runtime.core.errors import Unavailable

log = logging.getLogger(__name__)

FLEET_POLL_PERIOD_S = 0.5  # seconds between two looks at the fleet
ANSWER_TIMEOUT_S = 2.0  # for the controller: each look is followed by another
STOP_TIMEOUT_S = 15.0  # seconds for the end of everything
SWITCH_INTERVAL_S = (
    0.0005  # seconds; a thread that tokenises a long prompt holds up the streams no longer
)

GetFleet = Callable[[], Fleet]


class Gateway:
    """`get_fleet` says what is there now, and is called on a thread of its own; it raises Unavailable where it cannot tell."""

    def __init__(self, plan: Deployment, get_fleet: GetFleet) -> None:
        self.plan, self.get_fleet = plan, get_fleet
        self.fleet: Fleet | None = None
        self._stopping = threading.Event()

    def start(self) -> str:
        """Opens the server; returns its URL. Raises InvalidRequest, ModelRefused, Unavailable."""
        config = self.plan.gateway
        check_exposure(config)
        keys = None if config.api_keys is None else ApiKeys(config.api_keys)
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
        self.server = build_server(build_app(self.service), config)
        socket = listen(config.host, config.port)
        port = socket.getsockname()[1]
        self.network = LoopThread("gateway")
        self.serving: Future[None] = self.network.submit(self.server.serve(sockets=[socket]))
        self.watcher = threading.Thread(target=self._watch, name="fleet", daemon=True)
        self.watcher.start()
        host = own_host() if config.host in ("0.0.0.0", "::") else config.host
        self.url = f"{'http' if config.tls is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"
        return self.url

    def drain(self) -> None:
        """Refuses new requests; returns when those under way are over."""
        self.network.run(self.service.drain())

    def stop(self) -> None:
        """Ends the server; what is under way then has seconds to end."""
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
                self.fleet = self.get_fleet()
            except Unavailable as error:
                log.warning("the fleet is as it was: %s", error)
            else:
                # While a deployment changes there may be targets of another model, too.
                self.network.run(
                    update_router(
                        self.router, targets_of_model(self.fleet.targets, self.plan.target.model)
                    )
                )
            self._stopping.wait(FLEET_POLL_PERIOD_S)


async def update_router(router: Router, targets: Sequence[TargetState]) -> None:
    router.update(targets)


class GatewayActor(Gateway):
    """A Ray actor. It asks the controller of its cluster who is there."""

    def __init__(self, plan: Deployment) -> None:
        def get_fleet() -> Fleet:
            found = client.ask_controller("fleet", timeout_s=ANSWER_TIMEOUT_S)
            if not isinstance(found, Fleet):
                raise Unavailable(
                    "the controller does not say who is there: install the same version on all nodes"
                )
            return found

        super().__init__(plan, get_fleet)

    def where(self) -> ActorLocation:
        """A sign of life, with the server's URL."""
        return ActorLocation(self.url, os.getpid(), ray.get_runtime_context().get_node_id())
