"""Which drafters get a share of the tree: all but those whose guesses have brought nothing for a while."""

from collections import Counter
from collections.abc import Iterable

TRIAL = 64  # commits that a drafter is given to show something
REST = 512  # commits that it rests before it is tried again
LEAST = 0.01  # tokens per commit that are worth a share


class Merit:
    """Counts what each drafter was the first to guess and the target took. All sessions of a target count together."""

    def __init__(self) -> None:
        self.commits: Counter[str] = Counter()  # since its trial or rest began
        self.tokens: Counter[str] = Counter()
        self.resting: set[str] = set()

    def observe(self, drafters: Iterable[str], guessed: Iterable[str]) -> bool:
        """One commit to these drafters, with accepted tokens guessed by those; True where somebody's rest begins or ends."""
        changed = False
        self.tokens.update(name for name in guessed if name)
        for name in drafters:
            self.commits[name] += 1
            resting = name in self.resting
            if self.commits[name] < (REST if resting else TRIAL):
                continue
            useless = not resting and self.tokens[name] < LEAST * self.commits[name]
            if useless != resting:
                changed = True
                self.resting ^= {name}
            self.commits[name] = self.tokens[name] = 0
        return changed

    def forget(self, drafter: str) -> None:
        """A drafter has gone: whoever comes under its name begins anew."""
        self.resting.discard(drafter)
        del self.commits[drafter], self.tokens[drafter]

    def sharers(self, drafters: Iterable[str]) -> list[str]:
        return [name for name in drafters if name not in self.resting]
