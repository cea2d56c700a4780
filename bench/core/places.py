"""The cost of passes during the runs: T(n) of the pair measured alone, scaled to the recorded
passes.

A shared machine has fast and slow minutes. While neighbours were busy, 8 rows took 25 ms or 35 ms
for seconds to minutes on end, for any process. A profile measured at another time says little about
the runs, so their own passes are used.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from bench.core.results import InPlace, Passes, Profile, Run

MIN_PASSES = 8  # passes of a width needed to use their time


def costs_in_place(profile: Profile, runs: Sequence[Run]) -> tuple[InPlace, ...]:
    """Return the costs for each temperature and batch of these runs, which used the same cores.

    Runs without recorded passes are ignored.
    """
    found: defaultdict[tuple[float, int], list[Passes]] = defaultdict(list)
    for run in runs:
        if run.passes is not None:
            found[run.temperature, run.batch].append(run.passes)
    return tuple(
        cost_in_place(profile, temperature, batch, seen)
        for (temperature, batch), seen in sorted(found.items())
    )


def cost_in_place(
    profile: Profile, temperature: float, batch: int, seen: Sequence[Passes]
) -> InPlace:
    alone, drafted = (
        [one for one in seen if not one.drafting],
        [one for one in seen if one.drafting],
    )
    step = bookkeeping_per_session(alone or seen)
    messages = sum(one.messages for one in drafted)
    more = sum(one.bookkeeping - step * count_sessions(one) for one in drafted)
    waits = [one.round_trip for one in drafted if one.round_trip is not None]
    return InPlace(
        temperature=temperature,
        batch=batch,
        target=scaled_step_times(profile, seen),
        step=step,
        message=max(0.0, more) / messages if messages else None,
        round_trip=statistics.median(waits) if waits else None,
        draft_pass=statistics.median(draft_pass_gap(profile, one) for one in drafted)
        if drafted and profile.draft  # the passes of a draft model were measured alone
        else None,
    )


def bookkeeping_per_session(seen: Sequence[Passes]) -> float:
    """Return the seconds of bookkeeping per session and pass."""
    return sum(one.bookkeeping for one in seen) / max(1, sum(map(count_sessions, seen)))


def count_sessions(passes: Passes) -> int:
    """Sum the sessions over all passes."""
    return sum(count for _, count, _ in passes.target)


def draft_pass_gap(profile: Profile, passes: Passes) -> float:
    """Return the median seconds from the end of a drafter's pass to the start of the next.

    The model's own time is taken from the profile of the pair measured alone.
    """
    return max(
        0.0,
        statistics.median(
            period - interpolate(profile.draft, leaves) for leaves, period in passes.drafting
        ),
    )


def scaled_step_times(profile: Profile, seen: Sequence[Passes]) -> dict[int, float]:
    """Return T(n): each profiled time multiplied by the measured slow-down of passes of about that
    width.

    The slow-down is the total time of those passes divided by the profile's. Widths with few passes
    interpolate between their neighbours.
    """
    widths = np.asarray(sorted(profile.target), dtype=np.float64)
    took, expected, count = np.zeros(len(widths)), np.zeros(len(widths)), np.zeros(len(widths))
    for rows, texts, seconds in (each for one in seen for each in one.target):
        nearest = int(np.abs(np.log(widths / rows)).argmin())
        took[nearest] += seconds
        expected[nearest] += interpolate(profile.target, rows) + (profile.text or 0.0) * (texts - 1)
        count[nearest] += 1
    known = count >= min(MIN_PASSES, count.max())
    ratios = (
        np.interp(np.log(widths), np.log(widths[known]), took[known] / expected[known])
        if count.any()
        else np.ones(len(widths))
    )
    return {
        int(rows): profile.target[int(rows)] * float(ratio)
        for rows, ratio in zip(widths, ratios, strict=True)
    }


def interpolate(times: Mapping[int, float], rows: float) -> float:
    measured = sorted(times)
    return float(np.interp(rows, measured, [times[n] for n in measured]))
