"""What the planner expects of the methods that were measured, from the profile of the pair and the figures of the wire alone."""

from collections.abc import Iterable

from bench.methods import FIRST, SECOND, Method, Ours
from bench.ours import schedule_of
from bench.results import Forecast, Results
from runtime.sim.forecast import Setting, forecast
from runtime.sim.measured import Measured


def forecasts(results: Results, methods: Iterable[Method]) -> tuple[Forecast, ...]:
    """For each method, temperature and batch that was measured, of those that the planner knows: the target on the first core, and
    on the second a model drafter or none."""
    found = []
    for method in methods:
        how = method.how
        if not isinstance(how, Ours) or how.target_cores != FIRST or how.drafters not in ((), ("model",)) or how.drafter_cores != SECOND:
            continue
        for temperature, batch in sorted({(run.temperature, run.batch) for run in results.runs if run.method == method.name}):
            pair = measured(results, temperature, batch)
            if pair is not None:
                together = batch > 1  # texts that end leave others alone
                length = results.settings.new_tokens if together else 0
                setting = Setting(drafters=len(how.drafters), sessions=batch, length=length, once=together)
                rate = forecast(pair, schedule_of(how), setting).tokens_per_second
                found.append(Forecast(method=method.name, temperature=temperature, batch=batch, tokens_per_second=rate))
    return tuple(found)


def measured(results: Results, temperature: float, batch: int) -> Measured | None:
    """The pair as the planner wants it; None where its profile is not complete."""
    profile = results.profile
    guesses = next((found for found in profile.acceptance if (found.temperature, found.batch) == (temperature, batch)), None)
    if guesses is None or not guesses.ranks or not profile.target or not profile.draft:
        return None
    known = {
        "rtt": profile.round_trip,
        "text": profile.text,
        "beside": profile.beside,
        "step": profile.step,
        "message": profile.message,
        "pass": profile.draft_pass,
    }
    costs = {name: value for name, value in known.items() if value is not None}
    pair = {"target": profile.target, "draft": profile.draft, "acceptance": guesses.ranks, "positions": guesses.positions}
    return Measured.model_validate({**pair, **costs})
