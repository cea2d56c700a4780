"""A target and a drafter without weights, for simulations on a virtual clock.

The text is a pure function of its prefix, and the drafter predicts it as well as the samples say.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from runtime.core.draft_nodes import DraftNodes, stack
from runtime.core.node_keys import EMPTY_TEXT, mix64, text_key
from runtime.core.sampler_reference import SamplingInput
from runtime.drafters.base import ExpandRequest, Text
from runtime.kv.base import KVCache
from runtime.models.base import PassInput, Rows
from runtime.sim.draft_samples import DraftSamples, RankedScores

VOCABULARY = 64
CONTEXT = 1 << 40
BRANCHES = 4  # children per leaf, as in drafters/model.py
NEXT_SALT, EXAMPLE_SALT = 1 << 32, 1 << 33  # mixed into text keys; not token ids

Keys = npt.NDArray[np.uint64]


def next_token(key: int) -> int:
    """Return the token that follows the text with this key."""
    return mix64(key, NEXT_SALT) % VOCABULARY


class SyntheticCache:
    """Stores, in place of keys and values, the key of the text that ends in each slot."""

    def __init__(self, keys: Sequence[int] = ()) -> None:
        self.keys = list(keys)

    @property
    def length(self) -> int:
        return len(self.keys)

    @property
    def room(self) -> int:
        return self.length

    def append(self, rows: int) -> int:
        self.keys += [0] * rows
        return len(self.keys) - rows

    def keep(self, prefix: int, slots: Sequence[int]) -> None:
        if not 0 <= prefix <= self.length or any(
            not prefix <= slot < self.length for slot in slots
        ):
            raise IndexError(
                f"prefix {prefix} and slots {list(slots)} of a cache of {self.length} slots"
            )
        self.keys[prefix:] = [self.keys[slot] for slot in slots]

    def fork(self, length: int) -> "SyntheticCache":
        return SyntheticCache(self.keys[:length])

    def truncate(self, length: int) -> None:
        del self.keys[length:]


class SyntheticTarget:
    """A Model whose "logits" are keys of the text that each row sees through cache and mask."""

    name, vocabulary, context = "synthetic", VOCABULARY, CONTEXT

    def new_cache(self) -> SyntheticCache:
        return SyntheticCache()

    def forward(self, cache: KVCache, rows: Rows, last: int | None = None) -> Keys:
        return self.forward_all([PassInput(cache, rows, last)])[0]

    def forward_all(self, parts: Sequence[PassInput]) -> list[Keys]:
        return [self.read(part) for part in parts]

    def read(self, part: PassInput) -> Keys:
        cache, rows = part.cache, part.rows
        if not isinstance(cache, SyntheticCache):
            raise TypeError(f"a cache of type {type(cache).__name__}: use new_cache()")
        n, first = len(rows.tokens), cache.append(len(rows.tokens))
        before = cache.keys[rows.prefix - 1] if rows.prefix else EMPTY_TEXT
        above = rows.visible.copy()
        above[np.arange(n), first - rows.prefix + np.arange(n)] = False  # itself
        last = np.where(above.any(axis=1), above.shape[1] - 1 - above[:, ::-1].argmax(axis=1), -1)
        for row, (token, place) in enumerate(zip(rows.tokens.tolist(), last.tolist(), strict=True)):
            cache.keys[first + row] = mix64(
                before if place < 0 else cache.keys[rows.prefix + place], token
            )
        wanted = n if part.last is None else min(part.last, n)
        return np.asarray(cache.keys[first + n - wanted :], dtype=np.uint64)


def choose(logits: Keys, ask: SamplingInput) -> npt.NDArray[np.int64]:
    """Implement the Chooser of SyntheticTarget."""
    return np.asarray([next_token(name) for name in logits.tolist()], dtype=np.int64)


class SyntheticDrafter:
    """A Drafter that guesses the synthetic text.

    On the target's path it replays the samples in order, from a position that depends on the
    prompt. Off the path, where nothing can come true, it takes a sample drawn by the key of the
    text.
    """

    feature_spec = None

    def __init__(self, guesses: DraftSamples) -> None:
        self.guesses = guesses
        self.path: dict[str, set[int]] = {}  # names on the target's path, by session

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes]:
        return [self.children(request) for request in requests]

    def close(self, session: str) -> None:
        self.path.pop(session, None)

    def children(self, request: ExpandRequest) -> DraftNodes:
        parents: list[int] = []
        tokens: list[int] = []
        scores: list[float] = []
        most = request.branches or BRANCHES
        examples = [self.example(request.text, leaf) for leaf in request.leaves]
        for leaf, example in zip(request.leaves, examples, strict=True):
            guessed, said = synthetic_guesses(
                request.text.tree.key[leaf], self.guesses.place(example), most
            )
            parents += [leaf] * len(said)
            tokens += guessed
            scores += said
        near = DraftNodes(
            np.asarray(parents, np.int32),
            np.asarray(tokens, np.int32),
            np.asarray(scores, np.float32),
        )
        behind = (
            self.behind(request.text.tree.key[request.leaves[0]], tokens[0], examples[0], most)
            if tokens
            else []
        )
        return stack([near, *behind], len(request.text.tree)) if behind else near

    def behind(self, key: int, best: int, example: int, most: int) -> list[DraftNodes]:
        """Return the guesses of the pass after the `best` guess for the first leaf, whose key is
        `key`.

        Each level hangs below the first guess of the level before it.
        """
        levels = []
        for place in self.guesses.behind(example):
            key = mix64(key, best)
            guessed, said = synthetic_guesses(key, place, most)
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
        if leaf == 0 or (above in path and next_token(above) == tree.token[leaf]):
            path.add(key)
        place = text_key(text.tokens[: text.prompt]) + len(text.tokens) + tree.depth[leaf]
        return (place if key in path else mix64(key, EXAMPLE_SALT)) % len(guesses)


def synthetic_guesses(key: int, place: RankedScores, most: int) -> tuple[list[int], list[float]]:
    """Return at most `most` guesses for the token after `key`, and their scores.

    The target's choice stands at its rank.
    """
    (rank, said), right = place, next_token(key)
    return [
        right if guess == rank else (right + 1 + guess) % VOCABULARY
        for guess in range(len(said[:most]))
    ], [*said[:most]]
