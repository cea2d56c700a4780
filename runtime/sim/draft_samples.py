"""How a draft guesses, as a list of examples: from a replay of a real one, or from its rates alone.

A saved calibration is no source of them: it forgets what is frequent, so it does not tell how frequent anything is.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.scoring.calibration import Calibrations
from runtime.sim.pair_profile import Measured, Position

COUNT = 4096  # examples that are made where none were measured
RANKS = 8  # guesses of a made example
SEED = 20_241
NOISE = 0.5  # standard deviation, in logits, of what a draft says of itself, where that was not measured
LEAST = 1e-6  # probability
CONCENTRATIONS = np.geomspace(0.02, 200.0, 400)  # that are tried for the Beta law

Place = tuple[
    int, tuple[float, ...]
]  # rank of the target's choice among the guesses of a place, from 0 (-1: not there); their scores, falling
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Guesses:
    """Examples, parallel: `ranks` (place of the target's choice, from 0; -1: not guessed) and `scores` (logs, falling).

    below  parallel to these, or empty: ranks and scores of what the same pass guessed behind its best guess, behind the best of that, ...
    """

    ranks: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    below: tuple[tuple[Place, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.ranks)

    def rate(self, k: int) -> float:
        """Share of the examples whose first k guesses hold the target's choice."""
        return sum(0 <= rank < k for rank in self.ranks) / len(self.ranks)

    def place(self, example: int) -> Place:
        return self.ranks[example], self.scores[example]

    def behind(self, example: int) -> tuple[Place, ...]:
        return self.below[example] if self.below else ()

    def learned(self, name: str, branches: int) -> Calibrations:
        """What a target knows after these examples, with so many children of each node of a drafter of that name."""
        known = Calibrations()
        band = known.band(0.0)
        table = band.of(name)
        for example in range(len(self)):
            for rank, scores in known_places((self.place(example), *self.behind(example))):
                for place, score in enumerate(scores[:branches]):
                    table.observe(place, score, place == rank)
        band.promise = self.rate(branches)
        return known


def of(measured: Measured) -> Guesses:
    """From the best that was measured."""
    if measured.positions:
        near = [place_of(position) for position in measured.positions]
        below = tuple(tuple(map(place_of, position.below)) for position in measured.positions)
        return Guesses(tuple(rank for rank, _ in near), tuple(scores for _, scores in near), below)
    return mixed(measured.acceptance)


def place_of(position: Position) -> Place:
    return -1 if position.rank is None else position.rank, position.scores


def known_places(places: Iterable[Place]) -> Iterator[Place]:
    """Those of a pass that the target has judged: up to the first whose best guess was wrong, for what is behind hangs on it."""
    for rank, scores in places:
        yield rank, scores
        if rank != 0:
            return


def mixed(rates: Mapping[int, float]) -> Guesses:
    """Easy and hard positions: the first guess is right with a chance that is Beta distributed over positions, each further
    one with the same chance, once those before it were wrong; the k-th is right with a(1-a)^(k-1).

    So the first k fail with E(1-a)^k, the product of (b+j)/(a+b+j) for j < k: that decides the law. What the draft says is
    its chance, with noise.
    """
    draw = np.random.default_rng(SEED)
    first = float(np.clip(rates[1], LEAST, 1.0 - LEAST))
    concentration = concentration_of(rates, first)
    chance = np.clip(
        draw.beta(first * concentration, (1.0 - first) * concentration, COUNT), LEAST, 1.0 - LEAST
    )
    noise = NOISE * draw.standard_normal(COUNT)
    stated = 1.0 / (1.0 + (1.0 - chance) / chance * np.exp(-noise))
    below = np.cumsum(geometric(chance), axis=1)
    drawn = (draw.random((COUNT, 1)) >= below).sum(axis=1)
    scores = np.log(np.clip(geometric(stated), LEAST, 1.0))
    return Guesses(
        tuple(np.where(drawn < RANKS, drawn, -1).tolist()), tuple(map(tuple, scores.tolist()))
    )


def geometric(chance: Floats) -> Floats:
    """(COUNT, RANKS): that the first right guess is at each rank."""
    found: Floats = chance[:, None] * (1.0 - chance[:, None]) ** np.arange(RANKS)
    return found


def concentration_of(rates: Mapping[int, float], first: float) -> float:
    """a + b of the Beta law of mean `first` that comes nearest to the rates."""
    errors = np.zeros(len(CONCENTRATIONS))
    for k, rate in rates.items():
        tries = np.arange(k)[:, None]
        failing = np.prod(
            ((1.0 - first) * CONCENTRATIONS + tries) / (CONCENTRATIONS + tries), axis=0
        )
        errors += (1.0 - failing - rate) ** 2
    return float(CONCENTRATIONS[errors.argmin()])
