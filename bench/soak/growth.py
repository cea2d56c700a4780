"""Decides from samples of a running system what grows: robust slopes, and what they are judged by.

Theil and Sen's slope is the median of the slopes between all pairs of points, so single peaks do
not move it. Its interval is Kendall's, which takes the points as independent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

HOUR_S = 3600.0
POINTS = 240  # at most so many medians stand for a series: all pairs of more would take long
CONFIDENCE_Z = 3.29  # 99.9 %: a run judges dozens of series
MIN_POINTS = 8
WARM_UP_S = 900.0  # caches fill; answers kept for repeated requests stay for 600 s
WARM_UP_SHARE = 0.25  # of a run that is shorter than that
MIN_SPAN_S = 1500.0  # a shorter time says nothing about growth in an hour

MEBIBYTE = float(1 << 20)
QUANTITIES: Mapping[str, tuple[str, float]] = {  # its unit, and how many of what is sampled
    "memory": ("MiB", MEBIBYTE),
    "shared": ("MiB", MEBIBYTE),
    "files": ("", 1.0),
    "threads": ("", 1.0),
    "children": ("", 1.0),
    "sessions": ("", 1.0),
}
# Growth in an hour that is allowed. A session, thread or file left over by each fault is 60 in an
# hour. Sessions come and go with the traffic: those left over are counted when it has ended.
COUNT_GOAL = 4.0


@dataclass(slots=True)
class Track:
    """The samples of one life of a process, in the units of QUANTITIES; times in seconds."""

    process: str
    pid: int
    judged: bool = True
    times: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, at: float, found: Mapping[str, float]) -> None:
        """Add a sample. What it lacks is as it was in the one before."""
        self.times.append(at)
        for name in QUANTITIES:
            values = self.values.setdefault(name, [])
            values.append(found.get(name, values[-1] if values else 0.0))


@dataclass(frozen=True, slots=True)
class Slope:
    """The slope of a series, and the ends of its interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Growth:
    """How a quantity of a process has changed after the warm-up; slopes per hour.

    first, last  medians of the first and the last tenth
    goal         None: not judged
    """

    process: str
    pid: int
    quantity: str
    span_s: float
    first: float
    last: float
    slope: Slope
    goal: float | None

    @property
    def leaks(self) -> bool:
        """True if it grows faster than the goal, and surely grows."""
        return self.goal is not None and self.slope.median > self.goal and self.slope.low > 0.0


def theil_sen(times: Sequence[float], values: Sequence[float]) -> Slope:
    """Return the slope in values per unit of time. Needs at least two points."""
    x, y = block_medians(times, POINTS), block_medians(values, POINTS)
    one, other = np.triu_indices(len(x), 1)
    slopes = np.sort((y[other] - y[one]) / (x[other] - x[one]))
    count, pairs = len(x), len(slopes)
    spread = CONFIDENCE_Z * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = max(0, math.floor((pairs - spread) / 2))
    high = min(pairs - 1, math.ceil((pairs + spread) / 2))
    return Slope(float(np.median(slopes)), float(slopes[low]), float(slopes[high]))


def block_medians(values: Sequence[float], most: int) -> npt.NDArray[np.float64]:
    """Return the medians of at most `most` blocks of successive values, of nearly equal size."""
    array = np.asarray(values, dtype=np.float64)
    blocks = np.array_split(array, min(most, len(array)))
    return np.array([np.median(block) for block in blocks])


def warm_up_s(seconds: float) -> float:
    """Return how much of a run's begin is not judged."""
    return min(WARM_UP_S, WARM_UP_SHARE * seconds)


def measure_growth(
    tracks: Sequence[Track], since: float, memory_goal: float, min_span_s: float = MIN_SPAN_S
) -> list[Growth]:
    """Return the growth of each quantity of each track after the time `since`.

    Tracks with fewer than MIN_POINTS samples are left out. One over less than `min_span_s` is not
    judged; neither are sessions.
    """
    goals = {"memory": memory_goal, "shared": memory_goal}
    found = []
    for track in tracks:
        start = next((place for place, at in enumerate(track.times) if at >= since), None)
        if start is None or len(track.times) - start < MIN_POINTS:
            continue
        times = [at / HOUR_S for at in track.times[start:]]
        span = track.times[-1] - track.times[start]
        tenth = max(1, len(times) // 10)
        for quantity in QUANTITIES:
            values = track.values[quantity][start:]
            judged = track.judged and span >= min_span_s and quantity != "sessions"
            found.append(
                Growth(
                    track.process,
                    track.pid,
                    quantity,
                    span,
                    float(np.median(values[:tenth])),
                    float(np.median(values[-tenth:])),
                    theil_sen(times, values),
                    goals.get(quantity, COUNT_GOAL) if judged else None,
                )
            )
    return found
