"""Decides what to do about a fleet: wanted deployment and members in, actions out. Pure.

A member is one life of a target, a drafter or a gateway, made from a spec. Members with equal specs
are interchangeable. A member is outdated once the deployment wants another spec.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count as numbers

from actors.fleet.fleet_state import State
from actors.rpc.endpoints import ActorLocation, Endpoint
from runtime.config import Deployment, DrafterConfig, PoolConfig, TargetConfig, TlsConfig
from runtime.core.errors import InvalidRequest

TARGET, GATEWAY = "target", "gateway"  # roles; every other is the name of a pool
ANSWER_TIMEOUT_S = 2.0  # without an answer until a member is lost
SILENCE_TIMEOUT_S = 6.0  # the same while no member answers, or before its first answer
GATEWAY_TIMEOUT_S = 15.0  # the same for a gateway, whose clients' streams cannot be resumed
SCHEDULING_TIMEOUT_S = 15.0  # until an unschedulable member counts as waiting for resources
MAX_BACKOFF_S = 30.0  # between two attempts to start a member
MIN_UPTIME_S = 4.0  # below which a drafter's life counts as a failed start
MAX_FAILURES = 10  # in a row until a drafter is given up; with the backoffs, three minutes
MAX_WAITED_FAILURES = 3  # in a row until callers that wait for a start get an error


@dataclass(frozen=True, slots=True)
class TargetSpec:
    config: TargetConfig
    tls: TlsConfig | None


@dataclass(frozen=True, slots=True)
class DrafterSpec:
    config: DrafterConfig
    target: str  # the target's model
    tls: TlsConfig | None


@dataclass(frozen=True, slots=True)
class GatewaySpec:
    plan: Deployment  # the parts that concern a gateway
    node: str | None  # IP address


Spec = TargetSpec | DrafterSpec | GatewaySpec


@dataclass(frozen=True, slots=True)
class Member:
    """One life of a target, a drafter or a gateway.

    index          its number within its role
    since          clock when it entered its state, got its process, or was lost
    placed         its process runs
    unschedulable  Ray has no resources for its process
    leaves         its node is being drained
    drained        it has no work left
    lost           why it is no longer there, "" while it is
    failures       consecutive failed starts under this name
    restarts       lives lost under this name
    """

    name: str
    role: str
    index: int
    incarnation: int
    spec: Spec
    state: State
    since: float
    place: ActorLocation | None = None
    placed: bool = False
    unschedulable: bool = False
    leaves: bool = False
    sessions: int = 0
    drained: bool = False
    lost: str = ""
    failures: int = 0
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """Starts a new member."""

    role: str
    index: int
    spec: Spec


@dataclass(frozen=True, slots=True)
class Replace:
    """Starts a new life of a lost member."""

    name: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Leaves a member without a further life until a user requests one."""

    name: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Lets a member finish its work and gives it nothing new."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class End:
    """Ends a member that is not needed, or that is lost and needs no replacement."""

    name: str
    why: str


Action = Start | Replace | GiveUp | Drain | End


def first_counts(deployment: Deployment, gateways: bool) -> dict[str, int]:
    """Returns how many members of each role a new deployment has, with or without gateways."""
    counts = {TARGET: deployment.target.replicas} | {
        pool.name: pool.count for pool in deployment.pools
    }
    return counts | ({GATEWAY: len(deployment.gateway.nodes) or 1} if gateways else {})


def next_counts(
    deployment: Deployment, present: Mapping[str, int], gateways: bool
) -> dict[str, int]:
    """Returns the counts when a deployment follows another.

    A pool that scales automatically keeps its present size, within its bounds.
    """
    kept = {
        pool.name: max(pool.min, min(pool.max, present[pool.name]))
        for pool in deployment.pools
        if pool.auto and pool.name in present
    }
    return first_counts(deployment, gateways) | kept


def pool_of(deployment: Deployment, name: str) -> PoolConfig:
    """Returns the pool of this name. Raises InvalidRequest if there is none."""
    for pool in deployment.pools:
        if pool.name == name:
            return pool
    known = ", ".join(pool.name for pool in deployment.pools) or "none"
    raise InvalidRequest(f"unknown pool {name!r}: the deployment has {known}", "pool")


def spec_of(deployment: Deployment, role: str, index: int) -> Spec | None:
    """Returns the wanted spec of a role's member `index`; None if the deployment has none."""
    tls = deployment.security.tls
    if role == TARGET:
        return TargetSpec(deployment.target.model_copy(update={"replicas": 1}), tls)
    if role == GATEWAY:
        nodes = deployment.gateway.nodes
        if index >= (len(nodes) or 1):
            return None
        gateway = deployment.gateway.model_copy(update={"nodes": ()})
        target = TargetConfig(model=deployment.target.model)
        plan = Deployment(
            target=target, gateway=gateway, limits=deployment.limits, security=deployment.security
        )
        return GatewaySpec(plan, nodes[index] if nodes else None)
    pool = next((pool for pool in deployment.pools if pool.name == role), None)
    return None if pool is None else DrafterSpec(pool.member(index), deployment.target.model, tls)


def reconcile(
    deployment: Deployment, counts: Mapping[str, int], members: Sequence[Member], now: float
) -> list[Action]:
    """Returns the actions that bring the members closer to `counts` of the wanted specs.

    It requests nothing that is under way already.
    """
    roles = dict.fromkeys([*counts, *(member.role for member in members)])
    return [
        action
        for role in roles
        for action in reconcile_role(deployment, role, counts.get(role, 0), members, now)
    ]


def reconcile_role(
    deployment: Deployment, role: str, count: int, everybody: Sequence[Member], now: float
) -> list[Action]:
    members = [member for member in everybody if member.role == role]
    fit = matching(deployment, role, everybody)
    kept = sorted(fit, key=preference)[:count]
    leaving = [member for member in members if member not in kept]
    if role == GATEWAY:
        # An outdated gateway holds the port, and serves the old targets until new ones are ready.
        targets_serve = any(serves(member) for member in matching(deployment, TARGET, everybody))
        still_needed = 0 if targets_serve else count
    else:
        still_needed = count - sum(succeeds(member, now) for member in kept)
    return [
        *replacements(kept, now),
        *(
            End(member.name, member.lost or ("drained" if member.drained else "not needed"))
            for member in leaving
            if is_idle(member)
        ),
        *evictions(role, leaving, kept),
        *drains(leaving, fit, still_needed),
        *starts(deployment, role, count, members, len(kept)),
    ]


def matching(deployment: Deployment, role: str, members: Sequence[Member]) -> list[Member]:
    """Returns the members of a role that have the wanted spec and may stay, in any number."""
    return [
        member
        for member in members
        if member.role == role
        and member.state != "draining"
        and not member.leaves
        and member.spec == spec_of(deployment, role, member.index)
    ]


def preference(member: Member) -> tuple[bool, bool, int, int]:
    """Sorts members that stay first: those that serve, then the busiest, then by index."""
    return bool(member.lost), member.state != "ready", -member.sessions, member.index


def is_idle(member: Member) -> bool:
    """Tells whether the member has no work, so that it may end at once."""
    return bool(member.lost) or member.state == "starting" or member.drained


def replacements(kept: Sequence[Member], now: float) -> list[Action]:
    """Replaces lost members: at once, or after a backoff if their start failed."""
    lost = [member for member in kept if member.lost and member.state != "failed"]
    return [
        *(GiveUp(member.name) for member in lost if is_exhausted(member)),
        *(
            Replace(member.name)
            for member in lost
            if not is_exhausted(member) and now - member.since >= backoff(member.failures)
        ),
    ]


def evictions(role: str, leaving: Sequence[Member], kept: Sequence[Member]) -> list[Action]:
    """Drains members whose node leaves; a target only while another one serves."""
    going = [member for member in leaving if serves(member) and member.leaves]
    may_go = role != TARGET or any(map(serves, kept))
    return [Drain(member.name, "its node leaves") for member in going if may_go]


def drains(leaving: Sequence[Member], fit: Sequence[Member], still_needed: int) -> list[Action]:
    """Drains surplus members, and outdated ones that are no longer needed."""
    serving = [member for member in leaving if serves(member) and not member.leaves]
    outdated = sorted((member for member in serving if member not in fit), key=preference)
    return [
        *(Drain(member.name, "surplus") for member in serving if member in fit),
        *(Drain(member.name, "outdated") for member in outdated[max(0, still_needed) :]),
    ]


def starts(
    deployment: Deployment, role: str, count: int, members: Sequence[Member], there: int
) -> list[Action]:
    """Starts new members under the first free indexes; a gateway only under its node's index."""
    taken = {member.index for member in members}
    found: list[Action] = []
    for index in numbers():
        if there + len(found) >= count or (spec := spec_of(deployment, role, index)) is None:
            return found
        if index not in taken:
            found.append(Start(role, index, spec))
    return found


def succeeds(member: Member, now: float) -> bool:
    """Tells whether an outdated member may end because of this one."""
    return serves(member) or waits_for_room(member, now)


def waits_for_room(member: Member, now: float) -> bool:
    """Tells whether the member has waited for resources for SCHEDULING_TIMEOUT_S."""
    return member.unschedulable and is_late(member, now)


def is_late(member: Member, now: float) -> bool:
    """Tells whether the member's process should run by now and does not."""
    waiting = member.state == "starting" and not member.placed and not member.lost
    return waiting and now - member.since >= SCHEDULING_TIMEOUT_S


def timed_out(
    asked: float, last_heard: float, now: float, timeout_s: float = ANSWER_TIMEOUT_S
) -> bool:
    """Tells whether a member that has not answered a request from `asked` is lost.

    `last_heard` is the time of the latest request that any member has answered. If it is not after
    `asked`, the controller itself may be slow, so the timeout is at least SILENCE_TIMEOUT_S.
    """
    return now - asked > (timeout_s if last_heard > asked else max(timeout_s, SILENCE_TIMEOUT_S))


def serves(member: Member) -> bool:
    """Tells whether the member is ready and takes new work."""
    return member.state == "ready" and not member.lost


def drafts(member: Member) -> bool:
    return member.role not in (TARGET, GATEWAY)


def is_running(member: Member) -> bool:
    """Tells whether the member is ready or draining, and not lost."""
    return member.place is not None and not member.lost


def is_satisfied(
    deployment: Deployment, counts: Mapping[str, int], members: Sequence[Member]
) -> bool:
    """Tells whether as many members with the wanted spec serve as are wanted."""
    return all(
        sum(map(serves, matching(deployment, role, members))) == count
        for role, count in counts.items()
    )


def drafter_endpoints(members: Sequence[Member]) -> tuple[Endpoint, ...]:
    """Returns the drafters that targets should use."""
    return tuple(
        Endpoint(member.name, member.place.address, member.incarnation)
        for member in members
        if drafts(member) and serves(member) and member.place is not None
    )


def mark_lost(member: Member, why: str, now: float) -> Member:
    """Returns the member as lost.

    A failed start counts as a failure, and so does an early end of a drafter's life. A target's
    does not: a short life must not delay its restart.
    """
    failed = member.place is None or (drafts(member) and now - member.since < MIN_UPTIME_S)
    return replace(member, lost=why, since=now, failures=member.failures + 1 if failed else 0)


def is_exhausted(member: Member) -> bool:
    """Tells whether a drafter has failed so often that it is given up."""
    return drafts(member) and member.failures >= MAX_FAILURES


def reset_failures(member: Member) -> Member:
    """Returns a lost member that restarts at once, whatever its failures."""
    return replace(member, state="starting", failures=0)


def backoff(failures: int) -> float:
    """Returns the seconds until the next start after this many failed ones."""
    return min(MAX_BACKOFF_S, 2.0 ** (failures - 1)) if failures else 0.0
