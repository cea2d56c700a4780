"""Lists the simulations that a plan compares: schedules, drafter counts, round trips and loads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from runtime.config import ScheduleConfig
from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.schedulers.pearl import gamma
from runtime.sim.forecast import Forecast, Setting, forecast
from runtime.sim.pair_profile import PairProfile
from runtime.sim.replayed_head import HeadProfile

CHAIN_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12)
TREE_SHAPES = (
    (2, 2, 4, 8),
    (4, 2, 4, 12),
    (4, 4, 4, 16),
    (4, 2, 6, 16),
    (4, 4, 8, 24),
    (8, 4, 6, 32),
)  # width, branches, passes, rows
SCHEDULES = ("plain", "sync chain", "sync tree", "amusd", "pearl", "living")
DRAFTERS = (1, 2, 4, 8, 16, 32, 64)
ROUND_TRIPS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)  # seconds
SESSIONS = (1, 4, 16, 64, 256, 1000)
LOAD_SCHEDULES = (
    "plain",
    "living",
)  # swept over loads; the other schedules serve one session
GOOD_ENOUGH = 0.97  # share of the best rate that a smaller number of drafters must reach
TUNING_TOKENS = 200  # per simulation that only chooses a setting


@dataclass(frozen=True, slots=True)
class Job:
    """One simulation. `group` and `label` say where its outcome belongs."""

    group: str
    schedule: str
    label: float
    profile: PairProfile
    config: ScheduleConfig
    setting: Setting

    @property
    def dedup_key(self) -> tuple[object, ...]:
        """Return a key that is equal for simulations with the same outcome.

        Sessions that wait for a full target do not change the outcome.
        """
        most = limits.SESSIONS * self.setting.targets
        return (
            id(self.profile),
            self.config,
            replace(self.setting, sessions=min(self.setting.sessions, most)),
        )

    @property
    def effort(self) -> int:
        """Return an estimate that grows with the time of the simulation."""
        return self.setting.sessions * self.setting.drafters

    def run(self) -> Forecast:
        return forecast(self.profile, self.config, self.setting)


Done = tuple[Job, Forecast]
RunAll = Callable[[Sequence[Job]], list[Forecast]]  # results in the order of the jobs


def settings(name: str, profile: PairProfile) -> list[ScheduleConfig]:
    """Return all settings of a schedule to try. Raises InvalidRequest for an unknown name."""
    match name:
        case "plain" | "amusd" | "living":
            return [ScheduleConfig.model_validate({"policy": name})]
        case "pearl":
            return [
                ScheduleConfig(
                    policy="pearl",
                    passes=gamma(profile.target[1], profile.draft[1] + profile.pass_),
                )
            ]
        case "sync chain":
            return [
                ScheduleConfig(policy="sync", width=1, branches=1, passes=k, rows=k)
                for k in CHAIN_LENGTHS
            ]
        case "sync tree":
            return [
                ScheduleConfig(policy="sync", width=w, branches=b, passes=p, rows=n)
                for w, b, p, n in TREE_SHAPES
            ]
    raise InvalidRequest(
        f"schedule {name!r} is not known: give one of {', '.join(SCHEDULES)}", "schedule"
    )


def best_settings(
    profile: PairProfile, names: Sequence[str], setting: Setting, run_all: RunAll
) -> dict[str, ScheduleConfig]:
    """Find the best setting of each schedule with short simulations."""
    short = replace(setting, tokens=TUNING_TOKENS)
    tried = {name: settings(name, profile) for name in names}
    jobs = [
        Job("settings", name, number, profile, config, short)
        for name, configs in tried.items()
        if len(configs) > 1
        for number, config in enumerate(configs)
    ]
    best = {name: configs[0] for name, configs in tried.items()}
    reached = dict.fromkeys(names, 0.0)
    for job, found in zip(jobs, run_all(jobs), strict=True):
        if found.tokens_per_second > reached[job.schedule]:
            best[job.schedule], reached[job.schedule] = job.config, found.tokens_per_second
    return best


def jobs(profile: PairProfile, configs: dict[str, ScheduleConfig], setting: Setting) -> list[Job]:
    """Return each schedule as it is, over round trips, and for some schedules over drafters and
    load.
    """
    found = [
        Job("schedules", name, 0, profile, config, setting) for name, config in configs.items()
    ]
    for name, config in configs.items():
        if name == "living":
            found += [
                Job("drafters", name, count, profile, config, replace(setting, drafters=count))
                for count in DRAFTERS
            ]
        if name != "plain":
            found += [
                Job(
                    "round trips",
                    name,
                    rtt,
                    profile.model_copy(update={"rtt": rtt}),
                    config,
                    setting,
                )
                for rtt in ROUND_TRIPS
            ]
        if name in LOAD_SCHEDULES:
            found += [
                Job("load", name, count, profile, config, replace(setting, sessions=count))
                for count in SESSIONS
            ]
    return found


def head_jobs(profile: PairProfile, heads: Sequence[HeadProfile], setting: Setting) -> list[Job]:
    """Return jobs for each head without drafters and together with them."""
    living = ScheduleConfig()
    with_drafters = [
        Job("heads", "living", number, profile, living, replace(setting, head=head))
        for number, head in enumerate(heads)
    ]
    return [
        replace(job, group="heads alone", setting=replace(job.setting, drafters=0))
        for job in with_drafters
    ] + with_drafters


def with_half_draft_time(profile: PairProfile) -> PairProfile:
    """Return the profile with the same guesses in half the time.

    It shows the value of a draft with half the layers and the same quality.
    """
    return profile.model_copy(
        update={"draft": {rows: seconds / 2 for rows, seconds in profile.draft.items()}}
    )


def fewest_drafters(by_drafters: dict[float, float]) -> int:
    """Return the smallest number of drafters that comes close to the best rate."""
    best = max(by_drafters.values())
    return int(min(count for count, rate in by_drafters.items() if rate >= GOOD_ENOUGH * best))
