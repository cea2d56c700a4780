"""What is told of the members of a fleet: to routers and people as a Fleet, to the scaling of pools as a Sample. Pure."""

import importlib.metadata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from actors.fleet import DrafterState, Fleet, PoolState, State, TargetState
from actors.roster import GATEWAY, TARGET, Member, TargetSpec, drafts, serves, waits
from runtime.config import Deployment
from runtime.reports import DrafterReport, TargetReport
from runtime.scaling import Decision, Sample

Reports = Mapping[str, TargetReport | DrafterReport | None]  # by member


def fleet(
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
    return Fleet(
        model=deployment.target.model,
        served_model=deployment.served_model(),
        version=importlib.metadata.version("outrider"),
        targets=tuple(target(member, reports.get(member.name), now) for member in ordered if member.role == TARGET),
        drafters=tuple(drafter(member, reports.get(member.name), now) for member in ordered if drafts(member)),
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
        gateways=tuple(member.place.address for member in ordered if member.role == GATEWAY and serves(member) and member.place),
        replaced=replaced,
        heads=tuple(deployment.target.named_heads()),
    )


def target(member: Member, report: object, now: float) -> TargetState:
    return TargetState(
        name=member.name,
        address=member.place.address if member.place else "",
        incarnation=member.incarnation,
        state=state(member),
        sessions=member.sessions,
        report=report if isinstance(report, TargetReport) else None,
        node=member.place.node if member.place else "",
        restarts=member.restarts,
        trouble=trouble(member, now),
        model=member.spec.config.model if isinstance(member.spec, TargetSpec) else "",
    )


def drafter(member: Member, report: object, now: float) -> DrafterState:
    return DrafterState(
        name=member.name,
        pool=member.role,
        address=member.place.address if member.place else "",
        incarnation=member.incarnation,
        state=state(member),
        restarts=member.restarts,
        report=report if isinstance(report, DrafterReport) else None,
        node=member.place.node if member.place else "",
        trouble=trouble(member, now),
    )


def state(member: Member) -> State:
    """As others are to treat it: one that is lost gets nothing until its next life is ready."""
    return "starting" if member.lost and member.state != "failed" else member.state


def trouble(member: Member, now: float) -> str:
    """What is wrong with it; "" where nothing is."""
    if member.state == "failed":
        again = f"`outrider scale {member.role}=N` tries again"
        return f"given up after {member.failures} failures in a row, the last: {member.lost}; {again}"
    return member.lost or ("it waits for room in the cluster" if waits(member, now) else "")


def steady(member: Member) -> Member:
    """Without what changes by itself."""
    return replace(member, since=0.0, sessions=0)


def sample(now: float, ready: int, reports: Sequence[TargetReport], drafters: Collection[str]) -> Sample:
    """Counters of all targets together; `drafters` are those of the pool, `ready` of them at work."""
    return Sample(
        at=now,
        ready=ready,
        steps=sum(report.steps for report in reports),
        rounds=sum(report.rounds for report in reports),
        accepted=sum(report.accepted for report in reports),
        own=sum(guess.accepted for report in reports for name, guess in report.guesses.items() if name in drafters),
        busy=sum(report.computed + report.waited + report.bookkeeping for report in reports),
    )


def unready(members: Iterable[Member]) -> str:
    """Why not all is there yet."""
    said = [f"{member.name} {stage(member)}" for member in members if member.state == "starting"]
    return ", ".join(sorted(said)) or "targets and drafters do not reach each other"


def stage(member: Member) -> str:
    """How far the start of a member is."""
    return "is loading" if member.placed else "waits for room in the cluster" if member.cramped else "has no process yet"
