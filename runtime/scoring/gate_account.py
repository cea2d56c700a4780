"""What the speculation gate knows of each way to decode, and what it does, at one order of load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from runtime.scoring.expected_tokens import ExpectedTokens

Way = Literal["plain", "heads", "all"]
PLAIN: Way = "plain"
WAYS: dict[str, Way] = {"plain": "plain", "heads": "heads", "all": "all"}

TRIAL_BUDGET = 0.8  # tokens that a trial may lose
MAX_BUDGET = 4.0  # more goes to the reserve
MAX_SLOWDOWN = 1.6  # a longer step is counted as so many usual ones: the machine was busy
USUAL_STEPS = 15  # whose median is usual
MIN_STEPS = 2  # of a trial: the first one may have met another program
FIRST_PERIOD, MAX_PERIOD = 16, 128  # steps between two probes that cost nothing
FIRST_REST, MAX_REST = 16, 512  # plain steps before the next trial
MAX_OLD_REST = 128  # rest that an earlier process can cause
OLD_STEPS = 3.0  # steps that the measurements of an earlier process are worth
MAX_SUM = 1e9


@dataclass(slots=True)
class Record:
    """Decayed sums over the steps of one way to decode, per session.

    `seconds` are relative to the profile's time of a plain step with as many sessions.
    """

    steps: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    ratios: list[float] = field(default_factory=list)  # of the last steps to their expected times

    def clip(self, seconds: float, expected: float, plain: Sequence[float]) -> float:
        """Return `seconds`, or less if the step took much longer than most do.

        `expected` is the profile's time of as many rows. A busy machine delays single steps by a
        multiple, in every way to decode. The first steps of a way are compared with those of
        `plain` decoding.
        """
        self.ratios = [*self.ratios[1 - USUAL_STEPS :], seconds / expected]
        usual = self.ratios if len(self.ratios) >= MIN_STEPS or not plain else plain
        return min(seconds, MAX_SLOWDOWN * median(usual) * expected)

    def add(self, tokens: float, seconds: float, memory: float) -> None:
        keep = 1.0 - 1.0 / memory
        self.steps = keep * self.steps + 1.0
        self.tokens = keep * self.tokens + tokens
        self.seconds = keep * self.seconds + seconds

    @property
    def speed(self) -> float:
        """Return the tokens per (relative) second; 0 if nothing is known."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Account:
    """What is known, and what is being done, at one order of load."""

    records: dict[Way, Record] = field(default_factory=dict)
    way: Way = "all"
    home: Way = "all"  # what is used between probes
    budget: float = 0.0
    reserve: float = 0.0
    age: int = 0  # steps since the way has changed
    seconds: float = 0.0  # since then
    measured: int = 0  # steps since then that count as measurements of plain decoding
    verified: int = 0  # steps since then that verified guesses
    since_probe: int = 0
    period: int = FIRST_PERIOD
    rest: int = FIRST_REST // 2  # of the last failure; the next one doubles it
    visits: int = 0
    probed: bool = False  # plain decoding has been measured
    expected: ExpectedTokens = field(default_factory=ExpectedTokens)

    def record(self, way: Way) -> Record:
        return self.records.setdefault(way, Record())

    def speedup(self, way: Way) -> float:
        """Return the speed of a way relative to plain decoding; 1 if either is unknown."""
        plain, other = self.record(PLAIN).speed, self.record(way).speed
        return other / plain if plain and other else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "home": self.home,
            "budget": self.budget,
            "rest": self.rest,
            "age": self.age,
            "ways": {
                way: [one.steps, one.tokens, one.seconds]
                for way, one in tuple(self.records.items())
            },
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Account":
        """Take over what was decided; new measurements soon outweigh the old ones.

        Where plain decoding was faster, the next trial comes no later than after MAX_OLD_REST.
        """
        home = WAYS[saved["home"]]
        found = cls(
            way=home,
            home=home,
            budget=number(
                saved["budget"], MAX_BUDGET, -MAX_BUDGET if home == PLAIN else TRIAL_BUDGET
            ),
            rest=int(number(saved["rest"], MAX_OLD_REST)),
            age=int(number(saved["age"], MAX_REST)) if home == PLAIN else 0,
            probed=True,
        )
        for way, sums in saved["ways"].items():
            steps, tokens, seconds = (number(value, MAX_SUM) for value in sums)
            if steps > 0.0 and tokens > 0.0 and seconds > 0.0:
                keep = min(1.0, OLD_STEPS / steps)
                found.records[WAYS[way]] = Record(keep * steps, keep * tokens, keep * seconds)
        return found

    def turn(self, way: Way) -> None:
        self.way, self.age, self.seconds, self.measured, self.verified = way, 0, 0.0, 0, 0


def number(value: Any, most: float, least: float = 0.0) -> float:
    """Return a number from `least` to `most`. Raises TypeError for anything else than a number."""
    return float(min(most, max(least, value)))
