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
from actors.gateway.api_keys import Keys
from actors.gateway.app import build
from actors.gateway.served_model import serve
from actors.gateway.server import check_closed, listen, server
from actors.gateway.state import Service
from actors.routing.router import Router
from actors.rpc.client import GrpcTarget
from actors.rpc.endpoints import ActorLocation, own_host
from actors.rpc.loop_thread import LoopThread
from runtime.config import Deployment
from runtime.core.errors import Unavailable

log = logging.getLogger(__name__)

PERIOD = 0.5  # seconds between two looks at the fleet
ANSWER_TIMEOUT_S = 2.0  # for the controller: each look is followed by another
STOP = 15.0  # seconds for the end of everything
SWITCH_INTERVAL = (
    0.0005  # seconds; a thread that tokenises a long prompt holds up the streams no longer
)

Look = Callable[[], Fleet]


class Gateway:
    """`look` says what is there now, and is called on a thread of its own; it raises Unavailable where it cannot tell."""

    def __init__(self, plan: Deployment, look: Look) -> None:
        self.plan, self.look = plan, look
        self.fleet: Fleet | None = None
        self._stopping = threading.Event()

    def start(self) -> str:
        """Opens the server; returns its URL. Raises InvalidRequest, ModelRefused, Unavailable."""
        config = self.plan.gateway
        check_closed(config)
        keys = None if config.api_keys is None else Keys(config.api_keys)
        served = serve(self.plan, int(time.time()))
        sys.setswitchinterval(SWITCH_INTERVAL)
        self.router = Router(lambda address: GrpcTarget(address, self.plan.security.tls))
        self.service = Service(
            served,
            self.router,
            self.plan.limits,
            keys,
            lambda: self.router.ready,
            lambda: self.fleet,
        )
        self.server = server(build(self.service), config)
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
            self.serving.result(STOP)
        self.network.run(self.router.close(), STOP)
        self.network.stop()

    def _watch(self) -> None:
        while not self._stopping.is_set():
            try:
                self.fleet = self.look()
            except Unavailable as error:
                log.warning("the fleet is as it was: %s", error)
            else:
                # While a deployment changes there may be targets of another model, too.
                self.network.run(
                    told(self.router, targets_of_model(self.fleet.targets, self.plan.target.model))
                )
            self._stopping.wait(PERIOD)


async def told(router: Router, targets: Sequence[TargetState]) -> None:
    router.update(targets)


class GatewayActor(Gateway):
    """A Ray actor. It asks the controller of its cluster who is there."""

    def __init__(self, plan: Deployment) -> None:
        def look() -> Fleet:
            found = client.ask_controller("fleet", timeout_s=ANSWER_TIMEOUT_S)
            if not isinstance(found, Fleet):
                raise Unavailable(
                    "the controller does not say who is there: install the same version on all nodes"
                )
            return found

        super().__init__(plan, look)

    def where(self) -> ActorLocation:
        """A sign of life, with the server's URL."""
        return ActorLocation(self.url, os.getpid(), ray.get_runtime_context().get_node_id())
