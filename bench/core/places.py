"""What passes cost where they ran: T(n) of the pair by itself, moved to what the passes of many runs took.

A shared machine has quick minutes and slow ones: 8 rows took 25 ms or 35 for seconds to minutes on end, whichever process asked, while
its neighbours multiplied too. A profile that is measured in other minutes than the runs says little of them; their own passes do.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from bench.core.results import InPlace, Passes, Profile, Run

MIN_PASSES = 8  # passes of about so many rows, from which on their time counts


def costs_in_place(profile: Profile, runs: Sequence[Run]) -> tuple[InPlace, ...]:
    """For each temperature and batch of these runs, which used the same cores; those whose passes were not recorded say nothing."""
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
        if drafted
        else None,
    )


def bookkeeping_per_session(seen: Sequence[Passes]) -> float:
    """Seconds for each session of a pass."""
    return sum(one.bookkeeping for one in seen) / max(1, sum(map(count_sessions, seen)))


def count_sessions(passes: Passes) -> int:
    """Of all passes together."""
    return sum(count for _, count, _ in passes.target)


def draft_pass_gap(profile: Profile, passes: Passes) -> float:
    """Seconds from the end of a drafter's pass to the next, as a median, where its model takes what it takes alone."""
    return max(
        0.0,
        statistics.median(
            period - interpolate(profile.draft, leaves) for leaves, period in passes.drafting
        ),
    )


def scaled_step_times(profile: Profile, seen: Sequence[Passes]) -> dict[int, float]:
    """T(n): each measured width times the ratio, of the passes with about as many rows, of all their seconds to those of the profile.

    Widths with few passes take the ratio between those of their neighbours.
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
