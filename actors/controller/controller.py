"""The controller brings the members of a fleet to what is wanted, watches and replaces them.

It keeps changes of the deployment and the watch loop. `reconciler` decides, `members` acts; the saved
state, the sizes of pools and the room in the cluster have an owner each.
"""

import logging
import os
import threading
import time

from actors.controller import actor_handles, fleet_view, recorder
from actors.controller.autoscaler import Autoscaler
from actors.controller.cluster_resources import ClusterResources, missing_room
from actors.controller.controller_state import ControllerState, StateStore
from actors.controller.fleet_view import Fleet
from actors.controller.members import Members
from actors.controller.reconciler import (
    ANSWER_TIMEOUT_S,
    Drain,
    End,
    Member,
    first_counts,
    is_late,
    is_satisfied,
    matching,
    next_counts,
    pool_of,
    reconcile,
    serves,
)
from actors.rpc.endpoints import ActorLocation
from actors.rpc.tls import warn_if_plaintext
from runtime.config import MAX_DRAFTERS, Deployment
from runtime.core.errors import InvalidRequest, OutriderError, Unavailable
from runtime.core.sampling_params import check_int
from runtime.telemetry.tracing import Recording

log = logging.getLogger(__name__)

PERIOD_S = 0.5  # between two looks at all members
SAMPLE_PERIOD_S = 5.0  # between two samples for pools that scale by themselves
SAVE_PERIOD_S = 60.0  # between two savings of what was learned
CRASH_EXIT_CODE = 70  # exit code


class Controller:
    """A Ray actor. Callers and one watching thread share it; who changes something holds the lock.

    If `served`, its actors are detached, with gateways, and it knows them again after its own restart,
    until `stop`. Else they end with it, and `prefix` keeps their names apart from others in the cluster.
    """

    def __init__(
        self, deployment: Deployment, prefix: str = "", served: bool = False, record: bool = False
    ) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        self.deployment, self.served, self.record = deployment, served, record
        self.counts = first_counts(deployment, gateways=served)
        # What was in force before each `apply` that is not ready yet, oldest first.
        self.fallbacks: list[tuple[Deployment, dict[str, int]]] = []
        self.members = Members(prefix, detached=served)
        self.autoscaler = Autoscaler()
        self.resources = ClusterResources()
        self.store = StateStore()
        self.changed = threading.Condition()
        self.stopping = threading.Event()
        self.watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        if served and (known := self.store.load()) is not None:
            self._resume(known)
            self.watcher.start()

    # What others ask for

    def start(self, timeout_s: float = actor_handles.START_TIMEOUT_S) -> Fleet:
        """Starts everything, once; returns when all of it is ready, and goes on watching.

        Raises what an actor's own start raised, and Unavailable if not all is ready in time.
        """
        if not self.watcher.is_alive():
            self.watcher.start()
        fleet = self._await_ready(timeout_s)
        nodes = [place.node for place in self.places().values()]
        warn_if_plaintext(nodes, self.deployment.security.tls)
        return fleet

    def fleet(self) -> Fleet:
        with self.changed:
            return self._fleet()

    def wanted(self) -> Deployment:
        """Returns the deployment that is in force."""
        return self.deployment

    def apply(
        self, deployment: Deployment, timeout_s: float = actor_handles.START_TIMEOUT_S
    ) -> Fleet:
        """Changes to this deployment without dropping a session; returns when all of it is ready.

        What is unchanged stays; what has changed starts anew before the old is drained. If something
        new does not start, the deployment before stays in force, and this raises as `start`.
        """
        with self.changed:
            self.fallbacks.append((self.deployment, self.counts))
            self.deployment = deployment
            self.counts = next_counts(deployment, self.counts, gateways=self.served)
            self.autoscaler.forget()
            self.members.retry({member.role for member in self.members.present})
            log.info("a deployment is applied")
        try:
            fleet = self._await_ready(timeout_s)
        except OutriderError:
            self._roll_back(deployment)
            raise
        with self.changed:
            self.fallbacks.clear()
        return fleet

    def scale(self, pool: str, count: int) -> Fleet:
        """Sets the number of drafters, also in place of those that were given up; returns at once.

        Raises InvalidRequest for an unknown pool, and for a count out of the pool's bounds.
        """
        with self.changed:
            config = pool_of(self.deployment, pool)
            check_int("count", count, 0, MAX_DRAFTERS)
            if not config.min <= count <= config.max:
                raise InvalidRequest(
                    f"pool {pool} has from {config.min} to {config.max} drafters, not {count}: change its min or max",
                    "count",
                )
            log.info("pool %s: %d -> %d drafters (asked for)", pool, self.counts[pool], count)
            self.counts = self.counts | {pool: count}
            self.members.retry({pool})
            return self._fleet()

    def drain(self, name: str) -> Fleet:
        """Lets this member finish and go, and wants one fewer of its role; returns at once.

        Raises InvalidRequest for an unknown name.
        """
        with self.changed:
            member = self.members.by_name.get(name)
            if member is None:
                known = ", ".join(sorted(self.members.by_name)) or "none"
                raise InvalidRequest(f"there is no {name!r}: give one of {known}", "actor")
            if member.state != "draining":
                self.counts = self.counts | {
                    member.role: max(0, self.counts.get(member.role, 0) - 1)
                }
                action = Drain(name, "asked for") if serves(member) else End(name, "asked for")
                self.members.act(action, time.monotonic())
            return self._fleet()

    def places(self) -> dict[str, ActorLocation]:
        """Returns where each member is now, without those that are starting."""
        with self.changed:
            return {
                member.name: member.place
                for member in self.members.present
                if member.place is not None
            }

    def recording(self, on: bool) -> None:
        """Switches the recording of targets and drafters, also of those that start later."""
        with self.changed:
            self.record = on
            handles = self.members.computing()
        recorder.set_recording(handles, on)

    def trace(self) -> list[Recording]:
        """Returns what targets and drafters have recorded since the last call.

        What a member had recorded before it was lost is missing.
        """
        with self.changed:
            handles = self.members.computing()
        return recorder.take_recordings(handles)

    def stop(self) -> None:
        """Ends every actor that this one started; returns when they were told.

        What they learned is saved if they answer in time.
        """
        self.stopping.set()
        self._save_calibrations(ANSWER_TIMEOUT_S)
        with self.changed:
            self.members.kill_all()
            if self.served:
                self.store.clear()
            self.resources.request([])

    # The loop

    def _watch(self) -> None:
        sampled = saved = time.monotonic()
        try:
            while not self.stopping.wait(PERIOD_S):
                with self.changed:
                    late = any(is_late(member, time.monotonic()) for member in self.members.present)
                self.resources.refresh(late)
                now = time.monotonic()
                with self.changed:
                    if self.stopping.is_set():
                        return
                    if now - sampled >= SAMPLE_PERIOD_S:
                        self._autoscale(now)
                        sampled = now
                    self._reconcile(now)
                    self.changed.notify_all()
                if now - saved > SAVE_PERIOD_S:
                    self._save_calibrations()
                    saved = now
        finally:
            if not self.stopping.is_set():  # nobody watches then: better a new controller
                log.critical("the controller ends by a fault of its own", exc_info=True)
                os._exit(CRASH_EXIT_CODE)

    def _reconcile(self, now: float) -> None:
        """Hears all members, decides, acts."""
        self.members.poll(self.resources, now)
        for action in reconcile(self.deployment, self.counts, self.members.present, now):
            self.members.act(action, now)
        self._save()
        self.members.create_actors(self.record)
        self.members.notify_targets()
        self.resources.request(missing_room(self.members.present, now))

    def _autoscale(self, now: float) -> None:
        members, reports = self.members.present, self.members.reports
        self.counts = self.autoscaler.resize(
            self.deployment.pools, self.counts, members, reports, now
        )

    def _save_calibrations(self, timeout_s: float = 0.0) -> None:
        with self.changed:
            handles = self.members.computing()
        recorder.save_calibrations(handles, timeout_s)

    # What it knows

    def _await_ready(self, timeout_s: float) -> Fleet:
        """Waits until all is ready that is wanted now."""
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while not self._is_ready():
                self.members.raise_failed_start(self._matching())
                if self.stopping.is_set():
                    raise Unavailable("the deployment was ended meanwhile: start it again")
                if not self.changed.wait(deadline - time.monotonic()):
                    raise Unavailable(
                        f"not ready within {timeout_s:g} s: {fleet_view.describe_unready(self.members.present)}"
                    )
            return self._fleet()

    def _is_ready(self) -> bool:
        """Tells whether as many as are wanted serve, and every target has taken in who drafts."""
        satisfied = is_satisfied(self.deployment, self.counts, self.members.present)
        return satisfied and self.members.targets_know_drafters(self._matching())

    def _matching(self) -> list[Member]:
        present = self.members.present
        return [
            member for role in self.counts for member in matching(self.deployment, role, present)
        ]

    def _fleet(self) -> Fleet:
        return fleet_view.build_fleet(
            self.deployment,
            self.counts,
            self.members.present,
            self.members.reports,
            self.autoscaler.decisions,
            self.members.replaced,
            time.monotonic(),
        )

    def _roll_back(self, failed: Deployment) -> None:
        """Restores the deployment before the failed one, unless a later one is in force already.

        A later one that fails too does not come back to a deployment that has failed.
        """
        with self.changed:
            if self.deployment is not failed:
                self.fallbacks = [kept for kept in self.fallbacks if kept[0] is not failed]
            elif self.fallbacks:
                self.deployment, self.counts = self.fallbacks.pop()
                log.info("rolled back to the deployment before")

    # Its own restart

    def _save(self) -> None:
        if self.served:
            members = tuple(map(fleet_view.without_volatile, self.members.present))
            lives, replaced = self.members.lives, self.members.replaced
            self.store.save(ControllerState(self.deployment, self.counts, members, lives, replaced))

    def _resume(self, known: ControllerState) -> None:
        log.info("the controller was restarted: it looks for %d members", len(known.members))
        self.deployment, self.counts = known.deployment, known.counts
        self.members.lives, self.members.replaced = known.lives, known.replaced
        now = time.monotonic()
        for saved in known.members:
            self.members.adopt(saved, now)
