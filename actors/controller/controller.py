"""Controls a fleet: starts, watches and replaces its members, and changes its deployment.

`reconciler` decides and `members` acts. The saved state, the pool sizes and the cluster's resources
have a class each.
"""

import logging
import os
import threading
import time

from actors.controller import actor_handles, fleet_view, recorder
from actors.controller.autoscaler import Autoscaler
from actors.controller.cluster_resources import ClusterResources, missing_room
from actors.controller.controller_state import ControllerState, StateStore
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
from actors.fleet.fleet_state import Fleet
from actors.rpc.endpoints import ActorLocation
from actors.rpc.tls import warn_if_plaintext
from runtime.config import MAX_DRAFTERS, Deployment
from runtime.core.errors import InvalidRequest, OutriderError, Unavailable
from runtime.core.sampling_params import check_int
from runtime.telemetry.tracing import Recording

log = logging.getLogger(__name__)

PERIOD_S = 0.5  # between two polls of all members
SAMPLE_PERIOD_S = 5.0  # between two samples for the autoscaler
SAVE_PERIOD_S = 60.0  # between two savings of calibrations
CRASH_EXIT_CODE = 70  # exit code


class Controller:
    """A Ray actor. Its callers and its watching thread share the state under one lock.

    If `served`, its actors are detached, gateways are started, and the state survives a restart of
    the controller until `stop`. Otherwise the actors end with the controller, and `prefix` keeps
    their names unique in the cluster.
    """

    def __init__(
        self, deployment: Deployment, prefix: str = "", served: bool = False, record: bool = False
    ) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        self.deployment, self.served, self.record = deployment, served, record
        self.counts = first_counts(deployment, gateways=served)
        # The deployment before each pending `apply`, oldest first.
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

    # Methods for callers

    def start(self, timeout_s: float = actor_handles.START_TIMEOUT_S) -> Fleet:
        """Starts all members, once; returns when all are ready, and keeps watching them.

        Raises the error of an actor's start, and Unavailable if not all members are ready in time.
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
        """Returns the current deployment."""
        return self.deployment

    def apply(
        self, deployment: Deployment, timeout_s: float = actor_handles.START_TIMEOUT_S
    ) -> Fleet:
        """Changes to this deployment without dropping a session; returns when all is ready.

        Unchanged members stay; changed ones start again before the old ones are drained. If a new
        member does not start, the deployment before is restored, and this raises as `start` does. A
        later `apply` supersedes this one; then nothing is restored.
        """
        with self.changed:
            self.fallbacks.append((self.deployment, self.counts))
            self.deployment = deployment
            self.counts = next_counts(deployment, self.counts, gateways=self.served)
            self.autoscaler.forget()
            self.members.retry({member.role for member in self.members.present})
            log.info("applying a deployment")
        try:
            fleet = self._await_ready(timeout_s)
        except OutriderError:
            self._roll_back(deployment)
            raise
        with self.changed:
            self.fallbacks.clear()
        return fleet

    def scale(self, pool: str, count: int) -> Fleet:
        """Sets the number of drafters in a pool, retries failed ones, and returns at once.

        Raises InvalidRequest if the pool is unknown, or the count is outside its bounds.
        """
        with self.changed:
            config = pool_of(self.deployment, pool)
            check_int("count", count, 0, MAX_DRAFTERS)
            if not config.min <= count <= config.max:
                raise InvalidRequest(
                    f"count {count} is out of bounds: pool {pool} has min {config.min} and max "
                    f"{config.max}; change them",
                    "count",
                )
            log.info("pool %s: %d -> %d drafters (requested)", pool, self.counts[pool], count)
            self.counts = self.counts | {pool: count}
            self.members.retry({pool})
            return self._fleet()

    def drain(self, name: str) -> Fleet:
        """Drains this member and reduces the count of its role by one; returns at once.

        Raises InvalidRequest if the name is unknown.
        """
        with self.changed:
            member = self.members.by_name.get(name)
            if member is None:
                known = ", ".join(sorted(self.members.by_name)) or "none"
                raise InvalidRequest(f"unknown actor {name!r}: give one of {known}", "actor")
            if member.state != "draining":
                self.counts = self.counts | {
                    member.role: max(0, self.counts.get(member.role, 0) - 1)
                }
                action = Drain(name, "requested") if serves(member) else End(name, "requested")
                self.members.act(action, time.monotonic())
            return self._fleet()

    def places(self) -> dict[str, ActorLocation]:
        """Returns the location of each member that has started."""
        with self.changed:
            return {
                member.name: member.place
                for member in self.members.present
                if member.place is not None
            }

    def recording(self, on: bool) -> None:
        """Switches recording in targets and drafters on or off, also in those that start later."""
        with self.changed:
            self.record = on
            handles = self.members.computing()
        recorder.set_recording(handles, on)

    def trace(self) -> list[Recording]:
        """Returns the recordings of targets and drafters since the last call.

        The recording of a lost member is missing.
        """
        with self.changed:
            handles = self.members.computing()
        return recorder.take_recordings(handles)

    def stop(self) -> None:
        """Kills all actors of this controller.

        Calibrations are saved if the actors answer in time.
        """
        self.stopping.set()
        self._save_calibrations(ANSWER_TIMEOUT_S)
        with self.changed:
            self.members.kill_all()
            if self.served:
                self.store.clear()
            self.resources.request([])

    # The watch loop

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
            if not self.stopping.is_set():  # nobody would watch: Ray restarts the controller
                log.critical("the controller has failed", exc_info=True)
                os._exit(CRASH_EXIT_CODE)

    def _reconcile(self, now: float) -> None:
        """Polls all members, decides, acts."""
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

    # State

    def _await_ready(self, timeout_s: float) -> Fleet:
        """Waits until all wanted members are ready."""
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while not self._is_ready():
                self.members.raise_failed_start(self._matching())
                if self.stopping.is_set():
                    raise Unavailable("the deployment was stopped meanwhile: start it again")
                if not self.changed.wait(deadline - time.monotonic()):
                    raise Unavailable(
                        f"not ready within {timeout_s:g} s: "
                        f"{fleet_view.describe_unready(self.members.present)}"
                    )
            return self._fleet()

    def _is_ready(self) -> bool:
        """Tells whether all wanted members serve, and every target knows its drafters."""
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
        """Restores the deployment before the failed one, unless a later one is current already.

        If the later one fails too, it does not restore a failed deployment.
        """
        with self.changed:
            if self.deployment is not failed:
                self.fallbacks = [kept for kept in self.fallbacks if kept[0] is not failed]
            elif self.fallbacks:
                self.deployment, self.counts = self.fallbacks.pop()
                log.info("rolled back to the deployment before")

    # Restart of the controller

    def _save(self) -> None:
        if self.served:
            members = tuple(map(fleet_view.without_volatile, self.members.present))
            lives, replaced = self.members.lives, self.members.replaced
            self.store.save(ControllerState(self.deployment, self.counts, members, lives, replaced))

    def _resume(self, known: ControllerState) -> None:
        log.info("the controller was restarted; looking for %d members", len(known.members))
        self.deployment, self.counts = known.deployment, known.counts
        self.members.lives, self.members.replaced = known.lives, known.replaced
        now = time.monotonic()
        for saved in known.members:
            self.members.adopt(saved, now)
