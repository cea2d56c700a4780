"""Shows a plan as tables, recommendations and a picture, or formats it as a JSON object."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from runtime.config import ScheduleConfig
from runtime.core.errors import InvalidRequest
from runtime.sim import draft_samples
from runtime.sim.forecast import Forecast, Setting
from runtime.sim.pair_profile import PairProfile
from runtime.sim.simulator import interpolate
from runtime.sim.sweep import Done, fewest_drafters

# The label of what varies in a group, and the format of its values.
SWEEPS: dict[str, tuple[str, Callable[[float], str]]] = {
    "drafters": ("drafters", "{:g}".format),
    "round trips": ("round trip, ms", lambda seconds: f"{1e3 * seconds:g}"),
    "load": ("sessions", "{:g}".format),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The forecasts for several drafts. All groups but "schedules" are about the `fastest`."""

    drafts: tuple[PairProfile, ...]
    fastest: PairProfile
    setting: Setting
    done: tuple[Done, ...]

    def of(self, group: str, draft: PairProfile | None = None) -> list[Done]:
        return [
            done
            for done in self.done
            if done[0].group == group and draft in (None, done[0].profile)
        ]

    def rates(self, group: str) -> dict[str, dict[float, float]]:
        """Returns tokens per second by schedule and value."""
        found: dict[str, dict[float, float]] = {}
        for job, forecast in self.of(group):
            found.setdefault(job.schedule, {})[job.label] = forecast.tokens_per_second
        return found

    def plain(self, draft: PairProfile) -> float | None:
        return next(
            (
                found.tokens_per_second
                for job, found in self.of("schedules", draft)
                if job.schedule == "plain"
            ),
            None,
        )


def plan_tables(plan: Plan) -> list[Table]:
    found = [schedule_table(plan, draft) for draft in plan.drafts]
    found += [head_table(plan)] if plan.of("heads") else []
    return found + [sweep_table(plan, group) for group in SWEEPS if plan.of(group)]


def titled_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))


def schedule_table(plan: Plan, draft: PairProfile) -> Table:
    examples, setting = draft_samples.samples_of(draft), plan.setting
    rates = ", ".join(f"{examples.rate(k):.2f}" for k in (1, 2, 4, 8))
    found = titled_table(
        f"{draft.name}: T(1) {1e3 * draft.target[1]:.1f} ms, t(1) {1e3 * draft.draft[1]:.1f} ms, "
        f"c {draft.target[1] / draft.draft[1]:.1f}, acceptance of 1, 2, 4, 8 guesses {rates}, "
        f"round trip {1e3 * draft.rtt:g} ms; "
        f"sessions {setting.sessions}, drafters {setting.drafters}, targets {setting.targets}"
    )
    found.add_column("schedule")
    for name in ("tokens/s", "/ plain", "tokens/step", "rows", "hits", "waiting"):
        found.add_column(name, justify="right")
    plain = plan.plain(draft)
    for job, seen in plan.of("schedules", draft):
        rate = seen.tokens_per_second
        faster = f"{rate / plain:.2f}" if plain else "-"
        figures = (
            f"{rate:.1f}",
            faster,
            f"{seen.tokens_per_round:.2f}",
            f"{seen.rows:.1f}",
            f"{seen.hits:.0%}",
            f"{seen.waiting:.0%}",
        )
        found.add_row(schedule_label(job.schedule, job.config), *figures)
    return found


def head_table(plan: Plan) -> Table:
    """Returns the forecasts for heads of the target under the living schedule."""
    found = titled_table(
        "heads on the target, living: extra ms per step, acceptance by place ahead, tokens/s"
    )
    found.add_column("head", no_wrap=True)
    for name in ("ms", "1st", "2nd", "3rd", "alone", f"with {plan.fastest.name}", "/ without"):
        found.add_column(name, justify="right")
    without = living_forecasts(plan)[plan.fastest.name].tokens_per_second
    for (job, both), (_, alone) in zip(plan.of("heads"), plan.of("heads alone"), strict=True):
        head = job.setting.head
        if head is not None:
            rights = (f"{head.hit_rate(ahead):.2f}" for ahead in (1, 2, 3))
            rates = (
                f"{alone.tokens_per_second:.1f}",
                f"{both.tokens_per_second:.1f}",
                f"{both.tokens_per_second / without:.2f}",
            )
            found.add_row(head.name, f"{1e3 * head.seconds:.2f}", *rights, *rates)
    return found


def living_forecasts(plan: Plan) -> dict[str, Forecast]:
    """Returns the forecasts of the living schedule without heads, by drafter."""
    return {
        job.profile.name: seen for job, seen in plan.of("schedules") if job.schedule == "living"
    }


def schedule_label(schedule: str, config: ScheduleConfig) -> str:
    match schedule:
        case "sync chain":
            return f"sync chain of {config.passes}"
        case "sync tree":
            leaves = f"{config.width} leaves x {config.branches}"
            return f"sync tree, {config.passes} passes of {leaves}, {config.rows} rows"
        case "pearl":
            return f"pearl, gamma {config.passes}"
    return schedule


def sweep_table(plan: Plan, group: str) -> Table:
    rates, (what, written) = plan.rates(group), SWEEPS[group]
    values = sorted({value for by_value in rates.values() for value in by_value})
    found = titled_table(
        f"tokens/s by {group}" + (", all sessions together" if group == "load" else "")
    )
    found.add_column(what)
    for value in values:
        found.add_column(written(value), justify="right")
    for schedule, by_value in rates.items():
        found.add_row(
            schedule, *(f"{by_value[value]:.1f}" if value in by_value else "-" for value in values)
        )
    return found


def recommendations(plan: Plan) -> list[str]:
    """Returns one sentence for each recommendation; none without the living schedule."""
    by_drafter = living_forecasts(plan)
    if not by_drafter:
        return []
    seen, best = by_drafter[plan.fastest.name], plan.fastest
    others = "".join(
        f", {name} {other.tokens_per_second:.1f}"
        for name, other in by_drafter.items()
        if other is not seen
    )
    half = next(found for job, found in plan.of("half as deep"))
    by_drafters = plan.rates("drafters")["living"]
    count = fewest_drafters(by_drafters)
    time = interpolate(best.target)
    return [
        f"Draft: {best.name}, {seen.tokens_per_second:.1f} tokens/s{others}; with half the layers "
        f"and the same acceptance, {half.tokens_per_second:.1f}: depth costs latency, width hardly "
        "does (arXiv 2402.01528).",
        f"Rows: {seen.rows:.0f} per step on average; such a step takes "
        f"{time(round(seen.rows)) / time(1):.2f} times as long as one with a single row, and "
        f"yields {seen.tokens_per_round:.2f} tokens.",
        f"Drafters: {count}, {by_drafters[count]:.1f} tokens/s; one yields {by_drafters[1]:.1f}, "
        f"{max(by_drafters):g} yield {by_drafters[max(by_drafters)]:.1f}.",
        *head_recommendation(plan, seen),
    ]


def head_recommendation(plan: Plan, without: Forecast) -> list[str]:
    """Returns a sentence about the best head, alone or with the fastest drafter."""
    tried = [
        (seen, f"{job.setting.head.name} alone")
        for job, seen in plan.of("heads alone")
        if job.setting.head
    ]
    tried += [
        (seen, f"{job.setting.head.name} with {plan.fastest.name}")
        for job, seen in plan.of("heads")
        if job.setting.head
    ]
    if not tried:
        return []
    seen, name = max(tried, key=lambda one: one[0].tokens_per_second)
    gain = seen.tokens_per_second / without.tokens_per_second
    verdict = name if gain > 1.0 else f"none; the best, {name}, would be slower"
    return [
        f"Head: {verdict}: {seen.tokens_per_second:.1f} tokens/s, "
        f"{gain:.2f} times {plan.fastest.name} alone."
    ]


def plan_json(plan: Plan) -> dict[str, Any]:
    """Returns the object of --json; --measured reads its "measured" entries."""
    return {
        "measured": [draft.model_dump(by_alias=True) for draft in plan.drafts],
        "setting": asdict(plan.setting),
        "forecasts": [
            {
                "group": job.group,
                "draft": job.profile.name,
                "schedule": job.schedule,
                "config": job.config.model_dump(),
                "drafters": job.setting.drafters,
                "head": job.setting.head.name if job.setting.head else None,
                "sessions": job.setting.sessions,
                "rtt": job.profile.rtt,
                **asdict(seen),
            }
            for job, seen in plan.done
        ],
        "recommended": recommendations(plan),
    }


def plot_plan(plan: Plan, file: Path) -> None:
    """Draws the forecast into a PNG file. Raises InvalidRequest if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 8.5), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    figure.suptitle(f"Forecast for {plan.fastest.name}: tokens per second", x=0.01, ha="left")
    done = plan.of("schedules", plan.fastest)
    bars = axes[0].barh(
        [job.schedule for job, _ in done],
        [seen.tokens_per_second for _, seen in done],
        color="#2b6cb0",
    )
    axes[0].bar_label(bars, fmt="%.0f", padding=3)
    axes[0].margins(x=0.12)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("tokens/s")
    for axis, group in zip(axes[1:], SWEEPS, strict=True):
        what, written = SWEEPS[group]
        for schedule, by_value in plan.rates(group).items():
            places = range(len(by_value))
            axis.plot(places, list(by_value.values()), marker="o", label=schedule)
            axis.set_xticks(places, [written(value) for value in by_value])
        axis.set_xlabel(what)
        axis.set_ylabel("tokens/s" + (", all sessions" if group == "load" else ""))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if plan.of(group):
            axis.legend()
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise InvalidRequest(
            f"cannot write {file} ({error.strerror}): give a file in a folder that exists", "png"
        ) from error
