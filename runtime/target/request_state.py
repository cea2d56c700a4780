"""The state of a running session, including what it holds on the target's device."""

from collections import Counter
from collections.abc import Sized
from dataclasses import dataclass, field

import numpy as np

from runtime.core.features import FeatureBuffer
from runtime.core.messages import Chunk, Commit, Draft, Logprob, Round, Stats
from runtime.kv.base import KVCache
from runtime.schedulers.base import SessionView
from runtime.target.commands import AddRequest
from runtime.target.session import Session
from runtime.telemetry.metrics import SessionMetrics


@dataclass(slots=True)
class RequestState:
    """Times are readings of the engine's clock, or durations in seconds."""

    session: Session
    cache: KVCache
    admitted: AddRequest
    slots: int  # of KV memory, reserved for it
    metrics: SessionMetrics = field(default_factory=SessionMetrics)
    ready: bool = False  # all but the last token of the text is in the cache
    reused: int = 0  # tokens of the prompt that came from another text's cache
    prefilled: float = 0.0  # seconds that the prompt took
    committed_at: float = 0.0
    growth_at: float = 0.0  # last growth, or last commit where none has come since
    growths: int = 0  # since the last commit
    hit: bool = False
    width: int = 0  # rows beside the root in its last step
    depth: int = 0  # of its tree, when it was looked at last
    reach: dict[str, int] = field(
        default_factory=dict
    )  # length of the longest text that each drafter has guessed
    answered: set[str] = field(
        default_factory=set
    )  # drafters that have guessed what follows the last commit
    reopened: set[str] = field(
        default_factory=set
    )  # drafters that were told the whole text since the last commit
    untold: dict[str, int] = field(
        default_factory=dict
    )  # position of the first token that each resting drafter has not been told
    lost: set[str] = field(
        default_factory=set
    )  # drafters that have asked for the text while they rested
    head_drafts: list[Draft] = field(
        default_factory=list
    )  # what heads guess from the root, to be offered before the next step
    features: FeatureBuffer | None = None  # of its committed tokens; None: no drafter has asked
    features_sent: dict[str, int] = field(
        default_factory=dict
    )  # position of the first row that each drafter still lacks
    accepted: Counter[str] = field(
        default_factory=Counter
    )  # delivered tokens by the drafter that guessed them

    def view(self, now: float, waited: float, drafters: int) -> SessionView:
        gains, leaves, depth = self.session.marginal_gains()
        self.depth = depth
        return SessionView(
            gains=gains,
            leaves=leaves,
            depth=depth,
            drafters=drafters
            if min(self.session.room, self.session.max_step_nodes) > 0
            else 0,  # nobody can help with the last token
            coverage=self.session.bucket.coverage,
            hit=self.hit,
            width=self.width,
            waited=waited,
            since_commit=now - self.committed_at,
            since_growth=now - self.growth_at,
            growths=self.growths,
        )

    def record_commit(self, done: Round, at: float) -> None:
        self.metrics.add(done)
        self.hit, self.width, self.growths = done.hit, done.width, 0
        self.committed_at = self.growth_at = at
        self.answered.clear()
        self.reopened.clear()

    def record_growth(self, at: float) -> tuple[float, bool]:
        """Return the seconds since the previous commit or growth, and True if it was a commit."""
        delay, first = max(0.0, at - self.growth_at), self.growths == 0
        self.growth_at = at
        self.growths += 1
        return delay, first

    def record_reach(self, drafter: str, new: int) -> None:
        """Record that the newest `new` nodes of the tree came from this drafter."""
        length = len(self.session.tokens) + max(self.session.tree.depth[-new:])
        self.reach[drafter] = max(length, self.reach.get(drafter, 0))

    def round_trip(self, draft: Draft, at: float) -> float | None:
        """Return the seconds from the last commit to the drafter's first growth on it,
        else None.
        """
        if (
            draft.drafter in self.answered
            or not (draft.parents == np.uint64(self.session.tree.key[0])).any()
        ):
            return None
        self.answered.add(draft.drafter)
        return max(0.0, at - self.committed_at)

    def lead(self, drafter: str) -> int:
        """Return how many tokens the drafter is ahead.

        The value is at most the depth of the tree, because guesses may have been dropped.
        """
        return max(0, min(self.depth, self.reach.get(drafter, 0) - len(self.session.tokens)))

    def fallback_cause(self, drafters: Sized, active: Sized, paused: bool = False) -> str | None:
        """Return what this step lacks, in the words of TargetReport; None if nothing is missing.

        Also None if nothing could help.
        """
        session = self.session
        if not session.request.speculation or min(session.room, session.max_step_nodes) <= 0:
            return None
        if not len(drafters):
            return "no drafter"
        if paused:
            return "plain faster"
        if not len(active):
            return "all resting"
        return "empty tree" if len(session.tree) == 1 else None

    def make_chunk(
        self, commit: Commit, guessed: tuple[str, ...], logprobs: tuple[Logprob, ...] = ()
    ) -> Chunk:
        """Feed tokens one by one to the stop checker; tokens after the end are not delivered."""
        pieces: list[str] = []
        reason = None
        for token in commit.tokens:
            delta = self.admitted.stop_checker.feed(token)
            pieces.append(delta.text)
            reason = delta.reason
            if reason is not None:
                break
        count = len(pieces)
        self.accepted.update(name for name in guessed[:count] if name)
        return Chunk(
            tuple(pieces), commit.tokens[:count], guessed[:count], reason, logprobs=logprobs[:count]
        )

    def stats(self, now: float) -> Stats:
        return self.metrics.stats(
            prompt_tokens=self.session.prompt,
            completion_tokens=self.admitted.stop_checker.count,
            drafted=self.session.drafted,
            by_drafter=self.accepted,
            ignored=self.session.ignored,
            prefill=self.prefilled,
            elapsed=now - self.admitted.received_at,
            reused=self.reused,
        )
