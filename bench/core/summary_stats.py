"""Figures from numbers: spread, ratios, what a tree of guesses is worth, and what no scheme can beat."""

import heapq
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RunValues = dict[tuple[str, int], float]  # by prompt and repetition


@dataclass(frozen=True, slots=True)
class Spread:
    """Quartiles of `count` values; with one value all three are that."""

    low: float
    median: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """None where there are no values."""
    if not values:
        return None
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high, len(values))


def over_prompts(values: RunValues) -> Spread | None:
    """The median of each prompt's repetitions, and their spread over the prompts."""
    prompts: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        prompts.setdefault(prompt, []).append(value)
    return spread([statistics.median(found) for found in prompts.values()])


def paired_ratios(above: RunValues, below: RunValues) -> RunValues:
    """Ratios of what was measured in both."""
    return {key: value / below[key] for key, value in above.items() if below.get(key)}


def rank_probabilities(shares: Mapping[int, float]) -> list[float]:
    """Probability that the target's choice is the draft's first, second, ... guess.

    `shares` are those of positions whose choice is among the first k guesses, by k; between measured k the gain is shared evenly.
    """
    found: list[float] = []
    before, reached = 0, 0.0
    for rank, share in sorted(shares.items()):
        found += [max(0.0, share - reached) / (rank - before)] * (rank - before)
        before, reached = rank, max(share, reached)
    return found


def expected_tokens(ranks: Sequence[float], rows: int) -> float:
    """E(n): tokens that a step commits on average with the best tree of n = `rows` rows, the root's included.

    Positions are taken as independent, so a node is worth the product of its ranks' probabilities on the path to it, and the
    best tree is made of the most valuable nodes: a parent is never worth less than its child. The same optimum as that of
    Sequoia's dynamic programming (arXiv 2402.12374) without a limit of depth.
    """
    order = sorted((p for p in ranks if p > 0), reverse=True)
    heap = (
        [(-order[0], 1.0, 0)] if order else []
    )  # (-value, value of the parent, place among the siblings)
    total = 1.0
    for _ in range(rows - 1):
        if not heap:
            break
        value, parent, place = heapq.heappop(heap)
        total -= value
        heapq.heappush(heap, (value * order[0], -value, 0))
        if place + 1 < len(order):
            heapq.heappush(heap, (-parent * order[place + 1], parent, place + 1))
    return total


@dataclass(frozen=True, slots=True)
class Bound:
    """Tokens per second that no scheme beats (ALGORITHM.md, section 6): the lower of the two limits.

    drafting   1/t + 1/T(1): an autoregressive drafter that is always right, and the target's own tokens
    verifying  the most that E(n) / T(n) reaches, at `rows` rows
    chain      the same for chains, which guess one token for each place: what verifying is above it, trees can gain
    """

    drafting: float
    verifying: float
    rows: int
    chain: float

    @property
    def rate(self) -> float:
        return min(self.drafting, self.verifying)


def bound(draft_step: float, target_steps: Mapping[int, float], ranks: Sequence[float]) -> Bound:
    """`draft_step` is t, the drafter's time for one row; `target_steps` T(n) by rows, 1 among them; seconds.

    E(n) is that of independent positions (`expected_tokens`).
    """
    rates = {rows: expected_tokens(ranks, rows) / seconds for rows, seconds in target_steps.items()}
    chain = max(
        expected_tokens(ranks[:1], rows) / seconds for rows, seconds in target_steps.items()
    )
    rows = max(rates, key=lambda n: rates[n])
    return Bound(1 / draft_step + 1 / target_steps[1], rates[rows], rows, chain)
