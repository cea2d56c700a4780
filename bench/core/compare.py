"""Questions to the results of a benchmark: how fast, how many times as fast, where the time went."""

import statistics
from collections.abc import Iterable

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
    """Tokens per second after the first ones, reading of the prompt not counted. None where nothing followed them."""
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
    """Tokens per second of decoding."""
    return over_prompts(decode_rates(results, method, temperature, batch))


def overall_speed(
    results: Results, method: str, temperature: float = 0.0, batch: int = 1
) -> Spread | None:
    """Tokens per second from the call to the last token, reading of the prompt included."""
    return over_prompts(
        {
            (run.prompt, run.repetition): run.tokens / run.seconds
            for run in runs_of(results, method, temperature, batch)
        }
    )


def speed_ratio(
    results: Results, above: str, below: str, temperature: float = 0.0, batch: int = 1
) -> Spread | None:
    """How many times as fast `above` is as `below`, on the same prompts in the same repetitions. None where they have none in common."""
    return over_prompts(
        paired_ratios(
            decode_rates(results, above, temperature, batch),
            decode_rates(results, below, temperature, batch),
        )
    )


def aggregate_rate(
    results: Results, method: str, temperature: float = 0.0, batch: int = 1
) -> float | None:
    """Tokens of all runs over the time of all runs, decoding alone."""
    runs = [
        run for run in runs_of(results, method, temperature, batch) if run.tokens > run.first_tokens
    ]
    seconds = sum(run.seconds - run.first_seconds for run in runs)
    return sum(run.tokens - run.first_tokens for run in runs) / seconds if seconds else None


def fastest_method(
    results: Results, methods: Iterable[str], temperature: float = 0.0, batch: int = 1
) -> str | None:
    """The method of the highest median speed; None where none of them was measured."""
    speeds = {
        method: found.median
        for method in methods
        if (found := decode_speed(results, method, temperature, batch))
    }
    return max(speeds, key=lambda method: speeds[method], default=None)


def transformers_methods(results: Results) -> list[str]:
    """transformers' speculative methods, whatever their cores."""
    return [
        facts.name
        for facts in results.methods
        if facts.who == "transformers" and "greedy" not in facts.name
    ]


def temperatures(results: Results) -> list[float]:
    return sorted({run.temperature for run in results.runs})


def batches(results: Results) -> list[int]:
    return sorted({run.batch for run in results.runs})


def agreement(
    results: Results, method: str, reference: str, temperature: float = 0.0, batch: int = 1
) -> tuple[int, int]:
    """Runs with the very tokens of `reference`, and runs that have one to compare with."""
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
    """Where the target's time of decoding went, as parts of 1; `rest` is what no step accounts for. None where there are no figures."""
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
    """The steps of all runs together; `lead` is their mean, by runs."""
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
    """T(n) where the methods ran, one prompt at a time; that of the pair by itself where no passes were recorded."""
    found = (
        place.target
        for place in results.profile.places
        if (place.temperature, place.batch) == (temperature, 1)
    )
    return next(found, results.profile.target)


def bound_of(results: Results, temperature: float = 0.0) -> Bound | None:
    """The bound of the measured step times and acceptance. None where one of them is missing."""
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
    """Share of the bound, which is that of all texts together."""
    found, most = aggregate_rate(results, method, temperature), bound_of(results, temperature)
    return found / most.rate if found and most else None


def forecasts_and_measured(results: Results) -> dict[tuple[str, float, int], tuple[float, float]]:
    """By (method, temperature, batch): what the planner expected and what was measured, where both are there.

    The planner lets a method write all the texts one after the other, so that is what it is held to: all tokens over all time, where
    a hard text weighs more than in a median over prompts.
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
