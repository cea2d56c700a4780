"""Prefills prompts in chunks between steps, several sessions in one pass.

What another cache already holds is copied, unless log-probabilities of the prompt are asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.core.clock import Clock
from runtime.core.errors import SESSION_FAULTS
from runtime.core.features import FeatureBuffer
from runtime.core.messages import Logprob
from runtime.core.sampler_reference import LogprobScorer
from runtime.kv.base import KVCache
from runtime.kv.prefix_cache import Ids, PrefixCache, common_length
from runtime.models.base import Model, PassInput, PassOutput, causal
from runtime.target.drafter_manager import DrafterManager
from runtime.target.request_state import RequestState
from runtime.target.standby import StandbyTexts

CHUNK_TOKENS = 512  # per pass
BUSY_CHUNK_TOKENS = 64  # per text, while other sessions are decoding
MIN_SHARED_TOKENS = 32  # shared beginning that is worth waiting for
MAX_LOGITS = 1 << 24  # of prompts, per pass: 64 MiB in float32


@dataclass(slots=True)
class PrefillResult:
    """`rows` were computed and `reused` tokens copied; `failed` lists sessions with their errors;
    `scored` lists sessions with the logprobs of their next prompt tokens; `done` is the clock
    reading at the end.
    """

    done: float
    rows: int = 0
    reused: int = 0
    failed: list[tuple[RequestState, Exception]] = field(default_factory=list)
    scored: list[tuple[RequestState, tuple[Logprob, ...]]] = field(default_factory=list)


def prefill_next(
    model: Model,
    prefixes: PrefixCache,
    standby: StandbyTexts,
    drafters: DrafterManager,
    sessions: Sequence[RequestState],
    score: LogprobScorer,
    began: float,
    clock: Clock,
) -> PrefillResult:
    """Continue the prefill of `sessions`: all tokens of each text but the last.

    Runs one pass. While sessions are decoding, it runs enough passes to give every urgent prompt
    one chunk; otherwise the last of these would wait for a step after each of the earlier passes.
    """
    found, stepping = PrefillResult(began), any(state.ready for state in sessions)
    left = (
        sum(min(BUSY_CHUNK_TOKENS, unread_tokens(state)) for state in sessions if is_urgent(state))
        if stepping
        else 0
    )
    while True:
        before = found.rows
        prefill_pass(model, prefixes, standby, drafters, sessions, score, found, clock)
        left -= found.rows - before
        if left <= 0 or found.failed or not any(map(is_urgent, sessions)):
            return found


def unread_tokens(state: RequestState) -> int:
    """Return the number of tokens still to prefill."""
    return len(state.session.tokens) - 1 - state.cache.length


def unscored_rows(state: RequestState) -> int:
    """Return the number of tokens still to prefill whose logits give logprobs of the prompt."""
    if state.session.request.sampling.prompt_logprobs is None:
        return 0
    return max(0, state.session.prompt - 1 - state.cache.length)


def is_urgent(state: RequestState) -> bool:
    """Return True if the text was begun on another target, or fits in one chunk."""
    return not state.ready and (
        bool(state.session.request.committed) or unread_tokens(state) <= BUSY_CHUNK_TOKENS
    )


def prefill_order(state: RequestState) -> tuple[bool, bool]:
    return unread_tokens(state) > BUSY_CHUNK_TOKENS, not state.session.request.committed


def prefill_pass(
    model: Model,
    prefixes: PrefixCache,
    standby: StandbyTexts,
    drafters: DrafterManager,
    sessions: Sequence[RequestState],
    score: LogprobScorer,
    found: PrefillResult,
    clock: Clock,
) -> None:
    """Run one pass: texts that fit in one chunk first, then resumed texts, then the oldest.

    A text waits while another one read in this pass shares a longer beginning with it than any
    cache does: that beginning can be copied next time. Rows that score a prompt have at most
    MAX_LOGITS logits in all; what has more waits too.
    """
    began, reading = (
        found.done,
        sorted((state for state in sessions if not state.ready), key=prefill_order),
    )
    budget = (
        CHUNK_TOKENS
        if len(reading) == len(sessions)
        else min(CHUNK_TOKENS, BUSY_CHUNK_TOKENS * len(reading))
    )
    scored_rows = max(1, MAX_LOGITS // model.vocabulary)
    others: list[tuple[Sequence[int] | Ids, KVCache]] = [
        *((other.session.tokens[:-1], other.cache) for other in sessions if other.ready),
        *standby.in_use(),
    ]
    pieces, read_now = list[tuple[RequestState, PassInput]](), dict[tuple[int, ...], list[Ids]]()
    for state in reading:
        if budget <= 0:
            break
        text = np.asarray(state.session.tokens[:-1], dtype=np.int64)
        alike = read_now.setdefault(tuple(state.session.tokens[:MIN_SHARED_TOKENS]), [])
        unscored = unscored_rows(state)
        count = min(budget, unscored, scored_rows) if unscored else budget
        if count <= 0:
            continue
        try:
            if state.cache.length == 0 and not unscored:
                cached = prefixes.longest(state.session.tokens, others)
                most = 0 if cached is None else cached[1]
                if (
                    max((common_length(text, other) for other in alike), default=0)
                    >= most + MIN_SHARED_TOKENS
                ):
                    continue
                if cached is not None:
                    drafters.features.reuse(state, features_of(cached[0], sessions, prefixes), most)
                    state.cache, state.reused = cached[0].fork(most), most
                    found.reused += most
        except SESSION_FAULTS as error:
            found.failed.append((state, error))
            continue
        alike.append(text)
        start = state.cache.length
        tokens = text[start : start + count]
        budget -= len(tokens)
        if unscored:
            scored_rows -= len(tokens)
        last = None if unscored else 0
        pieces.append((state, PassInput(state.cache, causal(tokens, start), last)))
    forward_pieces(model, drafters, pieces, score, found)
    found.done = clock()
    for state, part in pieces:
        found.rows += len(part.rows.tokens)
        state.ready = state.cache.length == len(state.session.tokens) - 1
        state.prefilled += found.done - began
        state.committed_at = state.growth_at = found.done
        drafters.send_features(state, part.rows.prefix)


def features_of(
    cache: KVCache, sessions: Sequence[RequestState], prefixes: PrefixCache
) -> FeatureBuffer | None:
    """Return the features of the text in a cache, of a running session or of a finished text."""
    for state in sessions:
        if state.cache is cache:
            return state.features
    return prefixes.features_of(cache)


def forward_pieces(
    model: Model,
    drafters: DrafterManager,
    pieces: Sequence[tuple[RequestState, PassInput]],
    score: LogprobScorer,
    found: PrefillResult,
) -> None:
    """Run one pass. If it fails, run one per text: a text that fails again is at fault itself."""
    reading = [(state, part) for state, part in pieces if len(part.rows.tokens)]
    try:
        if reading:
            shown = drafters.features.read(
                model, [part for _, part in reading], [state for state, _ in reading]
            )
            for (state, part), output in zip(reading, shown, strict=True):
                drafters.features.record(state, part.rows.prefix, output.features)
                if part.last is None:
                    score_prompt(state, part, output, score, found)
    except SESSION_FAULTS as error:
        if len(pieces) > 1:
            for one in pieces:
                forward_pieces(model, drafters, [one], score, found)
        else:
            found.failed.append((pieces[0][0], error))


def score_prompt(
    state: RequestState,
    part: PassInput,
    output: PassOutput,
    score: LogprobScorer,
    found: PrefillResult,
) -> None:
    """Add the logprobs of the tokens that follow the rows of a pass."""
    first, count = part.rows.prefix + 1, len(part.rows.tokens)
    tokens = state.session.tokens[first : first + count]
    try:
        k = state.session.request.sampling.prompt_logprobs or 0
        found.scored.append((state, score(output.logits[:count], tokens, k)))
    except SESSION_FAULTS as error:
        found.failed.append((state, error))
