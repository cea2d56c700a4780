"""Computes the resources that members take, and asks Ray which are missing or leaving."""

import logging
from collections.abc import Sequence
from typing import Any

from ray.autoscaler.sdk import request_resources
from ray.core.generated.autoscaler_pb2 import GetClusterResourceStateReply
from ray.exceptions import RayError
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from actors.controller.reconciler import GatewaySpec, Member, Spec, waits_for_room
from runtime.config import Placement

log = logging.getLogger(__name__)

GCS_TIMEOUT_S = 0.5  # for an answer of Ray's head node node node node
NODE_PREFIX = "node:"  # prefix of the resource that only the node with that address has
DIGITS = 4  # precision of Ray's amounts

Bundle = dict[str, float]  # amounts by resource


class ClusterResources:
    """Requests resources from Ray's autoscaler, and remembers Ray's latest answers.

    leaving    IDs of nodes that are being drained
    unmet      bundles that actors want and Ray cannot place
    requested  bundles requested from the autoscaler
    """

    def __init__(self) -> None:
        self.leaving: frozenset[str] = frozenset()
        self.unmet: tuple[Bundle, ...] = ()
        self.requested: list[Bundle] = []

    def refresh(self, late: bool) -> None:
        """Asks Ray which nodes leave and, if a member is `late`, which bundles it cannot place."""
        self.leaving = leaving_nodes(self.leaving)
        self.unmet = unmet_demands(self.unmet) if late else ()

    def leaves(self, member: Member) -> bool:
        return member.place is not None and member.place.node in self.leaving

    def is_unschedulable(self, member: Member) -> bool:
        return not member.placed and demand(placement_of(member.spec)) in self.unmet

    def request(self, bundles: list[Bundle]) -> None:
        """Requests a cluster that holds all these bundles; none withdraw the request."""
        if bundles != self.requested:
            log.info("requesting resources for %d members from the cluster", len(bundles))
            request_resources(bundles=bundles)
            self.requested = bundles


def leaving_nodes(before: frozenset[str]) -> frozenset[str]:
    """Returns the nodes that are being drained; `before` if Ray does not answer at once."""
    ray_says: Any = internal_kv_get_gcs_client
    try:
        return frozenset(ray_says().get_draining_nodes(timeout=GCS_TIMEOUT_S))
    except RayError:
        return before


def unmet_demands(before: tuple[Bundle, ...]) -> tuple[Bundle, ...]:
    """Returns bundles that Ray cannot place; `before` if Ray does not answer at once."""
    ray_says: Any = internal_kv_get_gcs_client
    try:
        data = ray_says().get_cluster_resource_state(timeout_s=GCS_TIMEOUT_S)
    except RayError:
        return before
    state = GetClusterResourceStateReply.FromString(data).cluster_resource_state
    return tuple(
        dict(demand.request.resources_bundle) for demand in state.pending_resource_requests
    )


def missing_room(members: Sequence[Member], now: float) -> list[Bundle]:
    """Returns the bundles of all members if one of them waits for resources, else nothing."""
    if not any(waits_for_room(member, now) for member in members):
        return []
    return [found for member in members if (found := autoscaler_bundle(member.spec))]


def autoscaler_bundle(spec: Spec) -> Bundle:
    """Returns what a member takes, as Ray's autoscaler wants it.

    It omits a fixed node, which the autoscaler cannot provide.
    """
    wanted = demand(placement_of(spec))
    return {name: amount for name, amount in wanted.items() if not name.startswith(NODE_PREFIX)}


def placement_of(spec: Spec) -> Placement:
    if isinstance(spec, GatewaySpec):
        return Placement(num_cpus=0, node=spec.node)
    return spec.config.placement


def demand(placement: Placement) -> Bundle:
    """Returns the resources of a placement, as Ray counts them."""
    given = {f"{NODE_PREFIX}{placement.node}": 0.001} if placement.node else {}
    found = {"CPU": placement.num_cpus, "GPU": placement.num_gpus} | placement.resources | given
    return {name: round(amount, DIGITS) for name, amount in found.items() if amount}
