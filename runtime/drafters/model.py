"""A smaller causal language model as drafter: one forward pass expands leaves of the trees of all sessions.

Its caches are addressed by content: a slot is known by the key of the text that ends in it. After a commit the slots of
the surviving subtree are kept, whatever has happened in between; what is missing is computed in the pass of the leaves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch

from runtime.core.draft_nodes import NO_NODES, DraftNodes
from runtime.core.node_keys import EMPTY_TEXT, child_key, text_key
from runtime.core.sampler_reference import SamplingInput
from runtime.core.tree import TokenTree
from runtime.drafters.base import DrafterContext, ExpandRequest, Text
from runtime.kv.base import KVCache
from runtime.kv.prefix_cache import PrefixCache
from runtime.models.base import Logits, Model, PassInput, Rows
from runtime.models.sampler import candidates_all

BRANCHES = 4  # children of a leaf
CHUNK_TOKENS = 512  # tokens of texts that are read in one pass, of all sessions together
FINISHED_SLOTS = 16384  # slots for the texts of sessions that are over


@dataclass(slots=True)
class SessionCache:
    """One session's cache: the first `prefix` tokens of its text, which make the text named `key`; then tree slots."""

    cache: KVCache
    prefix: int = 0
    key: int = EMPTY_TEXT
    text: Sequence[int] = ()
    slots: dict[int, int] = field(default_factory=dict)  # node key -> slot, in order of slots


@dataclass(frozen=True, slots=True)
class SessionStep:
    """One session's part of a pass: committed tokens that are not in its cache yet, then leaves.

    above  of each leaf, the slots of its ancestors below the prefix, counted from there; leaves of this step among them
    """

    request: ExpandRequest
    kept: SessionCache
    missing: Sequence[int]
    leaves: Sequence[int]
    ancestor_slots: Sequence[Sequence[int]]
    reading: bool = False  # there is too much to read for one pass

    def pass_input(self) -> PassInput:
        kept, tree, root = self.kept, self.request.text.tree, len(self.request.text.tokens) - 1
        m, behind = len(self.missing), kept.cache.length - kept.prefix
        n = m + len(self.leaves)
        visible = np.zeros((n, behind + n), dtype=np.bool_)
        if m:
            visible[:, :m] = np.tri(n, m, dtype=np.bool_)
        start = m * (behind + n)  # of each leaf's row in the flattened array
        seen: list[int] = []
        for row, slots in enumerate(self.ancestor_slots, start=m):
            seen += [start + slot for slot in slots]
            seen.append(start + behind + row)
            start += behind + n
        visible.put(seen, True)
        tokens = np.asarray(
            [*self.missing, *[tree.token[leaf] for leaf in self.leaves]], dtype=np.int64
        )
        positions = [
            *range(kept.prefix, kept.prefix + m),
            *[root + tree.depth[leaf] for leaf in self.leaves],
        ]
        return PassInput(
            kept.cache,
            Rows(tokens, np.asarray(positions, dtype=np.int64), kept.prefix, visible),
            last=len(self.leaves),
        )

    def commit_rows(self) -> None:
        """Know the rows of the pass, which are in the cache now."""
        kept, tree = self.kept, self.request.text.tree
        kept.key, kept.prefix = text_key(self.missing, kept.key), kept.prefix + len(self.missing)
        for slot, leaf in enumerate(self.leaves, start=kept.cache.length - len(self.leaves)):
            if leaf == 0:
                kept.key, kept.prefix = tree.key[0], kept.prefix + 1
            else:
                kept.slots[tree.key[leaf]] = slot

    def sampling_input(self) -> SamplingInput:
        text = self.request.text
        return SamplingInput(
            text.sampling,
            text.prompt,
            text.tokens,
            [text.tree.tokens_to(leaf) for leaf in self.leaves],
            frozenset(),
        )


class ModelDrafter:
    """Any Model with the target's vocabulary. Silent beyond its own context.

    Long texts are read `chunk` tokens a pass, what is shortest first, so that other sessions go on meanwhile. Caches of
    sessions that are over serve texts that begin alike, up to `finished` slots.
    """

    def __init__(
        self,
        model: Model,
        branches: int = BRANCHES,
        chunk: int = CHUNK_TOKENS,
        finished: int = FINISHED_SLOTS,
    ) -> None:
        self.model, self.branches, self.chunk = model, branches, chunk
        self.kept: dict[str, SessionCache] = {}
        self.finished = PrefixCache(finished)

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes | None]:
        steps = limit_prefill([self.step(request) for request in requests], self.chunk)
        passing = [step for step in steps if step.missing or step.leaves]
        found = dict(zip(map(id, passing), self.guess(passing), strict=True))
        return [None if step.reading else found.get(id(step), NO_NODES) for step in steps]

    def guess(self, steps: Sequence[SessionStep]) -> list[DraftNodes]:
        """The children of the leaves of each step, by one pass over all of them."""
        passed = self.model.forward_all([step.pass_input() for step in steps]) if steps else []
        for step in steps:
            step.commit_rows()
        return self.children(steps, passed)

    def children(self, steps: Sequence[SessionStep], passed: Sequence[Logits]) -> list[DraftNodes]:
        """Out of the logits of the leaves of each step."""
        asking = [
            (torch.as_tensor(rows), step)
            for step, rows in zip(steps, passed, strict=True)
            if step.leaves
        ]
        guesses = iter(
            candidates_all(
                [
                    (rows, step.sampling_input(), step.request.branches or self.branches)
                    for rows, step in asking
                ]
            )
        )
        return [
            children(step.leaves, *next(guesses)) if step.leaves else NO_NODES for step in steps
        ]

    def close(self, session: str) -> None:
        kept = self.kept.pop(session, None)
        if kept is not None:
            self.finished.keep(kept.text[: kept.prefix], kept.cache)

    def step(self, request: ExpandRequest) -> SessionStep:
        """Bring the session's cache to its text, and find out what is to be computed."""
        text, tree = request.text, request.text.tree
        base = len(text.tokens) - 1  # position of the root
        kept = self.kept.get(text.session)
        if kept is None:
            kept = self.kept[text.session] = self.new_session(text)
        recompute_root = 0 in request.leaves and base < self.model.context
        reuse_cache(kept, text, recompute_root)
        missing = text.tokens[kept.prefix : base] if recompute_root else []
        first = kept.cache.length - kept.prefix + len(missing)
        rows: dict[int, int] = {}  # leaf -> its slot, counted from the prefix
        paths: list[list[int]] = []
        for leaf in request.leaves:  # the likeliest first, so what is above others is a row already
            slots = (
                ancestor_slots(kept, tree, leaf, rows)
                if base + tree.depth[leaf] < self.model.context
                else None
            )
            if slots is not None:
                rows[leaf] = first + len(rows)
                paths.append(slots)
        return SessionStep(request, kept, missing, list(rows), paths)

    def new_session(self, text: Text) -> SessionCache:
        """With a copy of what some other text has in common with this one."""
        others = ((other.text[: other.prefix], other.cache) for other in self.kept.values())
        found = self.finished.longest(text.tokens, others)
        if found is None:
            return SessionCache(self.model.new_cache())
        cache, length = found
        return SessionCache(cache.fork(length), length, text_key(text.tokens[:length]))


def reuse_cache(kept: SessionCache, text: Text, recompute_root: bool) -> None:
    """Of the cache, keep the text's tokens (not the root, if it is to be computed `recompute_root`) and then the slots of its tree."""
    tree, wanted = text.tree, len(text.tokens) - recompute_root
    kept.text = text.tokens
    if kept.key == tree.key[0] and not recompute_root:
        return
    if kept.prefix > wanted:
        kept.prefix, kept.key = wanted, text_key(text.tokens[:wanted])
    reach, key, path = kept.prefix, kept.key, []
    for token in islice(text.tokens, reach, wanted):
        below = child_key(key, token)
        if below not in kept.slots:
            break
        path.append(kept.slots[below])
        key, reach = below, reach + 1
    alive = key == tree.key[0]
    names = set(tree.key[1:]) if alive else set()
    survivors = {name: slot for name, slot in kept.slots.items() if name in names}
    kept.cache.keep(kept.prefix, [*path, *survivors.values()])
    kept.slots = dict(zip(survivors, range(reach, reach + len(survivors)), strict=True))
    kept.prefix, kept.key = reach, key


def ancestor_slots(
    kept: SessionCache, tree: TokenTree, leaf: int, rows: Mapping[int, int]
) -> list[int] | None:
    """The slots of a leaf's ancestors, counted from the prefix, of which the root may be the last token; `rows`: those of nodes that are
    read in the same pass. None where one is neither there nor in the cache."""
    if kept.key != tree.key[0] and leaf != 0 and 0 not in rows:
        return None
    found = []
    node = tree.parent[leaf]
    while node > 0 or node in rows:
        slot = kept.slots.get(tree.key[node])
        if node not in rows and slot is None:
            return None
        found.append(rows[node] if slot is None else slot - kept.prefix)
        node = tree.parent[node]
    return found


def limit_prefill(steps: Sequence[SessionStep], tokens: int) -> list[SessionStep]:
    """The steps of one pass that reads at most so many tokens of texts; who reads on in the next one has no leaves in it."""
    found = list(steps)
    for place in sorted(range(len(steps)), key=lambda place: len(steps[place].missing)):
        step = steps[place]
        if len(step.missing) > tokens:
            found[place] = replace(
                step, missing=step.missing[:tokens], leaves=[], ancestor_slots=[], reading=True
            )
        tokens -= len(found[place].missing)
    return found


def children(leaves: Sequence[int], tokens: np.ndarray, scores: np.ndarray) -> DraftNodes:
    found = (
        np.repeat(np.asarray(leaves, dtype=np.int32), tokens.shape[1]),
        tokens.ravel(),
        scores.ravel(),
    )
    allowed = np.isfinite(found[2])  # the target would not choose what the filters bar
    return DraftNodes(*found) if allowed.all() else DraftNodes(*(array[allowed] for array in found))


def build(context: DrafterContext) -> ModelDrafter:
    return ModelDrafter(context.load(context.draft))
