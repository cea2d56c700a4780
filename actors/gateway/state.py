"""What all requests of a gateway share."""

import asyncio
import importlib.metadata
import time
from collections.abc import Callable

from actors.controller.fleet_view import Fleet
from actors.gateway.api_keys import ApiKey, ApiKeys
from actors.gateway.concurrency_limiter import ConcurrencyLimiter
from actors.gateway.idempotency import IdempotencyCache
from actors.gateway.metrics import GatewayMetrics
from actors.gateway.streams import GenerationBackend
from actors.openai.errors import ApiError, sanitize
from actors.openai.served_model import ServedModel
from runtime.config import LimitsConfig

PUBLIC_ROUTES = ("/health", "/ready")  # need no key


class Service:
    """`backend` generates; `ready` says whether it takes requests now; `fleet` is what is behind it, None while that is not known.

    Without `keys` everybody may ask.
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
        """Refuses new requests; returns when those under way are over."""
        self.limiter.draining = True
        await self.limiter.wait_idle()

    def authenticate(self, path: str, authorization: str) -> ApiKey | None:
        """Whose request it is. Raises ApiError (401), the same for no key, a wrong one and one that was taken back."""
        if self.keys is None or path in PUBLIC_ROUTES:
            return None
        scheme, _, given = authorization.partition(" ")
        key = self.keys.find(given.strip() if scheme.lower() == "bearer" else "")
        if key is None:
            raise ApiError(
                401, "invalid_api_key", "the API key is not known: send Authorization: Bearer KEY"
            )
        return key

    def check_model(self, name: str, key: ApiKey | None) -> None:
        """Names are compared, never joined to a path. Raises ApiError: 404, 403."""
        if name != self.served.name:
            raise ApiError(
                404,
                "model_not_found",
                f"model {sanitize(name)} is not served: see /v1/models",
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
    """The event loop's time."""
    return asyncio.get_running_loop().time()
