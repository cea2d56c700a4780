"""Resizes the pools that scale automatically, one sample of the fleet's counters at a time."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from actors.controller.fleet_view import Reports
from actors.controller.reconciler import TARGET, Member, is_running, serves
from actors.fleet import scaling_policy
from actors.fleet.scaling_policy import Decision, Sample, ScalingState
from runtime.config import PoolConfig
from runtime.telemetry.reports import TargetReport

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Autoscaler:
    """Remembers the history of each pool.

    decisions  the last one of each pool that changed its size
    """

    decisions: dict[str, Decision] = field(default_factory=dict)
    _history: dict[str, ScalingState] = field(default_factory=dict)

    def forget(self) -> None:
        """Forgets all history, since the deployment has changed."""
        self._history = {}

    def resize(
        self,
        pools: Sequence[PoolConfig],
        counts: Mapping[str, int],
        members: Sequence[Member],
        reports: Reports,
        now: float,
    ) -> dict[str, int]:
        """Samples each pool that scales automatically; returns the new counts."""
        found = dict(counts)
        for pool in pools:
            if not pool.auto:
                continue
            known = self._history.get(pool.name)
            if known is None or known.count != counts[pool.name]:
                known = ScalingState(counts[pool.name])
            taken = take_sample(pool.name, members, reports, now)
            known, decision = scaling_policy.decide_size(
                pool.name, pool.min, pool.max, known, taken
            )
            self._history[pool.name] = known
            if decision is not None:
                log.info("%s", decision)
                self.decisions[pool.name] = decision
                found[pool.name] = decision.after
        return found


def take_sample(pool: str, members: Sequence[Member], reports: Reports, now: float) -> Sample:
    """Returns the counters of all running targets together, from the view of one pool."""
    drafters = {member.name: member for member in members if member.role == pool}
    targets = [
        report
        for member in members
        if member.role == TARGET
        and is_running(member)
        and isinstance(report := reports.get(member.name), TargetReport)
    ]
    return Sample(
        at=now,
        ready=sum(map(serves, drafters.values())),
        steps=sum(report.steps for report in targets),
        rounds=sum(report.rounds for report in targets),
        accepted=sum(report.accepted for report in targets),
        own=sum(
            guess.accepted
            for report in targets
            for name, guess in report.guesses.items()
            if name in drafters
        ),
        busy=sum(report.computed + report.waited + report.bookkeeping for report in targets),
    )
