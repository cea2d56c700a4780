"""Queries on the results of a benchmark: speeds, speed-ups, and how the time was spent."""

import statistics
from collections import defaultdict
from collections.abc import Iterable

from bench.core.prompts import category
from bench.core.results import Results, Run, Steps
from bench.core.summary_stats import (
    Bound,
    RunValues,
    Spread,
    bound,
    over_prompts,
    paired_ratios,
    rank_probabilities,
)


def runs_of(results: Results, method: str, temperature: float = 0.0, batch: int = 1) -> list[Run]:
    return [
        run
        for run in results.runs
        if (run.method, run.temperature, run.batch) == (method, temperature, batch)
    ]


def decode_rate(run: Run) -> float | None:
    """Return tokens per second after the first tokens, excluding the prefill.

    Return None if no tokens followed the first ones.
    """
    if run.tokens <= run.first_tokens:
        return None
    return (run.tokens - run.first_tokens) / (run.seconds - run.first_seconds)


def decode_rates(
    results: Results, method: str, temperature: float = 0.0, batch: int = 1
) -> RunValues:
    found = {
        (run.prompt, run.repetition): decode_rate(run)
        for run in runs_of(results, method, temperature, batch)
    }
    return {key: rate for key, rate in found.items() if rate is not None}


def decode_speed(
    results: Results, method: str, temperature: float = 0.0, batch: int = 1
) -> Spread | None:
    """Return the spread of decoding speed over prompts, in tokens per second."""
    return over_prompts(decode_rates(results, method, temperature, batch))


def overall_speed(
    results: Results, method: str, temperature: float = 0.0, batch: int = 1
) -> Spread | None:
    """Return tokens per second from the call to the last token, including the prefill."""
    return over_prompts(
        {
            (run.prompt, run.repetition): run.tokens / run.seconds
            for run in runs_of(results, method, temperature, batch)
        }
    )


def speed_ratio(
    results: Results, above: str, below: str, temperature: float = 0.0, batch: int = 1
) -> Spread | None:
    """Return the speed-up of `above` over `below`, paired by prompt and repetition.

    Return None if the two methods have no run in common.
    """
    return over_prompts(
        paired_ratios(
            decode_rates(results, above, temperature, batch),
            decode_rates(results, below, temperature, batch),
        )
    )


def aggregate_rate(
    results: Results, method: str, temperature: float = 0.0, batch: int = 1
) -> float | None:
    """Return the decoded tokens of all runs divided by their total decoding time."""
    runs = [
        run for run in runs_of(results, method, temperature, batch) if run.tokens > run.first_tokens
    ]
    seconds = sum(run.seconds - run.first_seconds for run in runs)
    return sum(run.tokens - run.first_tokens for run in runs) / seconds if seconds else None


def fastest_method(
    results: Results, methods: Iterable[str], temperature: float = 0.0, batch: int = 1
) -> str | None:
    """Return the method with the highest median speed, or None if none was measured."""
    speeds = {
        method: found.median
        for method in methods
        if (found := decode_speed(results, method, temperature, batch))
    }
    return max(speeds, key=lambda method: speeds[method], default=None)


def transformers_methods(results: Results) -> list[str]:
    """Return the speculative methods of transformers, on any number of cores."""
    return [name for name in methods_by(results, "transformers") if "greedy" not in name]


def methods_by(results: Results, who: str) -> list[str]:
    return [facts.name for facts in results.methods if facts.who == who]


def worst_ratio(results: Results, above: str, below: str, temperature: float = 0.0) -> float | None:
    """Return the lowest speed-up of any prompt, each the median over its repetitions.

    Return None if the two methods have no run in common.
    """
    by_prompt: defaultdict[str, list[float]] = defaultdict(list)
    rates = (decode_rates(results, name, temperature) for name in (above, below))
    for (prompt, _), ratio in paired_ratios(*rates).items():
        by_prompt[prompt].append(ratio)
    return min(map(statistics.median, by_prompt.values()), default=None)


def of_category(results: Results, wanted: str) -> Results:
    """Return the results with the runs of one category of prompts only."""
    return results.model_copy(
        update={"runs": tuple(run for run in results.runs if category(run.prompt) == wanted)}
    )


def temperatures(results: Results) -> list[float]:
    return sorted({run.temperature for run in results.runs})


def batches(results: Results) -> list[int]:
    return sorted({run.batch for run in results.runs})


def agreement(
    results: Results, method: str, reference: str, temperature: float = 0.0, batch: int = 1
) -> tuple[int, int]:
    """Count the runs whose tokens equal those of `reference`, and the runs that can be compared."""
    known = {
        (run.prompt, run.repetition): run.text
        for run in runs_of(results, reference, temperature, batch)
    }
    mine = {
        (run.prompt, run.repetition): run.text
        for run in runs_of(results, method, temperature, batch)
    }
    both = mine.keys() & known.keys()
    return sum(mine[key] == known[key] for key in both), len(both)


def time_shares(
    results: Results, method: str, temperature: float = 0.0, batch: int = 1
) -> dict[str, float] | None:
    """Return the shares of the target's decoding time, which add up to 1.

    `rest` is the time that no step accounts for. Return None if no steps were recorded.
    """
    runs = [run for run in runs_of(results, method, temperature, batch) if run.steps]
    seconds = sum(run.seconds - run.first_seconds for run in runs)
    if not seconds:
        return None
    steps = [run.steps for run in runs if run.steps]
    found = {
        "compute": sum(step.computed for step in steps) / seconds,
        "wait": sum(step.waited for step in steps) / seconds,
        "bookkeeping": sum(step.bookkeeping for step in steps) / seconds,
    }
    return found | {"rest": max(0.0, 1.0 - sum(found.values()))}


def total_steps(
    results: Results, method: str, temperature: float = 0.0, batch: int = 1
) -> Steps | None:
    """Sum the steps of all runs; `lead` is the mean over runs."""
    steps = [run.steps for run in runs_of(results, method, temperature, batch) if run.steps]
    if not steps:
        return None
    leads = [step.lead for step in steps if step.lead is not None]
    drafters = sorted({name for step in steps for name in step.by_drafter})
    return Steps(
        rounds=sum(step.rounds for step in steps),
        drafted=sum(step.drafted for step in steps),
        verified=sum(step.verified for step in steps),
        accepted=sum(step.accepted for step in steps),
        hits=sum(step.hits for step in steps),
        computed=sum(step.computed for step in steps),
        waited=sum(step.waited for step in steps),
        bookkeeping=sum(step.bookkeeping for step in steps),
        by_drafter={name: sum(step.by_drafter.get(name, 0) for step in steps) for name in drafters},
        lead=statistics.mean(leads) if leads else None,
    )


def step_times_in_place(results: Results, temperature: float = 0.0) -> dict[int, float]:
    """Return T(n) as measured during the runs, one prompt at a time.

    If no passes were recorded, return T(n) of the pair measured alone.
    """
    found = (
        place.target
        for place in results.profile.places
        if (place.temperature, place.batch) == (temperature, 1)
    )
    return next(found, results.profile.target)


def bound_of(results: Results, temperature: float = 0.0) -> Bound | None:
    """Return the bound given by the measured step times and acceptance, or None if either is
    missing."""
    ranks = next(
        (
            found.ranks
            for found in results.profile.acceptance
            if (found.temperature, found.batch) == (temperature, 1)
        ),
        None,
    )
    steps = step_times_in_place(results, temperature)
    if not ranks or 1 not in steps or 1 not in results.profile.draft:
        return None
    return bound(results.profile.draft[1], steps, rank_probabilities(ranks))


def bound_share(results: Results, method: str, temperature: float = 0.0) -> float | None:
    """Return the share of the bound that a method reaches over all texts together."""
    found, most = aggregate_rate(results, method, temperature), bound_of(results, temperature)
    return found / most.rate if found and most else None


def forecasts_and_measured(results: Results) -> dict[tuple[str, float, int], tuple[float, float]]:
    """Return (forecast, measured) tokens per second by (method, temperature, batch).

    The planner models a method that writes all texts one after the other. The measured value is
    therefore all tokens divided by all time, in which a hard text weighs more than it does in a
    median over prompts.
    """
    found = {}
    for forecast in results.forecasts:
        measured = aggregate_rate(results, forecast.method, forecast.temperature, forecast.batch)
        if measured:
            found[forecast.method, forecast.temperature, forecast.batch] = (
                forecast.tokens_per_second,
                measured,
            )
    return found
