"""Members of a fleet, as the tests of the controller make them."""

from dataclasses import replace
from typing import Any

from actors.controller.reconciler import Member, first_counts, spec_of
from actors.fleet.fleet_state import State
from actors.rpc.endpoints import ActorLocation
from runtime.config import Deployment

NOW = 1000.0
TWO: dict[str, Any] = {"name": "small", "model": "s", "count": 2}
PLAN = Deployment.model_validate(
    {
        "target": {"model": "big", "replicas": 2},
        "pools": [TWO, {"name": "lookup", "method": "ngram"}],
    }
)
OTHER = Deployment.model_validate(
    {"target": {"model": "big", "replicas": 2}, "pools": [TWO | {"model": "better"}]}
)
COUNTS = first_counts(PLAN, gateways=False)


def member(
    role: str, index: int, state: State = "ready", plan: Deployment = PLAN, **others: Any
) -> Member:
    spec = spec_of(plan, role, index)
    assert spec is not None
    place = None if state == "starting" else ActorLocation(f"10.0.0.1:{index}", 7, "node")
    return replace(
        Member(
            f"{role}-{index}", role, index, 0, spec, state, NOW - 1, place, placed=place is not None
        ),
        **others,
    )
