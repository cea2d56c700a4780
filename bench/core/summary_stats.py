"""Summary statistics: spreads, ratios, the value of a tree of guesses, and the speed bound."""

import heapq
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RunValues = dict[tuple[str, int], float]  # by prompt and repetition


@dataclass(frozen=True, slots=True)
class Spread:
    """The quartiles of `count` values; for a single value all three are equal."""

    low: float
    median: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """Return the quartiles of the values, or None if there are none."""
    if not values:
        return None
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high, len(values))


def over_prompts(values: RunValues) -> Spread | None:
    """Take the median of each prompt's repetitions and return their spread over prompts."""
    prompts: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        prompts.setdefault(prompt, []).append(value)
    return spread([statistics.median(found) for found in prompts.values()])


def paired_ratios(above: RunValues, below: RunValues) -> RunValues:
    """Return the ratio for every key that was measured in both."""
    return {key: value / below[key] for key, value in above.items() if below.get(key)}


def rank_probabilities(shares: Mapping[int, float]) -> list[float]:
    """Return the probability that the target's choice is the draft's first, second, ... guess.

    `shares` maps k to the share of positions whose choice is among the first k guesses. Between two
    measured values of k the gain is split evenly.
    """
    found: list[float] = []
    before, reached = 0, 0.0
    for rank, share in sorted(shares.items()):
        found += [max(0.0, share - reached) / (rank - before)] * (rank - before)
        before, reached = rank, max(share, reached)
    return found


def expected_tokens(ranks: Sequence[float], rows: int) -> float:
    """Return E(n), the mean number of tokens that a step commits with the best tree of n rows.

    `rows` is n and includes the root. Positions are assumed to be independent, so the value of a
    node is the product of its ranks' probabilities on the path to it. The best tree consists of the
    most valuable nodes, since a parent is never worth less than its child. This is the optimum of
    Sequoia's dynamic program (arXiv 2402.12374) without a depth limit.
    """
    order = sorted((p for p in ranks if p > 0), reverse=True)
    heap = (
        [(-order[0], 1.0, 0)] if order else []
    )  # (-value, value of the parent, index among the siblings)
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
    """The tokens per second that no scheme exceeds: the lower of two limits.

    drafting   1/t + 1/T(1): an autoregressive drafter that is always right, plus the target
    verifying  the maximum of E(n) / T(n), reached at `rows` rows
    chain      the same maximum for chains, which guess one token per position; trees can gain the
               difference between `verifying` and `chain`
    """

    drafting: float
    verifying: float
    rows: int
    chain: float

    @property
    def rate(self) -> float:
        return min(self.drafting, self.verifying)


def bound(draft_step: float, target_steps: Mapping[int, float], ranks: Sequence[float]) -> Bound:
    """Compute the bound from step times in seconds.

    `draft_step` is t, the drafter's time for one row. `target_steps` maps rows to T(n) and includes
    1. E(n) assumes independent positions (`expected_tokens`).
    """
    rates = {rows: expected_tokens(ranks, rows) / seconds for rows, seconds in target_steps.items()}
    chain = max(
        expected_tokens(ranks[:1], rows) / seconds for rows, seconds in target_steps.items()
    )
    rows = max(rates, key=lambda n: rates[n])
    return Bound(1 / draft_step + 1 / target_steps[1], rates[rows], rows, chain)
