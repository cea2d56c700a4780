"""The goals of the benchmark, each with the figure that decides it. Ratios are medians over prompts
within one run."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.core.compare import (
    bound_share,
    fastest_method,
    forecasts_and_measured,
    methods_by,
    runs_of,
    speed_ratio,
    time_shares,
    total_steps,
    transformers_methods,
    worst_ratio,
)
from bench.core.results import Results


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal for a figure.

    `find` returns None if the figure was not measured. The goal is met at `limit` or above, with
    `at_most` at `limit` or below.
    """

    what: str
    limit: float
    find: Callable[[Results], float | None]
    at_most: bool = False
    percent: bool = False

    def met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    def show(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else f"{value:.2f}"


def times(
    above: str, below: str, temperature: float = 0.0, batch: int = 1
) -> Callable[[Results], float | None]:
    def find(results: Results) -> float | None:
        found = speed_ratio(results, above, below, temperature, batch)
        return found.median if found else None

    return find


def over_best(rivals: Callable[[Results], list[str]]) -> Callable[[Results], float | None]:
    """Return living over the fastest of these methods."""

    def find(results: Results) -> float | None:
        best = fastest_method(results, rivals(results))
        found = speed_ratio(results, "living", best) if best else None
        return found.median if found else None

    return find


def over_all_of(who: str) -> Callable[[Results], float | None]:
    """Return living over the fastest way of others, plain or speculative."""
    return over_best(lambda results: methods_by(results, who))


def tokens_per_step(results: Results) -> float | None:
    steps = total_steps(results, "living")
    tokens = sum(run.tokens for run in runs_of(results, "living"))
    return tokens / steps.rounds if steps and steps.rounds else None


def worst(below: str) -> Callable[[Results], float | None]:
    return lambda results: worst_ratio(results, "living", below)


def share(part: str) -> Callable[[Results], float | None]:
    def find(results: Results) -> float | None:
        found = time_shares(results, "living")
        return found[part] if found else None

    return find


def worst_forecast(results: Results) -> float | None:
    return max(
        (
            abs(expected / measured - 1)
            for expected, measured in forecasts_and_measured(results).values()
        ),
        default=None,
    )


GOALS = (
    Goal(
        "plain / transformers greedy, one thread each", 1.4, times("plain", "transformers greedy")
    ),
    Goal(
        "living / best of transformers' assisted and prompt lookup, on one core or two",
        1.5,
        over_best(transformers_methods),
    ),
    Goal(
        "living / best sync tree with both cores given to the target (cost-matched)",
        0.9,
        times("living", "sync tree, 2 cores"),
    ),
    Goal("living / amusd", 1.29, times("living", "amusd")),
    Goal("living / best sync tree", 1.15, times("living", "sync tree")),
    Goal("living / plain", 2.8, times("living", "plain")),
    Goal("living / plain at temperature 0.8", 2.4, times("living", "plain", 0.8)),
    Goal("target's time: compute", 0.85, share("compute"), percent=True),
    Goal("target's time: wait", 0.12, share("wait"), at_most=True, percent=True),
    Goal("target's time: bookkeeping", 0.03, share("bookkeeping"), at_most=True, percent=True),
    Goal(
        "share of the bound reached",
        0.8,
        lambda results: bound_share(results, "living"),
        percent=True,
    ),
    Goal("living / plain, batch 8", 1.3, times("living", "plain", batch=8)),
    Goal("living / plain, batch 16", 0.98, times("living", "plain", batch=16)),
    Goal("living without a drafter / plain", 0.98, times("living, no drafter", "plain")),
    Goal(
        "living with a drafter that is always wrong / plain",
        0.98,
        times("living, wrong drafter", "plain"),
    ),
    Goal(
        "planner's worst forecast against measurement",
        0.15,
        worst_forecast,
        at_most=True,
        percent=True,
    ),
)


# The goals for a drafter that was trained for its target, on a real language model.
TRAINED_GOALS = (
    Goal("living / plain", 2.0, times("living", "plain")),
    Goal("living / plain at temperature 0.8", 1.6, times("living", "plain", 0.8)),
    Goal("living / amusd", 1.15, times("living", "amusd")),
    Goal("living / pearl", 1.15, times("living", "pearl")),
    Goal("living / best sync tree", 1.15, times("living", "sync tree")),
    Goal("living / amusd on the worst prompt", 0.98, worst("amusd")),
    Goal("living / best of transformers on one core or two", 4.0, over_all_of("transformers")),
    Goal("living / best of llama.cpp on one core or two", 1.3, over_all_of("llama.cpp")),
    Goal("tokens per step of living", 2.4, tokens_per_step),
    Goal("living / plain, batch 8", 1.3, times("living", "plain", batch=8)),
    Goal("living / plain, batch 16", 0.98, times("living", "plain", batch=16)),
    Goal("living without a drafter / plain", 0.98, times("living, no drafter", "plain")),
    Goal("living with nothing learned before / plain", 0.98, times("living, cold", "plain")),
    Goal("living / plain on the worst prompt", 0.98, worst("plain")),
)


@dataclass(frozen=True, slots=True)
class Finding:
    goal: Goal
    value: float | None

    @property
    def wanted(self) -> str:
        return f"at {'most' if self.goal.at_most else 'least'} {self.goal.show(self.goal.limit)}"

    @property
    def measured(self) -> str:
        return "not measured" if self.value is None else self.goal.show(self.value)

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "-"
        return "met" if self.goal.met(self.value) else "missed"


def findings(results: Results) -> list[Finding]:
    goals = GOALS if results.pair.method == "model" else TRAINED_GOALS
    return [Finding(goal, goal.find(results)) for goal in goals]
