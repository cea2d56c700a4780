"""Describes a fleet to routers, gateways and people. Pure."""

import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import replace

from actors.controller.reconciler import (
    GATEWAY,
    TARGET,
    Member,
    TargetSpec,
    drafts,
    serves,
    waits_for_room,
)
from actors.fleet.fleet_state import DrafterState, Fleet, PoolState, State, TargetState
from actors.fleet.scaling_policy import Decision
from runtime.config import Deployment
from runtime.telemetry.reports import DrafterReport, TargetReport

Reports = Mapping[str, TargetReport | DrafterReport | None]  # by member


def build_fleet(
    deployment: Deployment,
    counts: Mapping[str, int],
    members: Iterable[Member],
    reports: Reports,
    decisions: Mapping[str, Decision],
    replaced: int,
    now: float,
) -> Fleet:
    ordered = sorted(members, key=lambda member: (member.role, member.index))
    ready = [member.role for member in ordered if serves(member)]
    gateways = [member for member in ordered if member.role == GATEWAY and serves(member)]
    return Fleet(
        model=deployment.target.model,
        served_model=deployment.served_model(),
        version=importlib.metadata.version("outrider"),
        targets=tuple(
            target_state(member, reports.get(member.name), now)
            for member in ordered
            if member.role == TARGET
        ),
        drafters=tuple(
            drafter_state(member, reports.get(member.name), now)
            for member in ordered
            if drafts(member)
        ),
        pools=tuple(
            PoolState(
                name=pool.name,
                draft=pool.model or pool.method,
                count=counts[pool.name],
                ready=ready.count(pool.name),
                min=pool.min,
                max=pool.max,
                auto=pool.auto,
                decision=decisions.get(pool.name),
            )
            for pool in deployment.pools
        ),
        gateways=tuple(member.place.address for member in gateways if member.place),
        replaced=replaced,
        heads=tuple(deployment.target.named_heads()),
    )


def target_state(member: Member, report: object, now: float) -> TargetState:
    return TargetState(
        name=member.name,
        address=member.place.address if member.place else "",
        incarnation=member.incarnation,
        state=public_state(member),
        sessions=member.sessions,
        report=report if isinstance(report, TargetReport) else None,
        node=member.place.node if member.place else "",
        restarts=member.restarts,
        trouble=failure_reason(member, now),
        model=member.spec.config.model if isinstance(member.spec, TargetSpec) else "",
    )


def drafter_state(member: Member, report: object, now: float) -> DrafterState:
    return DrafterState(
        name=member.name,
        pool=member.role,
        address=member.place.address if member.place else "",
        incarnation=member.incarnation,
        state=public_state(member),
        restarts=member.restarts,
        report=report if isinstance(report, DrafterReport) else None,
        node=member.place.node if member.place else "",
        trouble=failure_reason(member, now),
    )


def public_state(member: Member) -> State:
    """Returns the state for others, in which a lost member is `starting`."""
    return "starting" if member.lost and member.state != "failed" else member.state


def failure_reason(member: Member, now: float) -> str:
    """Returns what is wrong with the member, "" if nothing is."""
    if member.state == "failed":
        again = f"`outrider scale {member.role}=N` tries again"
        return (
            f"given up after {member.failures} failures in a row, the last: {member.lost}; {again}"
        )
    waits = waits_for_room(member, now)
    return member.lost or ("waits for free resources in the cluster" if waits else "")


def without_volatile(member: Member) -> Member:
    """Returns the member, for saving, without the fields that change all the time."""
    return replace(member, since=0.0, sessions=0)


def describe_unready(members: Iterable[Member]) -> str:
    """Describes why not all members are ready."""
    stages = [
        f"{member.name} {describe_start(member)}"
        for member in members
        if member.state == "starting"
    ]
    return ", ".join(sorted(stages)) or "targets and drafters cannot reach each other"


def describe_start(member: Member) -> str:
    """Describes how far the start of a member is."""
    if member.placed:
        return "is loading"
    return (
        "waits for free resources in the cluster" if member.unschedulable else "has no process yet"
    )
