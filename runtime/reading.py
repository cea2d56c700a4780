"""Prompts are read piece by piece between steps, those of several sessions in one pass; what some cache holds already is copied."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.clock import Clock
from runtime.errors import OutriderError
from runtime.kv.prefixes import Prefixes
from runtime.live import Live
from runtime.models.base import Model, Part, causal

CHUNK = 512  # tokens that are read at once
CHUNK_BESIDE = 64  # of each text, where other sessions wait for their step meanwhile
ALIKE = 32  # first tokens by which texts are taken to begin alike

# What a request, a model or a tokenizer may raise: it ends that session. Any other error is a fault of the loop itself.
FAILURES = (OutriderError, RuntimeError, ValueError, MemoryError, LookupError, TypeError, AttributeError, ArithmeticError)


@dataclass(slots=True)
class Read:
    """`rows` were computed, `reused` tokens copied; who failed, and why; `done`: the clock after it."""

    done: float
    rows: int = 0
    reused: int = 0
    failed: list[tuple[Live, Exception]] = field(default_factory=list)


def read_on(model: Model, prefixes: Prefixes, sessions: Sequence[Live], began: float, clock: Clock) -> Read:
    """Read the next piece of what is not in the caches of `sessions`, oldest first: all but the last token of each text.

    A text that begins like another one waits until it can have that beginning from its cache.
    """
    reading = [live for live in sessions if not live.ready]
    budget = CHUNK if len(reading) == len(sessions) else min(CHUNK, CHUNK_BESIDE * len(reading))
    found, pieces, beginnings = Read(began), list[tuple[Live, Part]](), set[tuple[int, ...]]()
    for live in reading:
        beginning = tuple(live.session.tokens[:ALIKE])
        if budget <= 0 or beginning in beginnings:
            continue
        beginnings.add(beginning)
        try:
            if live.cache.length == 0:
                found.reused += reuse(live, prefixes, sessions)
        except FAILURES as error:
            found.failed.append((live, error))
            continue
        start = live.cache.length
        tokens = np.asarray(live.session.tokens[:-1][start : start + budget], dtype=np.int64)
        budget -= len(tokens)
        pieces.append((live, Part(live.cache, causal(tokens, start), last=0)))
    compute(model, pieces, found)
    found.done = clock()
    for live, part in pieces:
        found.rows += len(part.rows.tokens)
        live.ready = live.cache.length == len(live.session.tokens) - 1
        live.prefilled += found.done - began
        live.committed_at = live.growth_at = found.done
    return found


def reuse(live: Live, prefixes: Prefixes, sessions: Iterable[Live]) -> int:
    """Begin with a copy of the longest beginning that some text in a cache has in common with this one; returns its length."""
    others = [(other.session.tokens[:-1], other.cache) for other in sessions if other.ready]
    found = prefixes.longest(live.session.tokens, others)
    if found is not None:
        cache, live.reused = found
        live.cache = cache.fork(live.reused)
    return live.reused


def compute(model: Model, pieces: Sequence[tuple[Live, Part]], found: Read) -> None:
    """One pass; where it fails, one for each text: what fails again is that text's own fault."""
    try:
        if parts := [part for _, part in pieces if len(part.rows.tokens)]:
            model.forward_all(parts)
    except FAILURES as error:
        if len(pieces) > 1:
            for one in pieces:
                compute(model, [one], found)
        else:
            found.failed.append((pieces[0][0], error))
