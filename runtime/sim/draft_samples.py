"""Samples of a draft's guesses, taken from a replay of a real draft or generated from its rates.

A saved calibration cannot supply them: it forgets frequencies, so it does not tell how often
anything happens.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.scoring.calibration import Calibrations
from runtime.sim.pair_profile import PairProfile, Position

SAMPLE_COUNT = 4096  # generated if none were measured
MAX_RANKS = 8  # guesses of a generated sample
SEED = 20_241
# Standard deviation, in logits, of a draft's stated confidence if it was not measured.
LOGIT_NOISE = 0.5
MIN_PROBABILITY = 1e-6  # probability
CONCENTRATIONS = np.geomspace(0.02, 200.0, 400)  # candidates for the fit of the Beta law

# Rank of the target's choice among the guesses for a position, from 0 (-1: not among them), and the
# scores of the guesses, falling.
RankedScores = tuple[int, tuple[float, ...]]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DraftSamples:
    """Samples as parallel tuples.

    ranks   rank of the target's choice among the guesses, from 0; -1 if it was not guessed
    scores  log probabilities of the guesses, falling
    below   empty, or for each sample the ranks and scores that the same pass guessed after its best
            guess, after the best guess of those, and so on
    """

    ranks: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    below: tuple[tuple[RankedScores, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.ranks)

    def rate(self, k: int) -> float:
        """Return the share of the samples whose first k guesses contain the target's choice."""
        return sum(0 <= rank < k for rank in self.ranks) / len(self.ranks)

    def place(self, example: int) -> RankedScores:
        return self.ranks[example], self.scores[example]

    def behind(self, example: int) -> tuple[RankedScores, ...]:
        return self.below[example] if self.below else ()

    def calibrations(self, name: str, branches: int) -> Calibrations:
        """Return what a target has learned after these samples, for a drafter `name` with
        `branches` children per node.
        """
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
    """Return samples from the most detailed measurement that the profile contains."""
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
    """Yield the positions of a pass that the target has judged.

    They end at the first position whose best guess was wrong, because all later guesses depend on
    it.
    """
    for rank, scores in places:
        yield rank, scores
        if rank != 0:
            return


def beta_samples(rates: Mapping[int, float]) -> DraftSamples:
    """Generate samples with easy and hard positions.

    At each position the first guess is right with a probability a that is Beta distributed over
    positions. Each further guess has the same probability once those before it were wrong, so the
    k-th is right with a(1-a)^(k-1). The first k guesses all fail with probability E(1-a)^k, the
    product of (b+j)/(a+b+j) for j < k, which determines the Beta law. The draft states its
    probability with noise.
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
    """Return (SAMPLE_COUNT, MAX_RANKS): probabilities of the rank of the first right guess."""
    found: Floats = chance[:, None] * (1.0 - chance[:, None]) ** np.arange(MAX_RANKS)
    return found


def fit_concentration(rates: Mapping[int, float], first: float) -> float:
    """Return a + b of the Beta law with mean `first` that fits the rates best."""
    errors = np.zeros(len(CONCENTRATIONS))
    for k, rate in rates.items():
        tries = np.arange(k)[:, None]
        failing = np.prod(
            ((1.0 - first) * CONCENTRATIONS + tries) / (CONCENTRATIONS + tries), axis=0
        )
        errors += (1.0 - failing - rate) ** 2
    return float(CONCENTRATIONS[errors.argmin()])
