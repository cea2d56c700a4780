"""A session under way, with what belongs to it on the target's device."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from runtime.finish import Finish
from runtime.kv.base import KVCache
from runtime.messages import Chunk, Commit, Request, Round, Stats
from runtime.metrics import Tally
from runtime.schedulers.base import View
from runtime.session import Session

Deliver = Callable[[Chunk], None]


@dataclass(frozen=True, slots=True)
class Admit:
    request: Request
    finish: Finish
    deliver: Deliver
    asked: float = 0.0  # clock when the target took the request


@dataclass(slots=True)
class Live:
    """Times are readings of the engine's clock, or seconds."""

    session: Session
    cache: KVCache
    admitted: Admit
    slots: int  # of KV memory, reserved for it
    tally: Tally = field(default_factory=Tally)
    ready: bool = False  # all but the last token of the text is in the cache
    reused: int = 0  # tokens of the prompt that came from another text's cache
    prefilled: float = 0.0  # seconds that the prompt took
    committed_at: float = 0.0
    growth_at: float = 0.0  # last growth, or last commit where none has come since
    growths: int = 0  # since the last commit
    hit: bool = False
    width: int = 0  # rows beside the root in its last step
    accepted: Counter[str] = field(default_factory=Counter)  # delivered tokens by the drafter that guessed them

    def view(self, now: float, waited: float, drafters: int) -> View:
        gains, leaves, depth = self.session.worth()
        return View(
            gains=gains,
            leaves=leaves,
            depth=depth,
            drafters=drafters if self.session.room > 0 else 0,  # nobody can help with the last token
            promise=self.session.band.promise,
            hit=self.hit,
            width=self.width,
            waited=waited,
            since_commit=now - self.committed_at,
            since_growth=now - self.growth_at,
            growths=self.growths,
        )

    def committed(self, done: Round, at: float) -> None:
        self.tally.add(done)
        self.hit, self.width, self.growths = done.hit, done.width, 0
        self.committed_at = self.growth_at = at

    def grown(self, at: float) -> tuple[float, bool]:
        """Seconds since the commit or the growth before this one, and whether it was a commit."""
        delay, first = max(0.0, at - self.growth_at), self.growths == 0
        self.growth_at = at
        self.growths += 1
        return delay, first

    def hand_out(self, commit: Commit, guessed: tuple[str, ...]) -> Chunk:
        """Tokens one by one through the finish function: what comes after the end is not handed out."""
        pieces: list[str] = []
        reason = None
        for token in commit.tokens:
            delta = self.admitted.finish.feed(token)
            pieces.append(delta.text)
            reason = delta.reason
            if reason is not None:
                break
        count = len(pieces)
        self.accepted.update(name for name in guessed[:count] if name)
        return Chunk(tuple(pieces), commit.tokens[:count], guessed[:count], reason)

    def stats(self, now: float) -> Stats:
        return self.tally.stats(
            prompt_tokens=self.session.prompt,
            completion_tokens=self.admitted.finish.count,
            drafted=self.session.drafted,
            by_drafter=self.accepted,
            ignored=self.session.ignored,
            prefill=self.prefilled,
            elapsed=now - self.admitted.asked,
            reused=self.reused,
        )
