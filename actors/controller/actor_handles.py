"""Controls the Ray actor of a member, and tracks the answers that it owes. Nothing here blocks."""

import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.controller.cluster_resources import demand, placement_of
from actors.controller.reconciler import (
    ANSWER_TIMEOUT_S,
    GATEWAY_TIMEOUT_S,
    SILENCE_TIMEOUT_S,
    DrafterSpec,
    GatewaySpec,
    Member,
    TargetSpec,
    mark_lost,
    timed_out,
)
from actors.drafter import DraftActor
from actors.fleet.ray_session import cause_of, first_line
from actors.rpc.endpoints import ActorLocation, Endpoint
from actors.target import TargetActor
from runtime.config import Placement
from runtime.core.errors import OutriderError, Unavailable
from runtime.telemetry.reports import DrafterReport, TargetReport

START_TIMEOUT_S = 600.0  # for a member to load its model once its process runs
MAX_CONCURRENT_CALLS = 8  # so that reports are answered while other calls wait
# Class names, as they appear in the command lines of the actors' processes.
ACTOR_CLASSES = {TargetSpec: "TargetActor", DrafterSpec: "DraftActor", GatewaySpec: "GatewayActor"}


@dataclass(slots=True)
class ActorHandle:
    """A member's actor. Handles and answers are Ray's and untyped.

    actor         Ray's handle; None for an actor that is gone
    starting, placed, reporting, draining, notifying
                  pending answers
    asked_at      clock at the time of the pending report's request
    heard_at      clock at the time of the latest request that the actor has answered
    notified      drafters that the target knows once `notifying` is answered
    acknowledged  drafters that the target knows
    failure       error that its start raised
    """

    actor: Any
    starting: Any = None
    placed: Any = None
    reporting: Any = None
    draining: Any = None
    notifying: Any = None
    asked_at: float = 0.0
    heard_at: float = 0.0
    report: TargetReport | DrafterReport | None = None
    notified: tuple[Endpoint, ...] = ()
    acknowledged: tuple[Endpoint, ...] | None = None
    failure: OutriderError | None = None


def create(member: Member, name: str, detached: bool, record: bool) -> ActorHandle:
    """Creates the actor and starts it; it may wait for resources.

    `name` is the actor's name, unique in the cluster.
    """
    match member.spec:
        case TargetSpec(config, tls):
            kind = actor_class(TargetActor, name, config.placement, detached)
            actor = kind.remote(config, record, tls)
        case DrafterSpec(config, target, tls):
            kind = actor_class(DraftActor, name, config.placement, detached)
            actor = kind.remote(config, target, member.incarnation, record, tls)
        case GatewaySpec(plan):
            from actors.gateway.actor import GatewayActor

            actor = actor_class(GatewayActor, name, placement_of(member.spec), detached).remote(
                plan
            )
    return ActorHandle(actor, starting=actor.start.remote(), placed=actor.__ray_ready__.remote())


def adopt(member: Member, name: str, now: float) -> tuple[Member, ActorHandle]:
    """Takes over an actor of the controller before this one.

    The member is lost if Ray does not find the actor.
    """
    try:
        actor = ray.get_actor(name)
    except ValueError:
        return adopt_lost(member, "it ended while the controller was away")
    except RayError as error:
        return adopt_lost(member, f"Ray does not find it: {first_line(error)}")
    handle = ActorHandle(actor)
    if member.place is None:
        handle.starting, handle.placed = actor.start.remote(), actor.__ray_ready__.remote()
    else:
        ask(member, handle, now)
    if member.state == "draining" and not isinstance(member.spec, DrafterSpec):
        handle.draining = actor.drain.remote()
    return member, handle


def adopt_lost(member: Member, why: str) -> tuple[Member, ActorHandle]:
    return replace(member, lost=member.lost or why), ActorHandle(actor=None)


def ask(member: Member, handle: ActorHandle, now: float) -> None:
    """Requests the next report, a sign of life."""
    is_gateway = isinstance(member.spec, GatewaySpec)
    sign = handle.actor.where if is_gateway else handle.actor.report
    handle.reporting, handle.asked_at = sign.remote(), now


def poll(member: Member, handle: ActorHandle, last_heard: float, now: float) -> Member:
    """Returns the member as its answers show it; lost if it has failed or timed out.

    `last_heard` is explained at `reconciler.timed_out`.
    """
    if member.lost:
        return member
    try:
        if member.place is None:
            return poll_start(member, handle, now)
        return poll_report(member, handle, last_heard, now)
    except RayError as error:
        return mark_lost(member, first_line(error), now)


def poll_start(member: Member, handle: ActorHandle, now: float) -> Member:
    if not member.placed and is_answered(handle.placed):
        ray.get(handle.placed)
        member = replace(member, placed=True, since=now)
    if is_answered(handle.starting):
        try:
            place = ray.get(handle.starting)
        except RayError as error:
            handle.failure = cause_of(error) if isinstance(error, RayTaskError) else None
            why = type(handle.failure).__name__ if handle.failure else first_line(error)
            return mark_lost(member, f"it does not start: {why}", now)
        if isinstance(place, str):  # a gateway's URL
            handle.starting = handle.actor.where.remote()
            return member
        if not isinstance(place, ActorLocation):
            handle.failure = Unavailable(
                f"{member.name} answered {place!r} instead of its location: install the same "
                "version on all nodes"
            )
            return mark_lost(member, "it is of another version", now)
        ask(member, handle, now)
        return replace(member, state="ready", place=place, placed=True, since=now)
    if member.placed and now - member.since > START_TIMEOUT_S:
        return mark_lost(member, f"it did not start within {START_TIMEOUT_S:g} s", now)
    return member


def poll_report(member: Member, handle: ActorHandle, last_heard: float, now: float) -> Member:
    if is_answered(handle.reporting):
        answer = ray.get(handle.reporting)
        handle.report = None if isinstance(answer, ActorLocation) else answer
        handle.heard_at = handle.asked_at
        ask(member, handle, now)
        member = replace(member, sessions=session_count(handle.report))
    elif timed_out(handle.asked_at, last_heard, now, answer_timeout(member, handle)):
        return mark_lost(member, f"no answer for {now - handle.asked_at:.1f} s", now)
    if handle.draining is not None and is_answered(handle.draining):
        ray.get(handle.draining)
        return replace(member, drained=True)
    return member


def answer_timeout(member: Member, handle: ActorHandle) -> float:
    """Returns the seconds that the member may take to answer."""
    if isinstance(member.spec, GatewaySpec):
        return GATEWAY_TIMEOUT_S
    return ANSWER_TIMEOUT_S if handle.heard_at else SILENCE_TIMEOUT_S


def session_count(report: TargetReport | DrafterReport | None) -> int:
    match report:
        case TargetReport():
            return report.live + report.waiting
        case DrafterReport():
            return report.sessions
        case None:
            return 0


def notify_drafters(handle: ActorHandle, endpoints: Sequence[Endpoint]) -> None:
    """Sends a target its drafters, once it has acknowledged the message before.

    Repeating the message changes nothing, and restores a lost link.
    """
    if handle.notifying is not None:
        if not is_answered(handle.notifying):
            return
        with contextlib.suppress(RayError):  # its reports show whether it lives
            ray.get(handle.notifying)
            handle.acknowledged = handle.notified
    handle.notified = tuple(endpoints)
    handle.notifying = handle.actor.drafters.remote(list(endpoints))


def kill(member: Member, handle: ActorHandle) -> None:
    """Kills the actor, and its process if it does not respond to Ray.

    A stopped process would hold its device until it is gone.
    """
    if handle.actor is not None:
        with contextlib.suppress(RayError):
            ray.kill(handle.actor)
    if not (member.lost and member.place is not None and (node := member.place.node)):
        return
    pid, kind = member.place.pid, ACTOR_CLASSES[type(member.spec)]
    if node == ray.get_runtime_context().get_node_id():
        # On a thread, since /proc blocks for a process that is stuck in the kernel. A Ray task
        # would start a worker that competes with the remaining members.
        Thread(target=end_process, args=(pid, kind), daemon=True).start()
        return
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(end_process).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    task.remote(pid, kind)


def end_process(pid: int, kind: str) -> None:
    """Sends SIGKILL to the process on this node if it is still an actor's of this class."""
    with contextlib.suppress(OSError):
        if kind.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


def is_answered(answer: Any) -> bool:
    return bool(ray.wait([answer], timeout=0)[0])


def actor_class(actor: type, name: str, placement: Placement, detached: bool = False) -> Any:
    """Returns the Ray actor class with its name and what it takes from the cluster.

    A detached actor outlives the process that starts it.
    """
    wanted = demand(placement)
    return ray.remote(actor).options(
        name=name,
        num_cpus=wanted.pop("CPU", 0),
        num_gpus=wanted.pop("GPU", 0),
        resources=wanted,
        max_restarts=0,
        max_concurrency=MAX_CONCURRENT_CALLS,
        lifetime="detached" if detached else None,
    )
