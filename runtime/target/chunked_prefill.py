"""Prompts are read piece by piece between steps, those of several sessions in one pass; what some cache holds already is copied."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.core.clock import Clock
from runtime.core.errors import FAULTS
from runtime.kv.prefix_cache import Ids, PrefixCache, common_length
from runtime.models.base import Model, PassInput, causal
from runtime.target.request_state import RequestState

CHUNK = 512  # tokens that are read at once
CHUNK_BESIDE = 64  # of each text, where other sessions wait for their step meanwhile
ALIKE = 32  # tokens that are worth waiting for, and by which texts are taken to begin alike


@dataclass(slots=True)
class PrefillResult:
    """`rows` were computed, `reused` tokens copied; who failed, and why; `done`: the clock after it."""

    done: float
    rows: int = 0
    reused: int = 0
    failed: list[tuple[RequestState, Exception]] = field(default_factory=list)


def prefill_next(
    model: Model,
    prefixes: PrefixCache,
    sessions: Sequence[RequestState],
    began: float,
    clock: Clock,
) -> PrefillResult:
    """Read on in what is not in the caches of `sessions`: all but the last token of each text.

    One pass. Where others wait for their step and many texts are in a hurry, as many as these need for a piece of each: else the last
    of them would wait for a step of all those before it, again after each pass.
    """
    found, stepping = PrefillResult(began), any(live.ready for live in sessions)
    left = (
        sum(min(CHUNK_BESIDE, missing(live)) for live in sessions if is_urgent(live))
        if stepping
        else 0
    )
    while True:
        before = found.rows
        read_pieces(model, prefixes, sessions, found, clock)
        left -= found.rows - before
        if left <= 0 or found.failed or not any(map(is_urgent, sessions)):
            return found


def missing(live: RequestState) -> int:
    """Tokens that are yet to be read."""
    return len(live.session.tokens) - 1 - live.cache.length


def is_urgent(live: RequestState) -> bool:
    """Whether its client waits in the midst of a text that was begun elsewhere, or it is read in one piece."""
    return not live.ready and (
        bool(live.session.request.committed) or missing(live) <= CHUNK_BESIDE
    )


def order(live: RequestState) -> tuple[bool, bool]:
    return missing(live) > CHUNK_BESIDE, not live.session.request.committed


def read_pieces(
    model: Model,
    prefixes: PrefixCache,
    sessions: Sequence[RequestState],
    found: PrefillResult,
    clock: Clock,
) -> None:
    """One pass: what can be read in one piece first, then what was begun elsewhere, then the oldest. A text waits while one that is read
    now has more in common with it than any cache: it can be copied next time."""
    began, reading = found.done, sorted((live for live in sessions if not live.ready), key=order)
    budget = CHUNK if len(reading) == len(sessions) else min(CHUNK, CHUNK_BESIDE * len(reading))
    others = [(other.session.tokens[:-1], other.cache) for other in sessions if other.ready]
    pieces, read_now = list[tuple[RequestState, PassInput]](), dict[tuple[int, ...], list[Ids]]()
    for live in reading:
        if budget <= 0:
            break
        text = np.asarray(live.session.tokens[:-1], dtype=np.int64)
        alike = read_now.setdefault(tuple(live.session.tokens[:ALIKE]), [])
        try:
            if live.cache.length == 0:
                cached = prefixes.longest(live.session.tokens, others)
                most = 0 if cached is None else cached[1]
                if max((common_length(text, other) for other in alike), default=0) >= most + ALIKE:
                    continue
                if cached is not None:
                    live.cache, live.reused = cached[0].fork(most), most
                    found.reused += most
        except FAULTS as error:
            found.failed.append((live, error))
            continue
        alike.append(text)
        start = live.cache.length
        tokens = text[start : start + budget]
        budget -= len(tokens)
        pieces.append((live, PassInput(live.cache, causal(tokens, start), last=0)))
    compute(model, pieces, found)
    found.done = clock()
    for live, part in pieces:
        found.rows += len(part.rows.tokens)
        live.ready = live.cache.length == len(live.session.tokens) - 1
        live.prefilled += found.done - began
        live.committed_at = live.growth_at = found.done


def compute(
    model: Model, pieces: Sequence[tuple[RequestState, PassInput]], found: PrefillResult
) -> None:
    """One pass; where it fails, one for each text: what fails again is that text's own fault."""
    try:
        if parts := [part for _, part in pieces if len(part.rows.tokens)]:
            model.forward_all(parts)
    except FAULTS as error:
        if len(pieces) > 1:
            for one in pieces:
                compute(model, [one], found)
        else:
            found.failed.append((pieces[0][0], error))
