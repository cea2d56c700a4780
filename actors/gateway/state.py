"""The state that all requests of a gateway share."""

import asyncio
import importlib.metadata
import time
from collections.abc import Callable

from actors.fleet.fleet_state import Fleet
from actors.gateway.api_keys import ApiKey, ApiKeys
from actors.gateway.concurrency_limiter import ConcurrencyLimiter
from actors.gateway.idempotency import IdempotencyCache
from actors.gateway.metrics import GatewayMetrics
from actors.gateway.streams import GenerationBackend
from actors.openai.errors import ApiError, sanitize
from actors.openai.served_model import ServedModel
from runtime.config import LimitsConfig

PUBLIC_ROUTES = ("/health", "/ready")  # accessible without an API key


class Service:
    """The shared state.

    backend  generates the output
    keys     API keys; with None, anyone may send requests
    ready    returns whether the backend accepts requests
    fleet    returns the fleet behind the gateway, None while it is unknown
    """

    def __init__(
        self,
        served: ServedModel,
        backend: GenerationBackend,
        limits: LimitsConfig,
        keys: ApiKeys | None = None,
        ready: Callable[[], bool] = lambda: True,
        fleet: Callable[[], Fleet | None] = lambda: None,
    ) -> None:
        self.served, self.backend, self.limits, self.keys, self.fleet = (
            served,
            backend,
            limits,
            keys,
            fleet,
        )
        self.version = importlib.metadata.version("outrider")
        self.limiter = ConcurrencyLimiter(limits)
        self.metrics = GatewayMetrics(served.name, self.limiter, fleet)
        self.idempotency = IdempotencyCache(time.monotonic, self.metrics.replayed.inc)
        self._ready = ready

    @property
    def ready(self) -> bool:
        return self._ready() and not self.limiter.draining

    async def drain(self) -> None:
        """Refuses new requests; returns once the running ones have ended."""
        self.limiter.draining = True
        await self.limiter.wait_idle()

    def authenticate(self, path: str, authorization: str) -> ApiKey | None:
        """Returns the API key of a request. Raises ApiError (401), the same for a missing and a
        wrong key.
        """
        if self.keys is None or path in PUBLIC_ROUTES:
            return None
        scheme, _, given = authorization.partition(" ")
        key = self.keys.find(given.strip() if scheme.lower() == "bearer" else "")
        if key is None:
            raise ApiError(
                401, "invalid_api_key", "the API key is invalid: send Authorization: Bearer KEY"
            )
        return key

    def check_model(self, name: str, key: ApiKey | None) -> None:
        """Raises ApiError (404, 403) if the key may not use the model, or it is not served.

        Names are compared, and never become part of a path.
        """
        if name != self.served.name:
            raise ApiError(
                404,
                "model_not_found",
                f"unknown model {sanitize(name)}: see /v1/models",
                "model",
            )
        if key is not None and key.models is not None and name not in key.models:
            raise ApiError(
                403,
                "model_not_allowed",
                f"this key may not ask for model {sanitize(name)}",
                "model",
            )


def now() -> float:
    """Returns the event loop's time."""
    return asyncio.get_running_loop().time()
