"""Suspends drafters and heads whose guesses have contributed nothing for a while.

Only active drafters get a share of the tree, and only active heads are used.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

TRIAL_COMMITS = 64  # commits before a drafter is judged
REST_COMMITS = 512  # commits before a resting drafter is tried again
MIN_TOKENS_PER_COMMIT = 0.01  # below it a drafter rests


class DrafterUtility:
    """Counts accepted tokens by the drafter that guessed them first, over all sessions of
    a target.
    """

    def __init__(self) -> None:
        self.commits: Counter[str] = Counter()  # since its trial or rest began
        self.tokens: Counter[str] = Counter()
        self.spent: defaultdict[str, float] = defaultdict(float)  # seconds of the target's
        self.resting: set[str] = set()
        self.paused: set[str] = set()  # by the speculation gate; not judged meanwhile

    def charge(self, heads: Collection[str], seconds: float) -> None:
        """Charge seconds for which the target waited for these heads, in equal parts."""
        for head in heads:
            self.spent[head] += seconds / len(heads)

    def reset(self) -> None:
        """Restart the trial of every drafter and head."""
        self.commits.clear()
        self.tokens.clear()
        self.spent.clear()
        self.resting.clear()

    def observe(
        self, drafters: Iterable[str], guessed: Iterable[str], rate: float = 0.0
    ) -> set[str]:
        """Record one commit sent to `drafters`, with accepted tokens guessed by `guessed`.

        Returns those whose rest begins or ends. `rate` is the target's tokens per second: a head
        must contribute more than the target could have generated in the time the head took.
        """
        changed: set[str] = set()
        self.tokens.update(name for name in guessed if name)
        for name in drafters:
            if name in self.paused:
                continue
            self.commits[name] += 1
            resting = name in self.resting
            if self.commits[name] < (REST_COMMITS if resting else TRIAL_COMMITS):
                continue
            useless = not resting and self.tokens[name] < max(
                MIN_TOKENS_PER_COMMIT * self.commits[name], rate * self.spent[name]
            )
            if useless != resting:
                changed.add(name)
                self.resting ^= {name}
            self.commits[name] = self.tokens[name] = 0
            self.spent[name] = 0.0
        return changed

    def forget(self, drafter: str) -> None:
        """Remove a drafter that has left: its name starts afresh."""
        self.resting.discard(drafter)
        self.paused.discard(drafter)
        del self.commits[drafter], self.tokens[drafter]
        self.spent.pop(drafter, None)

    def active(self, drafters: Iterable[str]) -> list[str]:
        return [name for name in drafters if name not in self.resting | self.paused]
