"""Ray's side of a member: the actor it is, and the answers that are awaited of it. Nothing here waits for anybody."""

import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import ray
from ray.core.generated.autoscaler_pb2 import GetClusterResourceStateReply
from ray.exceptions import RayError, RayTaskError
from ray.experimental.internal_kv import internal_kv_get_gcs_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.draft import DraftActor
from actors.peers import Peer, Place
from actors.ray_edge import cause_of, first_line
from actors.roster import DEAF, FORBEARANCE, PATIENCE, DrafterSpec, GatewaySpec, Member, Spec, TargetSpec, bereft, mute
from actors.target import TargetActor
from runtime.config import Placement
from runtime.errors import OutriderError, Unavailable
from runtime.reports import DrafterReport, TargetReport

START = 600.0  # seconds that one may take to load its model once its process is there
HASTE = 0.5  # seconds for an answer of Ray's head
NODE = "node:"  # before an address: Ray's name for what only that node has
DIGITS = 4  # that Ray keeps of an amount
CALLS = 8  # of an actor at one time: signs of life come through while others wait
KINDS = {TargetSpec: "TargetActor", DrafterSpec: "DraftActor", GatewaySpec: "GatewayActor"}  # names of actors, as their processes show them


@dataclass(slots=True)
class Life:
    """`asked`: when `reporting` was; `heard`: when the last question was asked that it has answered.

    told  the drafters that a target has been told of, once `telling` is answered;  knows: those that it has taken in
    """

    handle: Any  # Ray's, untyped, as are the answers; None for one that is gone
    starting: Any = None
    placed: Any = None
    reporting: Any = None
    draining: Any = None
    telling: Any = None
    asked: float = 0.0
    heard: float = 0.0
    report: TargetReport | DrafterReport | None = None
    told: tuple[Peer, ...] = ()
    knows: tuple[Peer, ...] | None = None
    failure: OutriderError | None = None  # of its start


def create(member: Member, name: str, detached: bool, record: bool) -> Life:
    """Asks Ray for the actor and tells it to start; it may wait for room. `name` is the actor's, once in the cluster."""
    match member.spec:
        case TargetSpec(config, tls):
            handle = options(TargetActor, name, config.placement, detached).remote(config, record, tls)
        case DrafterSpec(config, target, tls):
            handle = options(DraftActor, name, config.placement, detached).remote(config, target, member.incarnation, record, tls)
        case GatewaySpec(plan):
            from actors.gateway.actor import GatewayActor

            handle = options(GatewayActor, name, placement_of(member.spec), detached).remote(plan)
    return Life(handle, starting=handle.start.remote(), placed=handle.__ray_ready__.remote())


def adopt(member: Member, name: str, now: float) -> tuple[Member, Life]:
    """An actor that was there before this controller. The member is lost where it is gone, or Ray does not find it."""
    try:
        handle = ray.get_actor(name)
    except (ValueError, RayError) as error:
        found = "it ended while the controller was away" if isinstance(error, ValueError) else f"Ray does not find it: {first_line(error)}"
        return replace(member, lost=member.lost or found), Life(handle=None)
    life = Life(handle)
    if member.place is None:
        life.starting, life.placed = handle.start.remote(), handle.__ray_ready__.remote()
    else:
        ask(member, life, now)
    if member.state == "draining" and not isinstance(member.spec, DrafterSpec):
        life.draining = handle.drain.remote()
    return member, life


def ask(member: Member, life: Life, now: float) -> None:
    sign = life.handle.where if isinstance(member.spec, GatewaySpec) else life.handle.report
    life.reporting, life.asked = sign.remote(), now


def listen(member: Member, life: Life, ear: float, now: float) -> Member:
    """The member as its answers show it. One that has failed or is mute is lost from now on. `ear`: see `roster.mute`."""
    if member.lost:
        return member
    try:
        return started(member, life, now) if member.place is None else heard(member, life, ear, now)
    except RayError as error:
        return bereft(member, first_line(error), now)


def started(member: Member, life: Life, now: float) -> Member:
    if not member.placed and answered(life.placed):
        ray.get(life.placed)
        member = replace(member, placed=True, since=now)
    if answered(life.starting):
        try:
            place = ray.get(life.starting)
        except RayError as error:
            life.failure = cause_of(error) if isinstance(error, RayTaskError) else None
            why = type(life.failure).__name__ if life.failure else first_line(error)
            return bereft(member, f"it does not start: {why}", now)
        if isinstance(place, str):  # a gateway's URL
            life.starting = life.handle.where.remote()
            return member
        if not isinstance(place, Place):
            life.failure = Unavailable(f"{member.name} answered {place!r} and not its place: install the same version on all nodes")
            return bereft(member, "it is of another version", now)
        ask(member, life, now)
        return replace(member, state="ready", place=place, placed=True, since=now)
    if member.placed and now - member.since > START:
        return bereft(member, f"it did not start within {START:g} s", now)
    return member


def heard(member: Member, life: Life, ear: float, now: float) -> Member:
    if answered(life.reporting):
        answer = ray.get(life.reporting)
        life.report, life.heard = None if isinstance(answer, Place) else answer, life.asked
        ask(member, life, now)
        member = replace(member, sessions=sessions(life.report))
    elif mute(life.asked, ear, now, FORBEARANCE if isinstance(member.spec, GatewaySpec) else PATIENCE if life.heard else DEAF):
        return bereft(member, f"no answer for {now - life.asked:.1f} s", now)
    if life.draining is not None and answered(life.draining):
        ray.get(life.draining)
        return replace(member, drained=True)
    return member


def sessions(report: TargetReport | DrafterReport | None) -> int:
    match report:
        case TargetReport():
            return report.live + report.waiting
        case DrafterReport():
            return report.sessions
        case None:
            return 0


def tell(life: Life, peers: Sequence[Peer]) -> None:
    """Tell a target who its drafters are, once it has taken in what it was told before: telling it twice changes nothing, and
    brings back a link that was lost."""
    if life.telling is not None:
        if not answered(life.telling):
            return
        with contextlib.suppress(RayError):  # whether it lives, its reports show
            ray.get(life.telling)
            life.knows = life.told
    life.told = tuple(peers)
    life.telling = life.handle.drafters.remote(list(peers))


def kill(member: Member, life: Life) -> None:
    """Ends the actor, and its process where that does not hear Ray: stopped, it would hold its device until it is gone."""
    if life.handle is not None:
        with contextlib.suppress(RayError):
            ray.kill(life.handle)
    if not (member.lost and member.place is not None and (node := member.place.node)):
        return
    pid, kind = member.place.pid, KINDS[type(member.spec)]
    if node == ray.get_runtime_context().get_node_id():  # without a worker, which would start beside those that go on for it
        Thread(target=end_process, args=(pid, kind), daemon=True).start()  # /proc waits for a process that is stuck in the kernel
        return
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.remote(end_process).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(pid, kind)


def end_process(pid: int, kind: str) -> None:
    """SIGKILL to an actor's process on this node, if it is still one."""
    with contextlib.suppress(OSError):
        if kind.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


def leaving_nodes(before: frozenset[str]) -> frozenset[str]:
    """Nodes that Ray was told to let go, by its names for them; as before where it does not answer at once."""
    ray_says: Any = internal_kv_get_gcs_client
    try:
        return frozenset(ray_says().get_draining_nodes(timeout=HASTE))
    except RayError:
        return before


def unmet_demands(before: tuple[dict[str, float], ...]) -> tuple[dict[str, float], ...]:
    """What actors of the cluster want and Ray has no room for; as before where it does not answer at once."""
    ray_says: Any = internal_kv_get_gcs_client
    try:
        data = ray_says().get_cluster_resource_state(timeout_s=HASTE)
    except RayError:
        return before
    state = GetClusterResourceStateReply.FromString(data).cluster_resource_state
    return tuple(dict(demand.request.resources_bundle) for demand in state.pending_resource_requests)


def answered(answer: Any) -> bool:
    return bool(ray.wait([answer], timeout=0)[0])


def options(actor: type, name: str, placement: Placement, detached: bool = False) -> Any:
    """The Ray actor class with its name and what it takes from the cluster. A detached one outlives whoever started it."""
    wanted = demand(placement)
    return ray.remote(actor).options(
        name=name,
        num_cpus=wanted.pop("CPU", 0),
        num_gpus=wanted.pop("GPU", 0),
        resources=wanted,
        max_restarts=0,
        max_concurrency=CALLS,
        lifetime="detached" if detached else None,
    )


def bundle(spec: Spec) -> dict[str, float]:
    """What a member takes, as Ray's autoscaler wants it. A given node cannot be asked for: it is there or it is not."""
    return {name: amount for name, amount in demand(placement_of(spec)).items() if not name.startswith(NODE)}


def placement_of(spec: Spec) -> Placement:
    return Placement(num_cpus=0, node=spec.node) if isinstance(spec, GatewaySpec) else spec.config.placement


def demand(placement: Placement) -> dict[str, float]:
    """What it takes from the cluster, as Ray counts it."""
    given = {f"{NODE}{placement.node}": 0.001} if placement.node else {}
    found = {"CPU": placement.num_cpus, "GPU": placement.num_gpus} | placement.resources | given
    return {name: round(amount, DIGITS) for name, amount in found.items() if amount}
