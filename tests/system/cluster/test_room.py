"""What Ray has no room for, as it says itself."""

import time
from dataclasses import replace

import pytest
import ray

from actors.controller import actor_handles, cluster_resources
from actors.controller.reconciler import DrafterSpec, GatewaySpec, Member, Spec
from runtime.config import Placement
from runtime.deployment_builder import build_deployment
from tests.system.cluster.conftest import CPUS
from tests.system.cluster.texts import PATIENCE_S

pytestmark = pytest.mark.cluster
PLAN = build_deployment("target", ("ngram",), 1, "auto", "cpu", local=True)


def drafter(placement: Placement) -> DrafterSpec:
    return DrafterSpec(
        PLAN.pools[0].member(0).model_copy(update={"placement": placement}), "target", None
    )


TOO_MANY = drafter(Placement(num_cpus=CPUS + 1))
UNKNOWN = drafter(Placement(num_cpus=1 / 3, resources={"tpu": 2}))
ELSEWHERE = GatewaySpec(PLAN, "192.0.2.1")
FITS = drafter(Placement(num_cpus=0.25))


def wanted(spec: Spec) -> dict[str, float]:
    return cluster_resources.demand(cluster_resources.placement_of(spec))


def test_ray_has_no_room_for_what_does_not_fit_and_for_nothing_else(cluster: None) -> None:
    assert wanted(ELSEWHERE) == {"node:192.0.2.1": 0.001}
    assert cluster_resources.autoscaler_bundle(ELSEWHERE) == {}
    began = []
    specs: tuple[Spec, ...] = (TOO_MANY, UNKNOWN, ELSEWHERE, FITS)
    for number, spec in enumerate(specs):
        member = Member(f"room-{number}", "p", number, 0, spec, "starting", 0.0)
        began.append(
            (member, actor_handles.create(member, member.name, detached=False, record=False))
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not all(wanted(spec) in cluster_resources.unmet_demands(()) for spec in specs[:3]):
            assert time.monotonic() < deadline, cluster_resources.unmet_demands(())
            time.sleep(0.1)
        *_, (_, fitting) = began
        ray.get(fitting.placed, timeout=PATIENCE_S)
        assert wanted(FITS) not in cluster_resources.unmet_demands(())
    finally:
        for member, life in began:
            actor_handles.kill(replace(member, lost="the test is over"), life)
