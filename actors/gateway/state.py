"""What all requests of a gateway share."""

import asyncio
import importlib.metadata
import time
from collections.abc import Callable

from actors.controller.fleet_view import Fleet
from actors.gateway.api_keys import Key, Keys
from actors.gateway.concurrency_limiter import Ledger
from actors.gateway.idempotency import Replays
from actors.gateway.metrics import Meter
from actors.gateway.served_model import Served
from actors.gateway.streams import Generator
from actors.openai.errors import Refused, plain
from runtime.config import LimitsConfig

OPEN = ("/health", "/ready")  # need no key


class Service:
    """`body` generates; `ready` says whether it takes requests now; `fleet` is what is behind it, None while that is not known.

    Without `keys` everybody may ask.
    """

    def __init__(
        self,
        served: Served,
        body: Generator,
        limits: LimitsConfig,
        keys: Keys | None = None,
        ready: Callable[[], bool] = lambda: True,
        fleet: Callable[[], Fleet | None] = lambda: None,
    ) -> None:
        self.served, self.body, self.limits, self.keys, self.fleet = (
            served,
            body,
            limits,
            keys,
            fleet,
        )
        self.version = importlib.metadata.version("outrider")
        self.ledger = Ledger(limits)
        self.meter = Meter(served.name, self.ledger, fleet)
        self.replays = Replays(time.monotonic, self.meter.replayed.inc)
        self._ready = ready

    @property
    def ready(self) -> bool:
        return self._ready() and not self.ledger.draining

    async def drain(self) -> None:
        """Refuses new requests; returns when those under way are over."""
        self.ledger.draining = True
        await self.ledger.empty()

    def caller(self, path: str, authorization: str) -> Key | None:
        """Whose request it is. Raises Refused (401), the same for no key, a wrong one and one that was taken back."""
        if self.keys is None or path in OPEN:
            return None
        scheme, _, given = authorization.partition(" ")
        key = self.keys.find(given.strip() if scheme.lower() == "bearer" else "")
        if key is None:
            raise Refused(
                401, "invalid_api_key", "the API key is not known: send Authorization: Bearer KEY"
            )
        return key

    def check_model(self, name: str, key: Key | None) -> None:
        """Names are compared, never joined to a path. Raises Refused: 404, 403."""
        if name != self.served.name:
            raise Refused(
                404,
                "model_not_found",
                f"model {plain(name)} is not served: see /v1/models",
                "model",
            )
        if key is not None and key.models is not None and name not in key.models:
            raise Refused(
                403, "model_not_allowed", f"this key may not ask for model {plain(name)}", "model"
            )


def now() -> float:
    """The event loop's time."""
    return asyncio.get_running_loop().time()
