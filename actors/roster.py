"""Who should be there, and what is to be done about it. Pure: the wanted deployment and the present members in, actions out.

A member is one life of a target, a drafter or a gateway. What it is made from is its spec: two members with equal specs are
interchangeable, and one whose spec is not the wanted one any more is outdated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count as numbers

from actors.fleet import State
from actors.peers import Place
from runtime.config import Deployment, DrafterConfig, TargetConfig, TlsConfig

TARGET, GATEWAY = "target", "gateway"  # roles; every other is the name of a pool
PATIENCE = 2.0  # seconds without an answer after which a member is lost ...
DEAF = 6.0  # ... and where nobody answers at all, or it has not answered yet: then it is rather the controller that is held up
FORBEARANCE = 15.0  # ... and of a gateway: streams of clients end with it, and no journal brings them back
CRAMPED = 15.0  # seconds without a process after which a member that Ray has no room for is taken to wait for it
LONGEST_BACKOFF = 30.0  # seconds between two starts of what does not start
SOON = 4.0  # seconds that a drafter must live after its start to have started well
MOST_FAILURES = 10  # in a row, after which a drafter is given up: with the waits between them three minutes of trying


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
    plan: Deployment  # what concerns it of it
    node: str | None  # IP address


Spec = TargetSpec | DrafterSpec | GatewaySpec


@dataclass(frozen=True, slots=True)
class Member:
    """`since`: clock when its state, its placing or its loss began. `lost`: why it is no longer there, "" while it is.

    index     its number among those of its role
    placed    its process is there
    cramped   it has none since Ray has no room for it: one that has room may take long to start, too
    leaves    Ray was told to let its node go
    drained   it has nothing to do any more
    failures  starts under this name that failed, one after the other;  restarts: lives lost under it
    """

    name: str
    role: str
    index: int
    incarnation: int
    spec: Spec
    state: State
    since: float
    place: Place | None = None
    placed: bool = False
    cramped: bool = False
    leaves: bool = False
    sessions: int = 0
    drained: bool = False
    lost: str = ""
    failures: int = 0
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """A new member."""

    role: str
    index: int
    spec: Spec


@dataclass(frozen=True, slots=True)
class Replace:
    """A new life for a member that is lost."""

    name: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No further life for a member that is lost, until somebody asks for it."""

    name: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Let it finish what it has, and give it nothing new."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class End:
    """It is needed no longer, or is lost and not missed."""

    name: str
    why: str


Action = Start | Replace | GiveUp | Drain | End


def first_counts(deployment: Deployment, gateways: bool) -> dict[str, int]:
    """How many of each role there are to be at first; none of the gateways where they are not asked for."""
    counts = {TARGET: deployment.target.replicas} | {pool.name: pool.count for pool in deployment.pools}
    return counts | ({GATEWAY: len(deployment.gateway.nodes) or 1} if gateways else {})


def spec_of(deployment: Deployment, role: str, index: int) -> Spec | None:
    """What number `index` of a role is made from; None where the deployment has none."""
    tls = deployment.security.tls
    if role == TARGET:
        return TargetSpec(deployment.target.model_copy(update={"replicas": 1}), tls)
    if role == GATEWAY:
        nodes = deployment.gateway.nodes
        if index >= (len(nodes) or 1):
            return None
        gateway = deployment.gateway.model_copy(update={"nodes": ()})
        target = TargetConfig(model=deployment.target.model)
        plan = Deployment(target=target, gateway=gateway, limits=deployment.limits, security=deployment.security)
        return GatewaySpec(plan, nodes[index] if nodes else None)
    pool = next((pool for pool in deployment.pools if pool.name == role), None)
    return None if pool is None else DrafterSpec(pool.member(index), deployment.target.model, tls)


def decide(deployment: Deployment, counts: Mapping[str, int], members: Sequence[Member], now: float) -> list[Action]:
    """What brings the members nearer to `counts` of the present specs. Nothing for what is under way already."""
    roles = dict.fromkeys([*counts, *(member.role for member in members)])
    return [action for role in roles for action in of_role(deployment, role, counts.get(role, 0), members, now)]


def of_role(deployment: Deployment, role: str, count: int, everybody: Sequence[Member], now: float) -> list[Action]:
    members, fit = [member for member in everybody if member.role == role], fitting(deployment, role, everybody)
    kept = sorted(fit, key=preference)[:count]
    leaving = [member for member in members if member not in kept]
    if role == GATEWAY:  # its port is free only without it; and it serves the targets of before until those of now are there
        least = 0 if any(serves(member) for member in fitting(deployment, TARGET, everybody)) else count
    else:
        least = count - sum(succeeds(member, now) for member in kept)
    return [
        *replacements(kept, now),
        *(End(member.name, member.lost or ("drained" if member.drained else "not needed")) for member in leaving if idle(member)),
        *evictions(role, leaving, kept),
        *drains(leaving, fit, least),
        *starts(deployment, role, count, members, len(kept)),
    ]


def fitting(deployment: Deployment, role: str, members: Sequence[Member]) -> list[Member]:
    """Those of a role that are what is wanted now, however many."""
    return [
        member
        for member in members
        if member.role == role
        and member.state != "draining"
        and not member.leaves
        and member.spec == spec_of(deployment, role, member.index)
    ]


def preference(member: Member) -> tuple[bool, bool, int, int]:
    """Who stays where there are too many: those that serve, of them those with most to do, of equals the first."""
    return bool(member.lost), member.state != "ready", -member.sessions, member.index


def idle(member: Member) -> bool:
    """Nobody depends on it: it may end at once."""
    return bool(member.lost) or member.state == "starting" or member.drained


def replacements(kept: Sequence[Member], now: float) -> list[Action]:
    """Of those that are lost: at once, or some time after a start that failed."""
    lost = [member for member in kept if member.lost and member.state != "failed"]
    return [
        *(GiveUp(member.name) for member in lost if is_hopeless(member)),
        *(Replace(member.name) for member in lost if not is_hopeless(member) and now - member.since >= backoff(member.failures)),
    ]


def evictions(role: str, leaving: Sequence[Member], kept: Sequence[Member]) -> list[Action]:
    """Whose node goes finishes what it has, and gets nothing new; but for targets as long as no other serves."""
    going = [member for member in leaving if serves(member) and member.leaves]
    return [Drain(member.name, "its node leaves") for member in going if role != TARGET or any(map(serves, kept))]


def drains(leaving: Sequence[Member], fit: Sequence[Member], least: int) -> list[Action]:
    """Surplus goes at once; of what is outdated so many stay that nobody has succeeded yet."""
    serving = [member for member in leaving if serves(member) and not member.leaves]
    outdated = sorted((member for member in serving if member not in fit), key=preference)
    return [
        *(Drain(member.name, "one too many") for member in serving if member in fit),
        *(Drain(member.name, "outdated") for member in outdated[max(0, least) :]),
    ]


def succeeds(member: Member, now: float) -> bool:
    """Whether an outdated member may go because of this one."""
    return serves(member) or waits(member, now)


def waits(member: Member, now: float) -> bool:
    """It finds no room in the cluster."""
    return member.cramped and is_late(member, now)


def is_late(member: Member, now: float) -> bool:
    """Its process could be there."""
    return member.state == "starting" and not member.placed and not member.lost and now - member.since >= CRAMPED


def mute(asked: float, ear: float, now: float, patience: float = PATIENCE) -> bool:
    """Whether a member that was asked then, and has not answered, is lost. `ear`: when the latest question was asked that anybody has
    answered."""
    return now - asked > (patience if ear > asked else max(patience, DEAF))


def serves(member: Member) -> bool:
    """It is there and takes new work."""
    return member.state == "ready" and not member.lost


def drafts(member: Member) -> bool:
    return member.role not in (TARGET, GATEWAY)


def starts(deployment: Deployment, role: str, count: int, members: Sequence[Member], there: int) -> list[Action]:
    """New members under the first free numbers; a gateway only under that of its node."""
    taken = {member.index for member in members}
    found: list[Action] = []
    for index in numbers():
        if there + len(found) >= count or (spec := spec_of(deployment, role, index)) is None:
            return found
        if index not in taken:
            found.append(Start(role, index, spec))
    return found


def bereft(member: Member, why: str, now: float) -> Member:
    """The member without its life. One that failed to start, or a drafter's that ended soon after, is one failure more; a target is too
    sorely missed to wait because its last life was short."""
    failed = member.place is None or (drafts(member) and now - member.since < SOON)
    return replace(member, lost=why, since=now, failures=member.failures + 1 if failed else 0)


def is_hopeless(member: Member) -> bool:
    return drafts(member) and member.failures >= MOST_FAILURES


def forgiven(member: Member) -> Member:
    """One that is lost, to be replaced at once whatever it has failed at before."""
    return replace(member, state="starting", failures=0)


def backoff(failures: int) -> float:
    """Seconds until the next start after so many that failed."""
    return min(LONGEST_BACKOFF, 2.0 ** (failures - 1)) if failures else 0.0
