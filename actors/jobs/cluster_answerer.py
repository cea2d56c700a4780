"""Answers items with the deployment of the Ray cluster that this process has joined.

The process routes requests to targets as a gateway does, and keeps their journal.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from actors.fleet import client
from actors.fleet.fleet_state import Fleet, TargetState, targets_of_model
from actors.fleet.ray_session import translate_ray_errors
from actors.gateway.streams import GenerationBackend, merge_chunks
from actors.jobs.items import Answer, Item
from actors.openai import protocol, request_adapter, response_builder
from actors.openai.echo import Echo, build_echoes
from actors.openai.errors import ApiError, to_api_error
from actors.openai.request_adapter import DEFAULT_LIMITS
from actors.openai.served_model import ServedModel, load_served_model
from actors.routing.router import Router, updated_router
from actors.rpc.client import GrpcTarget
from runtime.config import Deployment, LimitsConfig
from runtime.core.errors import InvalidRequest, TargetsLost, Unavailable
from runtime.core.messages import Request

UNAVAILABLE_STATUS = 503  # a target drains or was lost for good


class ClusterAnswerer:
    """Answers items with `targets`, which serve `served`. Created by `open_deployment`."""

    def __init__(
        self,
        targets: GenerationBackend,
        served: ServedModel,
        now: Callable[[], float] = time.time,
        limits: LimitsConfig = DEFAULT_LIMITS,
    ) -> None:
        self._targets, self._served, self._now, self._limits = targets, served, now, limits

    async def answer(self, item: Item) -> Answer:
        """Answers an item as `Answerer` specifies."""
        name = uuid.uuid4().hex
        try:
            return Answer(200, await self._answered(item, name), name)
        except (InvalidRequest, TargetsLost) as error:
            found = to_api_error(error)
            if found.status == UNAVAILABLE_STATUS:
                raise Unavailable(str(error)) from error
            return Answer(found.status, found.body(), name)

    async def _answered(self, item: Item, name: str) -> dict[str, Any]:
        body, asked, echoes = await asyncio.to_thread(self._translated, item, name)
        answer = response_builder.ResponseBuilder(
            body, self._served, asked, name, int(self._now()), echoes
        )
        async with aclosing(merge_chunks(self._targets, asked)) as chunks:
            async for index, chunk in chunks:
                answer.add(index, chunk)
        return answer.response()

    def _translated(
        self, item: Item, name: str
    ) -> tuple[protocol.AnyBody, list[Request], list[Echo]]:
        body, _ = protocol.parse_body(item.url, item.body)
        if body.model != self._served.name:
            raise ApiError(
                404,
                "model_not_found",
                f"unknown model: ask for {self._served.name}",
                "model",
            )
        asked = request_adapter.build_requests(
            body, self._served, name, item.body["seed"], body.timeout, self._limits
        )
        return body, asked, build_echoes(body, self._served, asked)


@asynccontextmanager
async def open_deployment() -> AsyncIterator[ClusterAnswerer]:
    """Yields an answerer for the deployment of the cluster that this process has joined.

    Raises Unavailable if nothing is served there, and ModelRefused if this machine lacks the
    model's tokenizer.
    """
    with translate_ray_errors():
        if await asyncio.to_thread(client.find_controller) is None:
            raise Unavailable(f"{client.NOT_SERVED}, or give --url or --address")
    plan: Deployment = await asyncio.to_thread(client.ask_controller, "wanted")
    served = await asyncio.to_thread(load_served_model, plan, int(time.time()))
    router = Router(lambda address: GrpcTarget(address, plan.security.tls))
    async with updated_router(router, lambda: poll_targets(plan.target.model)):
        yield ClusterAnswerer(router, served, limits=plan.limits)


def poll_targets(model: str) -> list[TargetState]:
    """Returns the targets of the model. Raises Unavailable while the controller does not answer."""
    fleet: Fleet = client.ask_controller("fleet")
    return targets_of_model(fleet.targets, model)
