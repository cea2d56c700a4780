"""The planner's forecasts for the measured methods, from the pair's costs and acceptance."""

from collections.abc import Iterable
from typing import TypeGuard

from bench.core.methods import DRAFT, FIRST, SECOND, Method, MethodSpec, OutriderMethod
from bench.core.outrider_runner import schedule_config
from bench.core.results import Forecast, Results
from runtime.sim.forecast import Setting, forecast
from runtime.sim.pair_profile import PairProfile


def forecast_methods(results: Results, methods: Iterable[Method]) -> tuple[Forecast, ...]:
    """Forecast each measured method, temperature and batch that the planner supports."""
    found = []
    for method in methods:
        how = method.how
        if not is_forecastable(how):
            continue
        for temperature, batch in sorted(
            {(run.temperature, run.batch) for run in results.runs if run.method == method.name}
        ):
            pair = measured_pair(results, temperature, batch)
            if pair is not None:
                together = batch > 1  # as texts end, the batch shrinks
                length = results.settings.new_tokens if together else 0
                setting = Setting(
                    drafters=len(how.drafters), sessions=batch, length=length, once=together
                )
                rate = forecast(pair, schedule_config(how), setting).tokens_per_second
                found.append(
                    Forecast(
                        method=method.name,
                        temperature=temperature,
                        batch=batch,
                        tokens_per_second=rate,
                    )
                )
    return tuple(found)


def is_forecastable(how: MethodSpec) -> TypeGuard[OutriderMethod]:
    """Accept a warm target on the first core with the pair's drafter, or none, on the second."""
    return (
        isinstance(how, OutriderMethod)
        and how.target_cores == FIRST
        and how.drafters in ((), (DRAFT,))
        and not how.cold
        and how.drafter_cores == SECOND
    )


def measured_pair(results: Results, temperature: float, batch: int) -> PairProfile | None:
    """Return the pair's costs for the planner, or None if its profile is incomplete.

    Costs measured during the runs take precedence over those of the pair measured alone.
    """
    profile, key = results.profile, (temperature, batch)
    guesses = next(
        (found for found in profile.acceptance if (found.temperature, found.batch) == key), None
    )
    if guesses is None or not guesses.ranks or not profile.target or not profile.draft:
        return None
    known = {"target": profile.target, "draft": profile.draft, "text": profile.text}
    if (
        place := next(
            (found for found in profile.places if (found.temperature, found.batch) == key), None
        )
    ) is not None:
        costs = {
            "step": place.step,
            "message": place.message,
            "rtt": place.round_trip,
            "pass": place.draft_pass,
        }
        known |= {"target": place.target, **costs}
    given = {name: value for name, value in known.items() if value is not None}
    return PairProfile.model_validate(
        {**given, "acceptance": guesses.ranks, "positions": guesses.positions}
    )
