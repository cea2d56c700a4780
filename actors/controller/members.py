"""Holds the members of a fleet and their actors: polls them, and carries out decisions."""

import logging
from collections.abc import Collection
from dataclasses import replace

from actors.controller import actor_handles
from actors.controller.actor_handles import ActorHandle
from actors.controller.cluster_resources import ClusterResources
from actors.controller.fleet_view import Reports
from actors.controller.reconciler import (
    MAX_WAITED_FAILURES,
    TARGET,
    Action,
    Drain,
    End,
    GiveUp,
    Member,
    Replace,
    Start,
    drafter_endpoints,
    drafts,
    is_running,
    reset_failures,
    serves,
)
from runtime.core.errors import Unavailable

log = logging.getLogger(__name__)


class Members:
    """Belongs to one controller, whose lock the caller holds. Nothing in it blocks.

    by_name   the members
    handles   their actors; a new member has none until `create_actors`
    lives     number of lives of each name
    replaced  members that were lost and restarted
    """

    def __init__(self, prefix: str, detached: bool) -> None:
        self.prefix, self.detached = prefix, detached
        self.by_name: dict[str, Member] = {}
        self.handles: dict[str, ActorHandle] = {}
        self.lives: dict[str, int] = {}
        self.replaced = 0

    @property
    def present(self) -> tuple[Member, ...]:
        return tuple(self.by_name.values())

    @property
    def reports(self) -> Reports:
        return {name: handle.report for name, handle in self.handles.items()}

    def computing(self) -> list[ActorHandle]:
        """Returns the running targets, then the running drafters."""
        running = [member for member in self.present if is_running(member)]
        targets = [member for member in running if member.role == TARGET]
        pools = dict.fromkeys(member.role for member in running if drafts(member))
        drafters = [member for pool in pools for member in running if member.role == pool]
        return [self.handles[member.name] for member in (*targets, *drafters)]

    def poll(self, resources: ClusterResources, now: float) -> None:
        """Takes in the answers of the actors, and Ray's answers about their nodes."""
        last_heard = max((handle.heard_at for handle in self.handles.values()), default=0.0)
        for before in self.present:
            found = actor_handles.poll(before, self.handles[before.name], last_heard, now)
            found = replace(
                found,
                leaves=resources.leaves(found),
                unschedulable=resources.is_unschedulable(found),
            )
            if found.lost and not before.lost:
                log.warning("%s is lost: %s", found.name, found.lost)
            elif found.state != before.state:
                log.info("%s is %s", found.name, found.state)
            self.by_name[found.name] = found

    def act(self, action: Action, now: float) -> None:
        match action:
            case Start(role, index, spec):
                self._begin(Member(f"{role}-{index}", role, index, 0, spec, "starting", now))
            case Replace(name):
                self._replace(self.by_name[name], now)
            case GiveUp(name):
                lost = self.by_name[name]
                log.error(
                    "%s is given up after %d failures in a row, the last: %s",
                    name,
                    lost.failures,
                    lost.lost,
                )
                actor_handles.kill(lost, self.handles[name])
                self.by_name[name] = replace(lost, state="failed")
            case Drain(name, why):
                self._drain(self.by_name[name], why)
            case End(name, why):
                log.info("%s ends: %s", name, why)
                actor_handles.kill(self.by_name.pop(name), self.handles.pop(name))

    def _begin(self, member: Member) -> None:
        incarnation = self.lives.get(member.name, 0)
        self.lives[member.name] = incarnation + 1
        self.by_name[member.name] = replace(member, incarnation=incarnation)
        log.info("%s starts (life %d)", member.name, incarnation)

    def _replace(self, lost: Member, now: float) -> None:
        self.replaced += lost.place is not None
        actor_handles.kill(lost, self.handles.pop(lost.name))
        started = Member(lost.name, lost.role, lost.index, 0, lost.spec, "starting", now)
        self._begin(replace(started, failures=lost.failures, restarts=lost.restarts + 1))

    def _drain(self, member: Member, why: str) -> None:
        handle = self.handles[member.name]
        log.info("%s is drained: %s", member.name, why)
        if drafts(member):
            handle.actor.save_calibrations.remote()  # it ends when no target uses it any more
        else:
            handle.draining = handle.actor.drain.remote()
        self.by_name[member.name] = replace(member, state="draining")

    def create_actors(self, record: bool) -> None:
        """Creates the actors of new members. The caller has saved these members before."""
        for name in self.by_name.keys() - self.handles.keys():
            member = self.by_name[name]
            self.handles[name] = actor_handles.create(
                member, self._actor_name(member), self.detached, record
            )

    def adopt(self, saved: Member, now: float) -> None:
        """Takes over a member of the controller before this one."""
        found, handle = actor_handles.adopt(replace(saved, since=now), self._actor_name(saved), now)
        self.by_name[saved.name], self.handles[saved.name] = found, handle

    def _actor_name(self, member: Member) -> str:
        """Returns a name per life, since Ray may keep the name of a lost actor for a while."""
        return f"{self.prefix}{member.name}-{member.incarnation}"

    def notify_targets(self) -> None:
        """Sends every target its drafters. A draining drafter ends once no target uses it."""
        endpoints = drafter_endpoints(self.present)
        targets = [
            self.handles[member.name]
            for member in self.present
            if member.role == TARGET and is_running(member)
        ]
        for handle in targets:
            actor_handles.notify_drafters(handle, endpoints)
        for member in self.present:
            if drafts(member) and member.state == "draining":
                named = any(may_ask(handle, member.name) for handle in targets)
                self.by_name[member.name] = replace(member, drained=not named)

    def targets_know_drafters(self, members: Collection[Member]) -> bool:
        """Tells whether the serving targets among these have acknowledged the drafters."""
        endpoints = drafter_endpoints(self.present)
        targets = [member for member in members if member.role == TARGET and serves(member)]
        return all(self.handles[member.name].acknowledged == endpoints for member in targets)

    def raise_failed_start(self, members: Collection[Member]) -> None:
        """Raises the error of a failed start; Unavailable if a member fails repeatedly."""
        for member in members:
            if (failure := self.handles[member.name].failure) is not None:
                raise failure
            if member.lost and member.failures >= MAX_WAITED_FAILURES:
                raise Unavailable(
                    f"{member.name}: {member.lost}, {member.failures} times: see `outrider logs "
                    f"{member.name}`"
                )

    def retry(self, roles: Collection[str]) -> None:
        """Lets lost members of these roles restart at once, also those that were given up."""
        for member in self.present:
            if member.role in roles and member.lost:
                self.by_name[member.name] = reset_failures(member)
                self.handles[member.name].failure = None

    def kill_all(self) -> None:
        for member in self.present:
            actor_handles.kill(member, self.handles[member.name])


def may_ask(handle: ActorHandle, drafter: str) -> bool:
    """Tells whether the target may still use this drafter."""
    known = handle.acknowledged
    return known is None or drafter in {endpoint.name for endpoint in known}
