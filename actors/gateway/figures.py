"""What an answer says of its own making: usage, and how speculation went. Shared by the gateway and the command line."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from runtime.messages import Stats
from runtime.metrics import speculative_decoding


def tokens_per_second(stats: Stats) -> float:
    """Tokens delivered over the time from the target's taking the request to its last token, prefill included."""
    return stats.completion_tokens / stats.elapsed if stats.elapsed else 0.0


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """OpenAI's object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def metrics(stats: Stats) -> dict[str, Any]:
    """vLLM's `speculative_decoding`, and our own figures beside it."""
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


def together(parts: Sequence[Stats]) -> Stats:
    """Of sessions that ran beside each other: everything is their sum, but for the time that elapsed."""
    return Stats(
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        completion_tokens=sum(part.completion_tokens for part in parts),
        rounds=sum(part.rounds for part in parts),
        drafted=sum(part.drafted for part in parts),
        verified=sum(part.verified for part in parts),
        accepted=sum(part.accepted for part in parts),
        hits=sum(part.hits for part in parts),
        histogram=tuple(map(sum, zip_longest(*(part.histogram for part in parts), fillvalue=0))),
        by_drafter=added(part.by_drafter for part in parts),
        ignored=added(part.ignored for part in parts),
        elapsed=max((part.elapsed for part in parts), default=0.0),
        prefill=sum(part.prefill for part in parts),
        reused=sum(part.reused for part in parts),
        waited=sum(part.waited for part in parts),
        computed=sum(part.computed for part in parts),
        bookkeeping=sum(part.bookkeeping for part in parts),
    )


def added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return dict(total)
