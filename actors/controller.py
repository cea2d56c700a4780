"""The controller: brings the members of a fleet to what is wanted, watches them, replaces them, and tells targets who drafts.

It is a thin loop: `roster.decide` says what is to be done, `lives` does it without waiting, `scaling` says how many drafters.
"""

import itertools
import logging
import os
import threading
import time
from collections.abc import Collection
from dataclasses import replace

import ray
from ray.autoscaler.sdk import request_resources
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from actors import census, ledger, lives, roster
from actors.credentials import warn_if_open
from actors.fleet import Fleet
from actors.ledger import Ledger
from actors.lives import Life
from actors.peers import Peer, Place
from actors.roster import PATIENCE, TARGET, Action, Drain, End, GiveUp, Member, Replace, Start, drafts, serves
from runtime import scaling
from runtime.config import MOST_DRAFTERS, Deployment, PoolConfig
from runtime.errors import InvalidRequest, OutriderError, Unavailable
from runtime.reports import TargetReport
from runtime.sampling import whole
from runtime.scaling import Decision, Sample, Scaling
from runtime.tracing import Recording

log = logging.getLogger(__name__)

NAME = "controller"  # of the one that serves
PERIOD = 0.5  # seconds between two looks at all members
MEASURE = 5.0  # seconds between two samples for pools that scale by themselves
KEEP = 60.0  # seconds between two savings of what was learned
TRIES = 3  # starts of one member that may fail until whoever waits for it is told
CRASH = 70  # exit code


class Controller:
    """A Ray actor. Threads: those that call it, and one that watches; the lock is held by whoever changes something.

    `served`: its actors are detached, with gateways, and known again after its own restart, until `stop`. Else they end with it, and
    `prefix` keeps their names apart from those of others in the cluster.
    """

    def __init__(self, deployment: Deployment, prefix: str = "", served: bool = False, record: bool = False) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        self.deployment, self.prefix, self.served, self.record = deployment, prefix, served, record
        self.counts = roster.first_counts(deployment, gateways=served)
        self.members: dict[str, Member] = {}
        self.actors: dict[str, Life] = {}
        self.life_of: dict[str, int] = {}  # how many each name has had
        self.replaced = 0
        self.scalings: dict[str, Scaling] = {}
        self.decisions: dict[str, Decision] = {}
        self.requested: list[dict[str, float]] = []
        self.leaving: frozenset[str] = frozenset()  # nodes
        self.unmet: tuple[dict[str, float], ...] = ()  # what Ray was asked for and has no room for
        self.saved = b""
        self.changed = threading.Condition()
        self.stopping = threading.Event()
        self.watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        if served and (known := _internal_kv_get(ledger.KEY)) is not None:
            self._resume(ledger.decode(known))
            self.watcher.start()

    # What others ask for

    def start(self, patience: float = lives.START) -> Fleet:
        """Starts everything; returns when all of it is ready, after which it goes on by itself. To be called once.

        Raises what an actor's own start raised, and Unavailable where not all is ready in so many seconds.
        """
        if not self.watcher.is_alive():
            self.watcher.start()
        fleet = self._await(patience)
        warn_if_open([member.place.node for member in self.members.values() if member.place], self.deployment.security.tls)
        return fleet

    def fleet(self) -> Fleet:
        with self.changed:
            return self._fleet()

    def wanted(self) -> Deployment:
        """The deployment that is in force."""
        return self.deployment

    def apply(self, deployment: Deployment, patience: float = lives.START) -> Fleet:
        """Change to this deployment without dropping a session; returns when all that is new in it is ready.

        What is unchanged stays; what has changed is started anew before the old is drained. Where something new does not start, the
        deployment before stays in force, and this raises as `start`.
        """
        with self.changed:
            before = self.deployment, self.counts
            auto = {pool.name: pool for pool in deployment.pools if pool.auto and pool.name in self.counts}
            kept = {name: max(pool.min, min(pool.max, self.counts[name])) for name, pool in auto.items()}
            self.deployment, self.counts = deployment, roster.first_counts(deployment, gateways=self.served) | kept
            self.scalings = {}
            self._forgive({member.role for member in self.members.values()})
            log.info("a deployment is applied")
        try:
            return self._await(patience)
        except OutriderError:
            with self.changed:
                self.deployment, self.counts = before
                log.info("the deployment before is in force again")
            raise

    def scale(self, pool: str, count: int) -> Fleet:
        """From now on so many drafters, also in place of those that were given up; returns at once. Raises InvalidRequest for an unknown
        pool, or a count out of its bounds."""
        with self.changed:
            config = self._pool(pool)
            whole("count", count, 0, MOST_DRAFTERS)
            if not config.min <= count <= config.max:
                raise InvalidRequest(
                    f"pool {pool} has from {config.min} to {config.max} drafters, not {count}: change its min or max", "count"
                )
            log.info("pool %s: %d -> %d drafters (asked for)", pool, self.counts[pool], count)
            self._count(pool, count)
            self._forgive({pool})
            return self._fleet()

    def drain(self, name: str) -> Fleet:
        """Let this member finish and go; its pool, or the targets, are one fewer from now on. Returns at once. Raises InvalidRequest
        for a name that is not there."""
        with self.changed:
            member = self.members.get(name)
            if member is None:
                raise InvalidRequest(f"there is no {name!r}: give one of {', '.join(sorted(self.members)) or 'none'}", "actor")
            if member.state != "draining":
                self._count(member.role, max(0, self.counts.get(member.role, 0) - 1))
                if serves(member):
                    self._drain(Drain(name, "asked for"))
                else:
                    self._end(End(name, "asked for"))
            return self._fleet()

    def places(self) -> dict[str, Place]:
        """Where each member is now; those that are starting are left out."""
        with self.changed:
            return {name: member.place for name, member in self.members.items() if member.place is not None}

    def recording(self, on: bool) -> None:
        """Whether targets and drafters record what they do; those that are started later do as well."""
        with self.changed:
            self.record = on
        told = [life.handle.recording.remote(on) for life in self._computing()]
        if told:
            ray.wait(told, num_returns=len(told), timeout=PATIENCE)

    def trace(self) -> list[Recording]:
        """What targets and drafters have recorded since the last call. What one had recorded before it was lost is missing."""
        answers = [life.handle.trace.remote() for life in self._computing()]
        answered, _ = ray.wait(answers, num_returns=len(answers), timeout=PATIENCE)
        return ray.get(answered)  # type: ignore[no-any-return]

    def stop(self) -> None:
        """Ends every actor that this one started; returns when they were told. What they learned is kept, if they answer in time."""
        self.stopping.set()
        self._remember(PATIENCE)
        with self.changed:
            for name, member in self.members.items():
                lives.kill(member, self.actors[name])
            if self.served:
                _internal_kv_del(ledger.KEY)
            if self.requested:
                request_resources(bundles=[])

    # The loop

    def _watch(self) -> None:
        remembered = measured = time.monotonic()
        try:
            while not self.stopping.wait(PERIOD):
                self.leaving = lives.leaving_nodes(self.leaving)
                late = any(roster.is_late(member, time.monotonic()) for member in tuple(self.members.values()))
                self.unmet = lives.unmet_demands(self.unmet) if late else ()
                now = time.monotonic()
                with self.changed:
                    if self.stopping.is_set():
                        return
                    if now - measured >= MEASURE:
                        self._scale(now)
                        measured = now
                    self._look(now)
                    self.changed.notify_all()
                if now - remembered > KEEP:
                    self._remember()
                    remembered = now
        finally:
            if not self.stopping.is_set():  # without this thread nobody is watched: better a new controller
                log.critical("the controller ends by a fault of its own", exc_info=True)
                os._exit(CRASH)

    def _look(self, now: float) -> None:
        """Hear all members, decide, act."""
        ear = max((life.heard for life in self.actors.values()), default=0.0)
        for name, member in self.members.items():
            found = lives.listen(member, self.actors[name], ear, now)
            leaves = found.place is not None and found.place.node in self.leaving
            cramped = not found.placed and lives.demand(lives.placement_of(found.spec)) in self.unmet
            self._change(replace(found, leaves=leaves, cramped=cramped))
        for action in roster.decide(self.deployment, self.counts, tuple(self.members.values()), now):
            self._act(action, now)
        self._save()
        for name in self.members.keys() - self.actors.keys():
            member = self.members[name]
            self.actors[name] = lives.create(member, self._actor(member), self.served, self.record)
        self._tell()
        self._ask_for_room(now)

    def _act(self, action: Action, now: float) -> None:
        match action:
            case Start(role, index, spec):
                self._begin(Member(f"{role}-{index}", role, index, 0, spec, "starting", now))
            case Replace(name):
                lost = self.members[name]
                self.replaced += lost.place is not None
                lives.kill(lost, self.actors.pop(name))
                started = Member(name, lost.role, lost.index, 0, lost.spec, "starting", now)
                self._begin(replace(started, failures=lost.failures, restarts=lost.restarts + 1))
            case GiveUp(name):
                lost = self.members[name]
                log.error("%s is given up: it failed %d times in a row, at last: %s", name, lost.failures, lost.lost)
                lives.kill(lost, self.actors[name])
                self.members[name] = replace(lost, state="failed")
            case Drain():
                self._drain(action)
            case End():
                self._end(action)

    def _begin(self, member: Member) -> None:
        """Its actor is made when it has been written down."""
        incarnation = self.life_of.get(member.name, 0)
        self.life_of[member.name] = incarnation + 1
        self.members[member.name] = replace(member, incarnation=incarnation)
        log.info("%s starts (life %d)", member.name, incarnation)

    def _drain(self, drain: Drain) -> None:
        member, life = self.members[drain.name], self.actors[drain.name]
        log.info("%s is drained: %s", drain.name, drain.why)
        if drafts(member):
            life.handle.remember.remote()  # its work ends when no target names it any more
        else:
            life.draining = life.handle.drain.remote()
        self.members[drain.name] = replace(member, state="draining")

    def _end(self, end: End) -> None:
        log.info("%s ends: %s", end.name, end.why)
        lives.kill(self.members.pop(end.name), self.actors.pop(end.name))

    def _change(self, member: Member) -> None:
        before = self.members[member.name]
        if member.lost and not before.lost:
            log.warning("%s is lost: %s", member.name, member.lost)
        elif member.state != before.state:
            log.info("%s is %s", member.name, member.state)
        self.members[member.name] = member

    def _tell(self) -> None:
        """Tell every target who drafts. A drafter that is drained has nothing to do once no target names it."""
        peers, told = self._peers(), [self.actors[member.name] for member in self._there(TARGET)]
        for life in told:
            lives.tell(life, peers)
        for member in tuple(self.members.values()):
            if drafts(member) and member.state == "draining":
                named = any(life.knows is None or member.name in {peer.name for peer in life.knows} for life in told)
                self.members[member.name] = replace(member, drained=not named)

    def _peers(self) -> tuple[Peer, ...]:
        """Drafters that targets are to have."""
        return tuple(
            Peer(member.name, member.place.address, member.incarnation)
            for member in self.members.values()
            if drafts(member) and serves(member) and member.place is not None
        )

    def _there(self, role: str) -> list[Member]:
        """Those that hear: ready or being drained."""
        return [member for member in self.members.values() if member.role == role and member.place is not None and not member.lost]

    def _ask_for_room(self, now: float) -> None:
        """Where members wait for room, ask Ray's autoscaler for a cluster that holds all of them; else for nothing."""
        waiting = any(roster.waits(member, now) for member in self.members.values())
        wanted = [found for member in self.members.values() if (found := lives.bundle(member.spec))] if waiting else []
        if wanted != self.requested:
            log.info("the cluster is asked for room for %d members", len(wanted))
            request_resources(bundles=wanted)
            self.requested = wanted

    def _scale(self, now: float) -> None:
        """Give the pools that scale by themselves another sample."""
        for pool in self.deployment.pools:
            if not pool.auto:
                continue
            known = self.scalings.get(pool.name)
            if known is None or known.count != self.counts[pool.name]:
                known = Scaling(self.counts[pool.name])
            known, decision = scaling.step(pool.name, pool.min, pool.max, known, self._sample(pool, now))
            self.scalings[pool.name] = known
            if decision is not None:
                log.info("%s", decision)
                self.decisions[pool.name] = decision
                self.counts[pool.name] = decision.after

    def _sample(self, pool: PoolConfig, now: float) -> Sample:
        drafters = {member.name for member in self.members.values() if member.role == pool.name}
        ready = sum(serves(self.members[name]) for name in drafters)
        reports = [self.actors[member.name].report for member in self._there(TARGET)]
        return census.sample(now, ready, [report for report in reports if isinstance(report, TargetReport)], drafters)

    # What it knows

    def _await(self, patience: float) -> Fleet:
        """Until all is ready that is wanted now."""
        deadline = time.monotonic() + patience
        with self.changed:
            while not self._is_ready():
                for member in itertools.chain.from_iterable(map(self._fit, self.counts)):
                    life = self.actors[member.name]
                    if life.failure is not None:
                        raise life.failure
                    if member.lost and member.failures >= TRIES:
                        raise Unavailable(f"{member.name}: {member.lost}, {member.failures} times: see `outrider logs {member.name}`")
                if self.stopping.is_set():
                    raise Unavailable("the deployment was ended meanwhile: start it again")
                if not self.changed.wait(deadline - time.monotonic()):
                    raise Unavailable(f"not ready within {patience:g} s: {census.unready(self.members.values())}")
            return self._fleet()

    def _is_ready(self) -> bool:
        """As many as are wanted serve, and every target has taken in who drafts."""
        peers, serving = self._peers(), {role: [member for member in self._fit(role) if serves(member)] for role in self.counts}
        return all(len(serving[role]) == count for role, count in self.counts.items()) and all(
            self.actors[member.name].knows == peers for member in serving.get(TARGET, ())
        )

    def _fit(self, role: str) -> list[Member]:
        return roster.fitting(self.deployment, role, tuple(self.members.values()))

    def _fleet(self) -> Fleet:
        reports = {name: life.report for name, life in self.actors.items()}
        now = time.monotonic()
        return census.fleet(self.deployment, self.counts, self.members.values(), reports, self.decisions, self.replaced, now)

    def _pool(self, name: str) -> PoolConfig:
        for pool in self.deployment.pools:
            if pool.name == name:
                return pool
        known = ", ".join(pool.name for pool in self.deployment.pools) or "none"
        raise InvalidRequest(f"there is no pool {name!r}: the deployment has {known}", "pool")

    def _forgive(self, roles: Collection[str]) -> None:
        """What does not start is tried again at once, also what was given up."""
        for name, member in self.members.items():
            if member.role in roles and member.lost:
                self.members[name], self.actors[name].failure = roster.forgiven(member), None

    def _count(self, role: str, count: int) -> None:
        self.counts = self.counts | {role: count}

    def _actor(self, member: Member) -> str:
        """The actor's name in the cluster: that of a life, since Ray may keep that of a lost one for a while."""
        return f"{self.prefix}{member.name}-{member.incarnation}"

    def _computing(self) -> list[Life]:
        """Targets, then drafters that are there."""
        with self.changed:
            pools = dict.fromkeys(member.role for member in self.members.values() if drafts(member))
            return [self.actors[member.name] for role in (TARGET, *pools) for member in self._there(role)]

    def _remember(self, patience: float = 0.0) -> None:
        """Have what was learned written down."""
        answers = [life.handle.remember.remote() for life in self._computing()]
        if answers and patience:
            ray.wait(answers, num_returns=len(answers), timeout=patience)

    # Its own restart

    def _save(self) -> None:
        if self.served:
            members = tuple(census.steady(member) for member in self.members.values())
            data = ledger.encode(Ledger(self.deployment, self.counts, members, self.life_of, self.replaced))
            if data != self.saved:
                _internal_kv_put(ledger.KEY, data, overwrite=True)
                self.saved = data

    def _resume(self, known: Ledger) -> None:
        log.info("the controller was restarted: it looks for %d members", len(known.members))
        self.deployment, self.counts, self.life_of, self.replaced = known.deployment, known.counts, known.lives, known.replaced
        now = time.monotonic()
        for saved in known.members:
            member, life = lives.adopt(replace(saved, since=now), self._actor(saved), now)
            self.members[saved.name], self.actors[saved.name] = member, life
