"""Builds the usage and metrics fields of a response, for the gateway and the command line."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from runtime.core.messages import NO_STATS, Stats
from runtime.telemetry.metrics import speculative_decoding


def tokens_per_second(stats: Stats) -> float:
    """Returns the delivered tokens per second.

    The time runs from when the target accepts the request to its last token, prefill included.
    """
    return stats.completion_tokens / stats.elapsed if stats.elapsed else 0.0


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """Returns OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def metrics(stats: Stats) -> dict[str, Any]:
    """Returns vLLM's `speculative_decoding` object, and the project's own metrics next to it."""
    return {
        "tokens_per_second": tokens_per_second(stats),
        "speculative_decoding": speculative_decoding(stats),
        "outrider": {
            "target_steps": stats.rounds,
            "hit_rate": stats.hits / stats.rounds if stats.rounds else 0.0,
            "nodes_drafted": stats.drafted,
            "nodes_verified": stats.verified,
            "nodes_accepted": stats.accepted,
            "accepted_by_drafter": stats.by_drafter,
            "ignored": stats.ignored,
            "seconds": {
                "elapsed": stats.elapsed,
                "prefill": stats.prefill,
                "computing": stats.computed,
                "waiting": stats.waited,
                "bookkeeping": stats.bookkeeping,
            },
        },
    }


def merge_stats(parts: Sequence[Stats]) -> Stats:
    """Returns the statistics of concurrent sessions: sums, and the longest elapsed time."""
    return replace(sum(parts, NO_STATS), elapsed=max((part.elapsed for part in parts), default=0.0))
