"""Drafts with a smaller causal language model; one forward pass serves the trees of all sessions.

Caches are addressed by content: a slot is identified by the key of the text that ends in it. After
a commit the slots of the surviving subtree are reused, and missing ones are computed together with
the leaves.
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

BRANCHES = 4  # children per leaf
CHUNK_TOKENS = 512  # prefilled per pass, over all sessions
FINISHED_SLOTS = 16384  # for the caches of finished sessions


@dataclass(slots=True)
class SessionCache:
    """One session's cache.

    Slots hold the first `prefix` tokens of the text, whose key is `key`, followed by tree nodes.
    """

    cache: KVCache
    prefix: int = 0
    key: int = EMPTY_TEXT
    text: Sequence[int] = ()
    slots: dict[int, int] = field(default_factory=dict)  # node key -> slot, in order of slots


@dataclass(frozen=True, slots=True)
class SessionStep:
    """One session's share of a pass.

    missing         committed tokens that are not in the cache yet
    leaves          nodes to compute after those
    ancestor_slots  per leaf the slots of its ancestors after the prefix, counted from there,
                    including leaves of this step
    reading         the missing tokens do not fit this pass
    """

    request: ExpandRequest
    kept: SessionCache
    missing: Sequence[int]
    leaves: Sequence[int]
    ancestor_slots: Sequence[Sequence[int]]
    reading: bool = False

    def pass_input(self) -> PassInput:
        kept, tree, root = self.kept, self.request.text.tree, len(self.request.text.tokens) - 1
        m, behind = len(self.missing), kept.cache.length - kept.prefix
        n = m + len(self.leaves)
        visible = np.zeros((n, behind + n), dtype=np.bool_)
        if m:
            visible[:, :m] = np.tri(n, m, dtype=np.bool_)
        start = m * (behind + n)  # of the leaf's row in the flattened array
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
        """Record the rows of the pass, which are in the cache now."""
        kept, tree = self.kept, self.request.text.tree
        kept.key, kept.prefix = text_key(self.missing, kept.key), kept.prefix + len(self.missing)
        for slot, leaf in enumerate(self.leaves, start=kept.cache.length - len(self.leaves)):
            if leaf == 0:
                kept.key, kept.prefix = tree.key[0], kept.prefix + 1
            else:
                kept.slots[tree.key[leaf]] = slot

    def sampling_input(self) -> SamplingInput:
        return sampling_input(self.request.text, self.leaves)


class ModelDrafter:
    """Drafts with any Model whose ids mean the same tokens in the target.

    It never guesses an id outside its vocabulary, and reads it as `unknown`. It is silent beyond
    its own context.

    It prefills at most `chunk` tokens per pass, shortest texts first, so that other sessions go on.
    Caches of finished sessions, up to `finished` slots, serve texts with the same prefix.
    """

    feature_spec = None

    def __init__(
        self,
        model: Model,
        branches: int = BRANCHES,
        chunk: int = CHUNK_TOKENS,
        finished: int = FINISHED_SLOTS,
        tokens: int | None = None,
        unknown: int = 0,
    ) -> None:
        """`tokens` is the size of the vocabulary if the model's logits are padded beyond it."""
        self.model, self.branches, self.chunk = model, branches, chunk
        self.vocabulary, self.unknown = min(tokens or model.vocabulary, model.vocabulary), unknown
        self.kept: dict[str, SessionCache] = {}
        self.finished = PrefixCache(finished)

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes | None]:
        steps = limit_prefill([self.step(request) for request in requests], self.chunk)
        passing = [step for step in steps if step.missing or step.leaves]
        found = dict(zip(map(id, passing), self.guess(passing), strict=True))
        return [None if step.reading else found.get(id(step), NO_NODES) for step in steps]

    def guess(self, steps: Sequence[SessionStep]) -> list[DraftNodes]:
        """Return the children of the leaves of each step, computed in one pass."""
        inputs = [self.readable(step.pass_input()) for step in steps]
        passed = self.model.forward_all(inputs) if steps else []
        for step in steps:
            step.commit_rows()
        return self.children(steps, passed)

    def readable(self, part: PassInput) -> PassInput:
        """Replace ids outside the vocabulary."""
        tokens = part.rows.tokens
        if (tokens < self.vocabulary).all():
            return part
        known = np.where(tokens < self.vocabulary, tokens, self.unknown)
        return replace(part, rows=replace(part.rows, tokens=known))

    def children(self, steps: Sequence[SessionStep], passed: Sequence[Logits]) -> list[DraftNodes]:
        """Turn the logits of the leaves of each step into children."""
        asking = [
            (torch.as_tensor(rows)[:, : self.vocabulary], step)
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
        """Bring the session's cache up to date with its text, and list the rows to compute."""
        text, tree = request.text, request.text.tree
        base = len(text.tokens) - 1  # position of the root
        kept = self.kept.get(text.session)
        if kept is None:
            kept = self.kept[text.session] = self.new_session(text)
        recompute_root = 0 in request.leaves and base < self.model.context
        reuse_cache(kept, text, recompute_root)
        missing = text.tokens[kept.prefix : base] if recompute_root else []
        first = kept.cache.length - kept.prefix + len(missing)
        rows: dict[int, int] = {}  # leaf -> slot, counted from the prefix
        paths: list[list[int]] = []
        for leaf in request.leaves:  # likeliest first, so ancestors come before their descendants
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
        """Start with a copy of the longest prefix that another text shares with this one."""
        others = ((other.text[: other.prefix], other.cache) for other in self.kept.values())
        found = self.finished.longest(text.tokens, others)
        if found is None:
            return SessionCache(self.model.new_cache())
        cache, length = found
        return SessionCache(cache.fork(length), length, text_key(text.tokens[:length]))


def reuse_cache(kept: SessionCache, text: Text, recompute_root: bool) -> None:
    """Keep the slots of the text's tokens, followed by the slots of its tree.

    The root is dropped if `recompute_root`.
    """
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
    """Return the slots of a leaf's ancestors, counted from the prefix; the prefix may include the
    root.

    `rows` holds the slots of nodes computed in the same pass. Returns None if an ancestor is
    neither in the cache nor in `rows`.
    """
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
    """Limit the steps of a pass to `tokens` missing tokens.

    A step that needs more reads a part and has no leaves in this pass.
    """
    counts = prefill_counts([len(step.missing) for step in steps], tokens)
    return [
        step
        if count == len(step.missing)
        else replace(step, missing=step.missing[:count], leaves=[], ancestor_slots=[], reading=True)
        for step, count in zip(steps, counts, strict=True)
    ]


def prefill_counts(missing: Sequence[int], tokens: int) -> list[int]:
    """Return how many of its missing tokens each text reads in a pass of at most `tokens`.

    The shortest texts come first, so that other sessions go on.
    """
    found = list(missing)
    for place in sorted(range(len(missing)), key=missing.__getitem__):
        found[place] = min(missing[place], tokens)
        tokens -= found[place]
    return found


def sampling_input(text: Text, nodes: Sequence[int]) -> SamplingInput:
    """Return the sampling input of the children of these nodes."""
    paths = [text.tree.tokens_to(node) for node in nodes]
    return SamplingInput(text.sampling, text.prompt, text.tokens, paths, frozenset())


def children(leaves: Sequence[int], tokens: np.ndarray, scores: np.ndarray) -> DraftNodes:
    found = (
        np.repeat(np.asarray(leaves, dtype=np.int32), tokens.shape[1]),
        tokens.ravel(),
        scores.ravel(),
    )
    allowed = np.isfinite(found[2])  # the target never samples filtered tokens
    return DraftNodes(*found) if allowed.all() else DraftNodes(*(array[allowed] for array in found))


def build(context: DrafterContext) -> ModelDrafter:
    return ModelDrafter(context.load(context.draft), tokens=context.tokens, unknown=context.unknown)
