"""Builds a scheduler from its configuration."""

from collections.abc import Mapping

from runtime.config import ScheduleConfig
from runtime.schedulers.amusd import Amusd
from runtime.schedulers.base import Scheduler
from runtime.schedulers.living import Living
from runtime.schedulers.pearl import Pearl
from runtime.schedulers.plain import Plain
from runtime.schedulers.sync import Sync


def make_scheduler(config: ScheduleConfig, times: Mapping[int, float]) -> Scheduler:
    """Build the configured policy.

    `times` maps the rows of a pass to its seconds (T). A drafter's step is assumed to take a
    quarter of T(1) until one has been measured.
    """
    t = times[1] / 4
    match config.policy:
        case "living":
            return Living(times)
        case "plain":
            return Plain()
        case "sync":
            return Sync(config.width, config.branches, config.passes, config.rows, t)
        case "amusd":
            return Amusd(t)
        case "pearl":
            return Pearl(config.passes, t)
