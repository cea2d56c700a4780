"""The figures of a session that several targets have worked on, one after the other."""

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

from runtime.messages import Stats


def seen(prompt: int, guessed: Sequence[Sequence[str]]) -> Stats:
    """Of a part whose target took its own figures along: what its chunks tell. Nodes that were not delivered are not known.

    prompt   tokens
    guessed  for each chunk, who guessed each token of it ("": nobody)
    """
    accepted = [[name for name in names if name] for names in guessed]
    lengths = Counter(len(names) for names in accepted if names)
    total = sum(map(len, accepted))
    return Stats(
        prompt_tokens=prompt,
        completion_tokens=sum(map(len, guessed)),
        rounds=len(guessed),
        drafted=total,
        verified=total,
        accepted=total,
        hits=0,
        histogram=tuple(lengths[length] for length in range(max(lengths, default=-1) + 1)),
        by_drafter=dict(Counter(name for names in accepted for name in names)),
    )


def joined(parts: Sequence[Stats], completion: int, elapsed: float) -> Stats:
    """Of the whole: counts and times of all parts together; `completion` tokens and seconds are the session's."""
    first = parts[0]
    return Stats(
        prompt_tokens=first.prompt_tokens,
        completion_tokens=completion,
        rounds=sum(part.rounds for part in parts),
        drafted=sum(part.drafted for part in parts),
        verified=sum(part.verified for part in parts),
        accepted=sum(part.accepted for part in parts),
        hits=sum(part.hits for part in parts),
        histogram=tuple(sum(counts) for counts in zip_longest(*(part.histogram for part in parts), fillvalue=0)),
        by_drafter=dict(sum((Counter(part.by_drafter) for part in parts), Counter())),
        ignored=dict(sum((Counter(part.ignored) for part in parts), Counter())),
        elapsed=elapsed,
        prefill=sum(part.prefill for part in parts),
        reused=min(parts[-1].reused, first.prompt_tokens),  # the last target's may count committed tokens too
        waited=sum(part.waited for part in parts),
        computed=sum(part.computed for part in parts),
        bookkeeping=sum(part.bookkeeping for part in parts),
    )
