"""Which drafters get a share of the tree, and which heads are asked: all but those whose guesses have brought nothing for a while."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

TRIAL_COMMITS = 64  # commits that a drafter is given to show something
REST_COMMITS = 512  # commits that it rests before it is tried again
MIN_TOKENS_PER_COMMIT = 0.01  # tokens per commit that are worth a share


class DrafterUtility:
    """Counts what each drafter was the first to guess and the target took. All sessions of a target count together."""

    def __init__(self) -> None:
        self.commits: Counter[str] = Counter()  # since its trial or rest began
        self.tokens: Counter[str] = Counter()
        self.spent: defaultdict[str, float] = defaultdict(float)  # seconds of the target's
        self.resting: set[str] = set()

    def charge(self, heads: Collection[str], seconds: float) -> None:
        """Charge the seconds that the target has waited for these together to each in equal parts."""
        for head in heads:
            self.spent[head] += seconds / len(heads)

    def reset(self) -> None:
        """Let all show again what they are good for."""
        self.commits.clear()
        self.tokens.clear()
        self.spent.clear()
        self.resting.clear()

    def observe(
        self, drafters: Iterable[str], guessed: Iterable[str], rate: float = 0.0
    ) -> set[str]:
        """One commit to these drafters, with accepted tokens guessed by those; returns whose rest begins or ends.

        `rate`: tokens a second of the target. A head must bring more than the target would have written in the time that it took.
        """
        changed: set[str] = set()
        self.tokens.update(name for name in guessed if name)
        for name in drafters:
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
        """A drafter has gone: whoever comes under its name begins anew."""
        self.resting.discard(drafter)
        del self.commits[drafter], self.tokens[drafter]

    def active(self, drafters: Iterable[str]) -> list[str]:
        return [name for name in drafters if name not in self.resting]
