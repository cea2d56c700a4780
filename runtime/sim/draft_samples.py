"""How a draft guesses, as a list of examples: from a replay of a real one, or from its rates alone.

A saved calibration is no source of them: it forgets what is frequent, so it does not tell how frequent anything is.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.scoring.calibration import Calibrations
from runtime.sim.pair_profile import PairProfile, Position

SAMPLE_COUNT = 4096  # examples that are made where none were measured
MAX_RANKS = 8  # guesses of a made example
SEED = 20_241
LOGIT_NOISE = 0.5  # standard deviation, in logits, of what a draft says of itself, where that was not measured
MIN_PROBABILITY = 1e-6  # probability
CONCENTRATIONS = np.geomspace(0.02, 200.0, 400)  # that are tried for the Beta law

RankedScores = tuple[
    int, tuple[float, ...]
]  # rank of the target's choice among the guesses of a place, from 0 (-1: not there); their scores, falling
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DraftSamples:
    """Examples, parallel: `ranks` (place of the target's choice, from 0; -1: not guessed) and `scores` (logs, falling).

    below  parallel to these, or empty: ranks and scores of what the same pass guessed behind its best guess, behind the best of that, ...
    """

    ranks: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    below: tuple[tuple[RankedScores, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.ranks)

    def rate(self, k: int) -> float:
        """Share of the examples whose first k guesses hold the target's choice."""
        return sum(0 <= rank < k for rank in self.ranks) / len(self.ranks)

    def place(self, example: int) -> RankedScores:
        return self.ranks[example], self.scores[example]

    def behind(self, example: int) -> tuple[RankedScores, ...]:
        return self.below[example] if self.below else ()

    def calibrations(self, name: str, branches: int) -> Calibrations:
        """What a target knows after these examples, with so many children of each node of a drafter of that name."""
        known = Calibrations()
        bucket = known.bucket(0.0)
        table = bucket.table(name)
        for example in range(len(self)):
            for rank, scores in judged_places((self.place(example), *self.behind(example))):
                for place, score in enumerate(scores[:branches]):
                    table.observe(place, score, place == rank)
        bucket.coverage = self.rate(branches)
        return known


def samples_of(profile: PairProfile) -> DraftSamples:
    """From the best that was measured."""
    if profile.positions:
        near = [ranked_scores(position) for position in profile.positions]
        below = tuple(tuple(map(ranked_scores, position.below)) for position in profile.positions)
        return DraftSamples(
            tuple(rank for rank, _ in near), tuple(scores for _, scores in near), below
        )
    return beta_samples(profile.acceptance)


def ranked_scores(position: Position) -> RankedScores:
    return -1 if position.rank is None else position.rank, position.scores


def judged_places(places: Iterable[RankedScores]) -> Iterator[RankedScores]:
    """Those of a pass that the target has judged: up to the first whose best guess was wrong, for what is behind hangs on it."""
    for rank, scores in places:
        yield rank, scores
        if rank != 0:
            return


def beta_samples(rates: Mapping[int, float]) -> DraftSamples:
    """Easy and hard positions: the first guess is right with a chance that is Beta distributed over positions, each further
    one with the same chance, once those before it were wrong; the k-th is right with a(1-a)^(k-1).

    So the first k fail with E(1-a)^k, the product of (b+j)/(a+b+j) for j < k: that decides the law. What the draft says is
    its chance, with noise.
    """
    draw = np.random.default_rng(SEED)
    first = float(np.clip(rates[1], MIN_PROBABILITY, 1.0 - MIN_PROBABILITY))
    concentration = fit_concentration(rates, first)
    chance = np.clip(
        draw.beta(first * concentration, (1.0 - first) * concentration, SAMPLE_COUNT),
        MIN_PROBABILITY,
        1.0 - MIN_PROBABILITY,
    )
    noise = LOGIT_NOISE * draw.standard_normal(SAMPLE_COUNT)
    stated = 1.0 / (1.0 + (1.0 - chance) / chance * np.exp(-noise))
    below = np.cumsum(rank_probabilities(chance), axis=1)
    drawn = (draw.random((SAMPLE_COUNT, 1)) >= below).sum(axis=1)
    scores = np.log(np.clip(rank_probabilities(stated), MIN_PROBABILITY, 1.0))
    return DraftSamples(
        tuple(np.where(drawn < MAX_RANKS, drawn, -1).tolist()), tuple(map(tuple, scores.tolist()))
    )


def rank_probabilities(chance: Floats) -> Floats:
    """(SAMPLE_COUNT, MAX_RANKS): that the first right guess is at each rank."""
    found: Floats = chance[:, None] * (1.0 - chance[:, None]) ** np.arange(MAX_RANKS)
    return found


def fit_concentration(rates: Mapping[int, float], first: float) -> float:
    """a + b of the Beta law of mean `first` that comes nearest to the rates."""
    errors = np.zeros(len(CONCENTRATIONS))
    for k, rate in rates.items():
        tries = np.arange(k)[:, None]
        failing = np.prod(
            ((1.0 - first) * CONCENTRATIONS + tries) / (CONCENTRATIONS + tries), axis=0
        )
        errors += (1.0 - failing - rate) ** 2
    return float(CONCENTRATIONS[errors.argmin()])
