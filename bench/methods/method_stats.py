"""The statistics of one drafting method, and the figures derived from them."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.core.methods import Outcome
from runtime.telemetry.tracing import STEP, Recording, Span

FIRST_RANKS = 4


@dataclass(slots=True)
class MethodStats:
    """One method at one temperature; values are summed over prompts unless stated otherwise.

    rates       tokens per second of decoding, by prompt
    times       milliseconds per step by prompt: the target's pass and bookkeeping, without waits
    seconds     time of the passes that guessed, by guesser
    passes      the number of these passes, by guesser
    nodes       nodes that were new to the target's trees, by guesser
    accepted    the delivered ones of these nodes, by guesser
    acceptance  of the first ranks, by kind of guesser (its name without the number)
    same        True if the tokens are those of plain decoding
    """

    name: str
    temperature: float
    rates: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    acceptance: dict[str, list[float]] = field(default_factory=dict)
    same: bool = True

    @property
    def speed(self) -> float:
        return statistics.median(self.rates.values())

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps

    def per_node(self, who: str) -> float | None:
        """Return the guesser's milliseconds per new node, or None if there was none."""
        return (
            1e3 * self.seconds[who] / self.nodes[who]
            if self.nodes.get(who) and who in self.seconds
            else None
        )


def add_run(
    one: MethodStats,
    prompt: str,
    outcome: Outcome,
    recordings: Sequence[Recording],
    learned: Mapping[str, Any],
    nodes: Mapping[str, int],
) -> None:
    """Add a run. A run that ended with its first tokens is ignored."""
    tokens, seconds = (
        sum(map(len, outcome.outputs)) - outcome.first_tokens,
        outcome.seconds - outcome.first_seconds,
    )
    steps = outcome.steps
    if steps is None or steps.rounds < 2 or tokens < 1 or seconds <= 0:
        return
    one.rates[prompt] = tokens / seconds
    one.times[prompt] = (
        1e3 * (steps.computed + steps.bookkeeping) / (steps.rounds - 1)
    )  # of decoding: the first step is excluded
    one.tokens += sum(map(len, outcome.outputs))
    one.steps += steps.rounds
    one.accepted = sum_counts(one.accepted, steps.by_drafter)
    one.nodes = sum_counts(one.nodes, nodes)
    for part in recordings:
        for event in part.events:
            if isinstance(event, Span) and event.name == STEP and event.figures.get("leaves", 1):
                one.seconds[event.lane] = (
                    one.seconds.get(event.lane, 0.0) + event.ended - event.began
                )
                one.passes[event.lane] = one.passes.get(event.lane, 0) + 1
    one.acceptance = acceptance_by_rank(learned.get(f"{one.temperature:.1f}", {}))


def sum_counts(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return dict(Counter(one) + Counter(other))


def acceptance_by_rank(band: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return how often a guess was right once its parent was, for the first ranks of each guesser
    kind."""
    found = {}
    for who, (tries, hits) in band.get("tables", {}).items():
        sums = [(sum(tries[rank]), sum(hits[rank])) for rank in range(FIRST_RANKS)]
        found[who] = [right / all_ if all_ else 0.0 for all_, right in sums]
    return found


def median_ratio(above: MethodStats, below: MethodStats) -> float:
    """Return the median speed-up over the prompts that both have."""
    return statistics.median(
        above.rates[prompt] / below.rates[prompt]
        for prompt in above.rates.keys() & below.rates.keys()
    )


def extra_step_ms(one: MethodStats, plain: MethodStats) -> float:
    """Return the median milliseconds that a step takes beyond one of plain decoding, over shared
    prompts."""
    return statistics.median(
        one.times[prompt] - plain.times[prompt] for prompt in one.times.keys() & plain.times.keys()
    )
