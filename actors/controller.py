"""The controller: starts target and drafters by name, watches them, replaces drafters, and tells the target who is there."""

import contextlib
import logging
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.draft import DraftActor
from actors.peers import Peer, Place
from actors.target import TargetActor
from runtime.config import Deployment, DrafterConfig, Placement
from runtime.errors import Unavailable
from runtime.tracing import Recording

log = logging.getLogger(__name__)

PERIOD = 0.5  # seconds between two looks at a drafter
PATIENCE = 2.0  # seconds without an answer after which it is replaced
KEEP = 60.0  # seconds between two savings of what was learned
START = 180.0  # seconds that an actor may take to start and load its model


@dataclass(slots=True)
class Drafter:
    """One drafter's present life."""

    config: DrafterConfig
    incarnation: int
    handle: Any  # Ray's, untyped
    answer: Any  # to `start`, then to `where`, asked again after each
    asked: float
    place: Place | None = None


class Controller:
    """A Ray actor. Its actors end with it. Threads: the one that calls it, and one that watches."""

    def __init__(self, deployment: Deployment, names: str, record: bool = False) -> None:
        self.deployment, self.names, self.record = deployment, names, record
        self.drafters: dict[str, Drafter] = {}
        self.replaced = 0
        self.stopping = threading.Event()
        self.watcher = threading.Thread(target=self._watch, name="watch", daemon=True)

    def start(self) -> str:
        """Starts everything; returns the target's gRPC address when all of it is ready.

        Raises what an actor's own start raised, and Unavailable where the cluster has no room for it.
        """
        target = self.deployment.target
        self.target = options(TargetActor, f"{self.names}-target", target.placement).remote(target, self.record)
        for config in self.deployment.drafters:
            self.drafters[config.name] = self._new(config, incarnation=0)
        ready = first_answer("target", self.target.start.remote())
        for name, drafter in self.drafters.items():
            drafter.place = first_answer(f"drafter {name}", drafter.answer)
            drafter.answer, drafter.asked = drafter.handle.where.remote(), time.monotonic()
        self._publish()
        self.watcher.start()
        return ready.address

    def places(self) -> dict[str, Place]:
        """Where each drafter is now; those that are starting are left out."""
        return {name: drafter.place for name, drafter in self.drafters.items() if drafter.place is not None}

    def status(self) -> dict[str, Any]:
        """For people: who is there, who is attached, how many lives were lost."""
        attached = ray.get(self.target.attached.remote(), timeout=PATIENCE)
        return {"drafters": sorted(self.places()), "attached": sorted(attached), "replaced": self.replaced}

    def trace(self) -> list[Recording]:
        """What target and drafters have recorded since the last call. What a drafter had recorded before it was lost is missing."""
        answers = [handle.trace.remote() for handle in self._actors()]
        answered, _ = ray.wait(answers, num_returns=len(answers), timeout=PATIENCE)
        return ray.get(answered)  # type: ignore[no-any-return]

    def stop(self) -> None:
        """Ends every actor that this one started; returns when they were told. What they learned is kept, if they answer in time."""
        self.stopping.set()
        self._remember()
        for handle in self._actors():
            ray.kill(handle)

    def _actors(self) -> list[Any]:
        return [self.target, *(drafter.handle for drafter in self.drafters.values())]

    def _remember(self) -> None:
        answers = [handle.remember.remote() for handle in self._actors()]
        ray.wait(answers, num_returns=len(answers), timeout=PATIENCE)

    def _new(self, config: DrafterConfig, incarnation: int) -> Drafter:
        name = f"{self.names}-{config.name}-{incarnation}"
        handle = options(DraftActor, name, config.placement).remote(config, self.deployment.target.model, incarnation, self.record)
        return Drafter(config, incarnation, handle, handle.start.remote(), time.monotonic())

    def _watch(self) -> None:
        remembered = time.monotonic()
        while not self.stopping.wait(PERIOD):
            if time.monotonic() - remembered > KEEP:
                self._remember()
                remembered = time.monotonic()
            for name, drafter in tuple(self.drafters.items()):
                self._look(name, drafter)
            with contextlib.suppress(RayError):  # a target that is gone is its callers' to notice
                self._publish()

    def _look(self, name: str, drafter: Drafter) -> None:
        """Take its answer, or replace it where there is none in time."""
        now = time.monotonic()
        answered, _ = ray.wait([drafter.answer], timeout=0)
        if answered:
            try:
                drafter.place = ray.get(drafter.answer)
                drafter.answer, drafter.asked = drafter.handle.where.remote(), now
            except RayError as error:
                self._replace(name, drafter, str(error).splitlines()[0])
        elif now - drafter.asked > (PATIENCE if drafter.place else START):
            self._replace(name, drafter, f"no answer for {now - drafter.asked:.1f} s")

    def _replace(self, name: str, drafter: Drafter, why: str) -> None:
        log.warning("drafter %s is replaced: %s", name, why)
        self.replaced += 1
        with contextlib.suppress(RayError):
            ray.kill(drafter.handle)
        if drafter.place is not None:
            # A stopped process does not hear Ray, and holds its device until it is gone.
            there = NodeAffinitySchedulingStrategy(drafter.place.node, soft=True)
            ray.remote(end_process).options(num_cpus=0, scheduling_strategy=there).remote(drafter.place.pid)
        self.drafters[name] = self._new(drafter.config, drafter.incarnation + 1)

    def _publish(self) -> None:
        """Tell the target, whenever asked: telling it twice changes nothing."""
        peers = [Peer(name, place.address, self.drafters[name].incarnation) for name, place in self.places().items()]
        ray.get(self.target.drafters.remote(peers), timeout=PATIENCE)


def end_process(pid: int) -> None:
    """SIGKILL to a drafter's process on this node, if it is still one."""
    with contextlib.suppress(OSError):
        if b"DraftActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


def options(actor: type, name: str, placement: Placement) -> Any:
    """The Ray actor class with its name and what it takes from the cluster."""
    resources = dict(placement.resources)
    if placement.node:
        resources[f"node:{placement.node}"] = 0.001
    return ray.remote(actor).options(
        name=name,
        num_cpus=placement.num_cpus,
        num_gpus=placement.num_gpus,
        resources=resources,
        max_restarts=0,
        max_concurrency=2,
    )


def first_answer(what: str, answer: Any) -> Place:
    """The place of an actor that starts. Raises the actor's own error; Unavailable where it does not start at all."""
    answered, _ = ray.wait([answer], timeout=START)
    if not answered:
        raise Unavailable(f"{what} did not start within {START:g} s: the cluster has no room for it, or its node is too slow")
    try:
        place = ray.get(answer)
    except RayTaskError as error:
        raise error.cause from error
    if not isinstance(place, Place):
        raise Unavailable(f"{what} answered {place!r} and not its place: install the same version on all nodes")
    return place
