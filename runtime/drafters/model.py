"""A smaller causal language model as drafter: one forward pass expands several leaves of the tree.

Its cache is addressed by content: a slot is known by the key of the text that ends in it. After a commit the slots of
the surviving subtree are kept, whatever has happened in between; what is missing is computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from runtime.choice import Ask
from runtime.drafters.base import Children, Ingredients, Text
from runtime.kv.base import KVCache
from runtime.models.base import Model, Rows
from runtime.models.choose import candidates
from runtime.models.prefill import prefill
from runtime.tree import EMPTY_TEXT, TokenTree, mix64, text_key

BRANCHES = 4  # children of a leaf


@dataclass(slots=True)
class Kept:
    """One session's cache: `prefix` committed tokens, the last of which makes the text named `key`; then tree slots."""

    cache: KVCache
    prefix: int = 0
    key: int = EMPTY_TEXT
    slots: dict[int, int] = field(default_factory=dict)  # node key -> slot, in order of slots


class ModelDrafter:
    """Any Model with the target's vocabulary. Silent beyond its own context."""

    def __init__(self, model: Model, branches: int = BRANCHES) -> None:
        self.model, self.branches = model, branches
        self.kept: dict[str, Kept] = {}

    def expand(self, text: Text, leaves: Sequence[int]) -> Children:
        base = len(text.tokens) - 1  # position of the root
        leaves = [leaf for leaf in leaves if base + text.tree.depth[leaf] < self.model.context]
        if not leaves:
            return children([], [], [])
        kept = self.kept.get(text.session)
        if kept is None:
            kept = self.kept[text.session] = Kept(self.model.new_cache())
        self.settle(kept, text, again=0 in leaves)
        leaves = [leaf for leaf in leaves if known(kept, text.tree, leaf)]
        if not leaves:
            return children([], [], [])
        logits = self.model.forward(kept.cache, self.rows(kept, text, leaves))
        ask = Ask(text.sampling, text.prompt, text.tokens, [text.tree.tokens_to(leaf) for leaf in leaves], frozenset())
        tokens, scores = candidates(torch.as_tensor(logits), ask, self.branches)
        allowed = np.isfinite(scores)  # the target would not choose what the filters bar
        return children(np.repeat(leaves, allowed.sum(axis=1)), tokens[allowed], scores[allowed])

    def close(self, session: str) -> None:
        self.kept.pop(session, None)

    def settle(self, kept: Kept, text: Text, again: bool) -> None:
        """Bring the cache to the text: the committed tokens (all but the root, if it is to be computed `again`) are its
        prefix; of the tree slots, those of the new subtree remain."""
        tree, wanted = text.tree, len(text.tokens)
        if kept.key == tree.key[0] and not again:
            return
        reach, key, path = kept.prefix, kept.key, []
        for token in text.tokens[reach:]:
            below = mix64(key, token)
            if below not in kept.slots:
                break
            path.append(kept.slots[below])
            key, reach = below, reach + 1
        alive = reach == wanted and not again
        survivors = {name: slot for name, slot in kept.slots.items() if alive and name in tree.index and name != key}
        kept.cache.keep(kept.prefix, [*path, *survivors.values()])
        kept.slots = dict(zip(survivors, range(reach, reach + len(survivors)), strict=True))
        if again and reach == wanted:
            reach = wanted - 1
            kept.cache.truncate(reach)
        missing = text.tokens[reach : wanted - 1]
        if missing:
            prefill(self.model, kept.cache, np.asarray(missing, dtype=np.int64))
            key, reach = text_key(missing, key), wanted - 1
        kept.prefix, kept.key = reach, key

    def rows(self, kept: Kept, text: Text, leaves: Sequence[int]) -> Rows:
        """Rows of the leaves; each sees the slots of its ancestors and itself. Their slots are known from now on."""
        tree, base, first = text.tree, kept.prefix, kept.cache.length
        visible = np.zeros((len(leaves), first - base + len(leaves)), dtype=np.bool_)
        for row, leaf in enumerate(leaves):
            visible[row, first - base + row] = True
            node = tree.parent[leaf]
            while node > 0:
                visible[row, kept.slots[tree.key[node]] - base] = True
                node = tree.parent[node]
        for row, leaf in enumerate(leaves):
            if leaf == 0:
                kept.prefix, kept.key = base + 1, tree.key[0]
            else:
                kept.slots[tree.key[leaf]] = first + row
        tokens = np.asarray([tree.token[leaf] for leaf in leaves], dtype=np.int64)
        depths = np.asarray([tree.depth[leaf] for leaf in leaves], dtype=np.int64)
        return Rows(tokens, len(text.tokens) - 1 + depths, base, visible)


def known(kept: Kept, tree: TokenTree, leaf: int) -> bool:
    """Whether every ancestor of `leaf` below the root is in the cache, and the root is or is the leaf itself."""
    node = tree.parent[leaf]
    while node > 0:
        if tree.key[node] not in kept.slots:
            return False
        node = tree.parent[node]
    return leaf == 0 or kept.key == tree.key[0]


def children(parents: Sequence[int] | np.ndarray, tokens: Sequence[int] | np.ndarray, scores: Sequence[float] | np.ndarray) -> Children:
    return Children(np.asarray(parents, dtype=np.int32), np.asarray(tokens, dtype=np.int32), np.asarray(scores, dtype=np.float32))


def build(ingredients: Ingredients) -> ModelDrafter:
    return ModelDrafter(ingredients.load(ingredients.draft))
