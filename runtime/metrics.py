"""Rounds folded into the figures of a session. Everything reported is derived from these records."""

from collections import Counter
from collections.abc import Mapping

from runtime.messages import Round, Stats


class Tally:
    """The running sums of one session."""

    def __init__(self) -> None:
        self.rounds: list[Round] = []

    def add(self, done: Round) -> None:
        self.rounds.append(done)

    def stats(
        self,
        prompt_tokens: int,
        completion_tokens: int,
        drafted: int,
        by_drafter: Mapping[str, int],
        ignored: Mapping[str, int],
        prefill: float,
        elapsed: float,
        reused: int = 0,
    ) -> Stats:
        """Times in seconds. `elapsed` runs from the taking of the request to its last token."""
        histogram = Counter(done.accepted for done in self.rounds)
        return Stats(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            rounds=len(self.rounds),
            drafted=drafted,
            verified=sum(done.width for done in self.rounds),
            accepted=sum(by_drafter.values()),
            hits=sum(done.hit for done in self.rounds),
            histogram=tuple(histogram[n] for n in range(max(histogram, default=0) + 1)),
            by_drafter=dict(by_drafter),
            ignored=dict(ignored),
            elapsed=elapsed,
            prefill=prefill,
            reused=reused,
            waited=sum(done.waited for done in self.rounds),
            computed=sum(done.computed for done in self.rounds),
            bookkeeping=sum(done.bookkeeping for done in self.rounds),
        )


def speculative_decoding(stats: Stats) -> dict[str, object]:
    """The object that vLLM reports under this name.

    mean_acceptance_length counts the target's own token, as there. A tree spends several rows on one position, so
    draft_acceptance_rate (accepted over verified nodes) is lower than for a chain of the same use.
    """
    return {
        "mean_acceptance_length": stats.completion_tokens / stats.rounds if stats.rounds else 0.0,
        "draft_acceptance_rate": stats.accepted / stats.verified if stats.verified else 0.0,
        "acceptance_histogram": list(stats.histogram),
        "num_drafts": sum(stats.histogram[1:]) if stats.verified else 0,
        "num_draft_tokens": stats.verified,
        "num_accepted_tokens": stats.accepted,
    }
