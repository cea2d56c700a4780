"""A target and its draft without weights, for a clock that is not real: the text is a pure function of what stands before it,
and the draft knows it as well as the examples say."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from runtime.core.draft_nodes import DraftNodes, stack
from runtime.core.node_names import EMPTY_TEXT, mix64, text_key
from runtime.core.sampler_reference import Ask
from runtime.drafters.base import ExpandRequest, Text
from runtime.kv.base import KVCache
from runtime.models.base import Part, Rows
from runtime.sim.draft_samples import Guesses, Place

VOCABULARY = 64
CONTEXT = 1 << 40
BRANCHES = 4  # children of a leaf, as in drafters/model.py
NEXT, EXAMPLE = 1 << 32, 1 << 33  # what a content name is mixed with: no token ids

Names = npt.NDArray[np.uint64]


def following(key: int) -> int:
    """The token that follows the text of this name."""
    return mix64(key, NEXT) % VOCABULARY


class NameCache:
    """For keys and values: the name of the text that ends in each slot."""

    def __init__(self, names: Sequence[int] = ()) -> None:
        self.names = list(names)

    @property
    def length(self) -> int:
        return len(self.names)

    @property
    def room(self) -> int:
        return self.length

    def append(self, rows: int) -> int:
        self.names += [0] * rows
        return len(self.names) - rows

    def keep(self, prefix: int, slots: Sequence[int]) -> None:
        if not 0 <= prefix <= self.length or any(
            not prefix <= slot < self.length for slot in slots
        ):
            raise IndexError(
                f"prefix {prefix} and slots {list(slots)} of a cache of {self.length} slots"
            )
        self.names[prefix:] = [self.names[slot] for slot in slots]

    def fork(self, length: int) -> "NameCache":
        return NameCache(self.names[:length])

    def truncate(self, length: int) -> None:
        del self.names[length:]


class NamingModel:
    """A Model whose "logits" are names: of the text that each row sees, read through cache and mask like any model's."""

    name, vocabulary, context = "synthetic", VOCABULARY, CONTEXT

    def new_cache(self) -> NameCache:
        return NameCache()

    def forward(self, cache: KVCache, rows: Rows, last: int | None = None) -> Names:
        return self.forward_all([Part(cache, rows, last)])[0]

    def forward_all(self, parts: Sequence[Part]) -> list[Names]:
        return [self.read(part) for part in parts]

    def read(self, part: Part) -> Names:
        cache, rows = part.cache, part.rows
        if not isinstance(cache, NameCache):
            raise TypeError(f"a cache of type {type(cache).__name__}: use new_cache()")
        n, first = len(rows.tokens), cache.append(len(rows.tokens))
        before = cache.names[rows.prefix - 1] if rows.prefix else EMPTY_TEXT
        above = rows.visible.copy()
        above[np.arange(n), first - rows.prefix + np.arange(n)] = False  # itself
        last = np.where(above.any(axis=1), above.shape[1] - 1 - above[:, ::-1].argmax(axis=1), -1)
        for row, (token, place) in enumerate(zip(rows.tokens.tolist(), last.tolist(), strict=True)):
            cache.names[first + row] = mix64(
                before if place < 0 else cache.names[rows.prefix + place], token
            )
        wanted = n if part.last is None else min(part.last, n)
        return np.asarray(cache.names[first + n - wanted :], dtype=np.uint64)


def choose(logits: Names, ask: Ask) -> npt.NDArray[np.int64]:
    """The Chooser of NamingModel."""
    return np.asarray([following(name) for name in logits.tolist()], dtype=np.int64)


class Guesser:
    """A Drafter of that text. On the path that the target will take it replays the examples in their order, from a place
    that depends on the prompt; beside it, where nothing comes true, it takes an example drawn by the name of the text.
    """

    def __init__(self, guesses: Guesses) -> None:
        self.guesses = guesses
        self.path: dict[str, set[int]] = {}  # names on the target's path, by session

    def expand(self, wishes: Sequence[ExpandRequest]) -> list[DraftNodes]:
        return [self.children(wish) for wish in wishes]

    def close(self, session: str) -> None:
        self.path.pop(session, None)

    def children(self, wish: ExpandRequest) -> DraftNodes:
        parents: list[int] = []
        tokens: list[int] = []
        scores: list[float] = []
        most = wish.branches or BRANCHES
        examples = [self.example(wish.text, leaf) for leaf in wish.leaves]
        for leaf, example in zip(wish.leaves, examples, strict=True):
            guessed, said = beside(wish.text.tree.key[leaf], self.guesses.place(example), most)
            parents += [leaf] * len(said)
            tokens += guessed
            scores += said
        near = DraftNodes(
            np.asarray(parents, np.int32),
            np.asarray(tokens, np.int32),
            np.asarray(scores, np.float32),
        )
        behind = (
            self.behind(wish.text.tree.key[wish.leaves[0]], tokens[0], examples[0], most)
            if tokens
            else []
        )
        return stack([near, *behind], len(wish.text.tree)) if behind else near

    def behind(self, key: int, best: int, example: int, most: int) -> list[DraftNodes]:
        """What the pass guessed behind the `best` guess for the first leaf, of name `key`, each below the first of those before."""
        levels = []
        for place in self.guesses.behind(example):
            key = mix64(key, best)
            guessed, said = beside(key, place, most)
            levels.append(
                DraftNodes(
                    np.zeros(len(said), np.int32),
                    np.asarray(guessed, np.int32),
                    np.asarray(said, np.float32),
                )
            )
            best = guessed[0]
        return levels

    def example(self, text: Text, leaf: int) -> int:
        tree, guesses = text.tree, self.guesses
        path = self.path.setdefault(text.session, set())
        key, above = tree.key[leaf], tree.key[tree.parent[leaf]]
        if leaf == 0 or (above in path and following(above) == tree.token[leaf]):
            path.add(key)
        told = text_key(text.tokens[: text.prompt]) + len(text.tokens) + tree.depth[leaf]
        return (told if key in path else mix64(key, EXAMPLE)) % len(guesses)


def beside(key: int, place: Place, most: int) -> tuple[list[int], list[float]]:
    """At most so many guesses of what follows the text of this name, the target's choice at its rank, and their scores."""
    (rank, said), right = place, following(key)
    return [
        right if guess == rank else (right + 1 + guess) % VOCABULARY
        for guess in range(len(said[:most]))
    ], [*said[:most]]
