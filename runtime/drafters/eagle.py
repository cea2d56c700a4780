"""EAGLE (Li et al., arXiv 2401.15077, 2406.16858, 2503.01840): drafts from the target's features.

One decoder layer reads the committed text with the target's own hidden states, and goes on from its
states below them. A commit brings the features of its tokens, so their rows are computed again with
these; the subtree that survives keeps its rows, which were computed from states of the layer. The
embedding and the unembedding are the target's, read from its folder.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from runtime.core.draft_nodes import NO_NODES, DraftNodes
from runtime.core.features import FeatureRows, FeatureSpec
from runtime.core.node_keys import child_key, text_key
from runtime.core.tree import TokenTree
from runtime.drafters.base import DrafterContext, ExpandRequest, Text
from runtime.drafters.model import (
    BRANCHES,
    CHUNK_TOKENS,
    FINISHED_SLOTS,
    children,
    prefill_counts,
    sampling_input,
)
from runtime.kv.prefix_cache import PrefixCache
from runtime.kv.store import TorchCache
from runtime.models.base import ModelIdentity
from runtime.models.eagle import METHOD, Layer, read_eagle
from runtime.models.eagle_pass import EagleInput, EaglePass, Slots, no_tokens
from runtime.models.embeddings import read_embeddings
from runtime.models.head_checkpoint import find_checkpoint, target_identity
from runtime.models.hf import max_context
from runtime.models.loader import (
    find_device,
    find_dtype,
    load_tokenizer,
    read_config,
)
from runtime.models.model_folder import find_folder
from runtime.models.sampler import candidates_all, edits_logits

FIRST = 1  # position of the first row: no token comes before token 0
MAX_OWN_TOKENS = 1024  # of a text, outside of the draft vocabulary: each costs a product of a row


@dataclass(slots=True)
class EagleCache:
    """One session's cache. The slot of a token of the text is its position.

    first   slots before it are empty: the features of a text may begin late
    prefix  slots [first, prefix) hold rows of the text with the target's features
    key     of the text up to `prefix`
    slots   node key -> slot of the tree's nodes, in order of slots
    own     tokens of the text outside of the draft vocabulary, among the first `listed` ones
    """

    cache: TorchCache
    first: int
    prefix: int
    key: int
    text: Sequence[int] = ()
    slots: dict[int, int] = field(default_factory=dict)
    own: Slots = field(default_factory=no_tokens)
    listed: int = 0

    def list_own(self, tokens: Sequence[int], common: npt.NDArray[np.bool_]) -> None:
        """Take in the new tokens; `common` (vocabulary,) tells those of the draft vocabulary."""
        new = np.unique(np.asarray(tokens[self.listed :], dtype=np.int64))
        self.listed = len(tokens)
        own = new[~common[new]]
        if len(own):
            self.own = np.union1d(self.own, own)[:MAX_OWN_TOKENS]


@dataclass(frozen=True, slots=True)
class EagleStep:
    """One session's share of a pass.

    missing    number of rows of the text to compute, from `kept.prefix` on
    leaves     nodes to compute after those
    ancestors  per leaf the slots of its ancestors after the text, its parent's first
    root       guess the children of the root, whose row is the last one of the text
    reading    the text cannot be read to its end in this pass
    """

    request: ExpandRequest
    kept: EagleCache
    missing: int
    leaves: Sequence[int]
    ancestors: Sequence[Sequence[int]]
    root: bool
    reading: bool

    @property
    def asked(self) -> list[int]:
        """Return the nodes whose children the pass guesses."""
        return [0, *self.leaves] if self.root else [*self.leaves]

    def limited(self, missing: int) -> "EagleStep":
        """Return the step that reads only so much of the text."""
        if missing == self.missing:
            return self
        return EagleStep(self.request, self.kept, missing, (), (), False, True)

    def pass_input(self) -> EagleInput:
        """Append the slots of the pass to the cache, and return its input."""
        kept, text, m, k = self.kept, self.request.text, self.missing, len(self.leaves)
        assert text.features is not None
        cache, tree, end = kept.cache, text.tree, kept.prefix + m
        cache.append(max(0, end - cache.length))
        behind = cache.append(k)  # slot of the first leaf
        visible = np.zeros((m + k, cache.length - kept.first), dtype=np.bool_)
        visible[:m, : end - kept.first] = np.tri(
            m, end - kept.first, kept.prefix - kept.first, bool
        )
        visible[m:, : end - kept.first] = True
        for row, slots in enumerate(self.ancestors):
            visible[m + row, [slot - kept.first for slot in slots]] = True
            visible[m + row, behind + row - kept.first] = True
        root, feature = len(text.tokens) - 1, kept.prefix - 1 - text.features.start
        return EagleInput(
            cache,
            np.array(
                [*text.tokens[kept.prefix : end], *(tree.token[leaf] for leaf in self.leaves)]
            ),
            np.array(
                [*range(kept.prefix, end), *(root + tree.depth[leaf] for leaf in self.leaves)]
            ),
            text.features.rows[feature : feature + m],
            np.array([slots[0] if slots else root for slots in self.ancestors], dtype=np.int64),
            kept.prefix,
            kept.first,
            visible,
            np.arange(m - self.root, m + k),
            kept.own,
        )

    def commit_rows(self) -> None:
        """Record the rows of the pass, which are in the cache now."""
        kept, text = self.kept, self.request.text
        end = kept.prefix + self.missing
        kept.key, kept.prefix = text_key(text.tokens[kept.prefix : end], kept.key), end
        first = kept.cache.length - len(self.leaves)
        for slot, leaf in enumerate(self.leaves, start=first):
            kept.slots[text.tree.key[leaf]] = slot


class EagleDrafter:
    """Drafts with an EAGLE layer. It is silent beyond the target's context, and as long as the
    features of the text are missing.

    It reads at most `chunk` tokens per pass, shortest texts first. Caches of finished sessions, up
    to `finished` slots, serve texts with the same prefix.
    """

    def __init__(
        self,
        model: EaglePass,
        branches: int = BRANCHES,
        chunk: int = CHUNK_TOKENS,
        finished: int = FINISHED_SLOTS,
    ) -> None:
        self.model, self.branches, self.chunk = model, branches, chunk
        self.common = np.zeros(model.vocabulary, dtype=np.bool_)
        self.common[model.draft_tokens] = True
        self.kept: dict[str, EagleCache] = {}
        self.finished = PrefixCache(finished)

    @property
    def feature_spec(self) -> FeatureSpec:
        return self.model.feature_spec

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes | None]:
        steps = [self.step(request) for request in requests]
        reading = [step for step in steps if step is not None]
        counts = prefill_counts([step.missing for step in reading], self.chunk)
        limited = iter([step.limited(n) for step, n in zip(reading, counts, strict=True)])
        planned = [None if step is None else next(limited) for step in steps]
        passing = [step for step in planned if step is not None and (step.missing or step.asked)]
        found = dict(zip(map(id, passing), self.guess(passing), strict=True))
        # A text of one token has no row: there is nothing to wait for.
        return [
            (None if len(request.text.tokens) > FIRST else NO_NODES)
            if step is None
            else None
            if step.reading
            else found.get(id(step), NO_NODES)
            for request, step in zip(requests, planned, strict=True)
        ]

    def guess(self, steps: Sequence[EagleStep]) -> list[DraftNodes]:
        """Return the guesses of each step, computed in one pass."""
        if not steps:
            return []
        passed, tokens = self.logits(steps)
        asking = [(rows, step) for rows, step in zip(passed, steps, strict=True) if step.asked]
        spread = any(edits_logits(step.request.text.sampling) for _, step in asking)
        guesses = iter(
            candidates_all(
                [
                    (
                        self.model.spread(rows, tokens) if spread else rows,
                        sampling_input(step.request.text, step.asked),
                        step.request.branches or self.branches,
                    )
                    for rows, step in asking
                ],
                ids=None if spread else tokens,
            )
        )
        return [self.answer(step, *next(guesses)) if step.asked else NO_NODES for step in steps]

    def logits(self, steps: Sequence[EagleStep]) -> tuple[list[torch.Tensor], Slots]:
        """Run one pass; return logits (asked, k) of each step, and the k tokens."""
        with undone_on_failure(steps):
            parts = [step.pass_input() for step in steps]
            passed = self.model(parts)
        for step in steps:
            step.commit_rows()
        return passed, self.model.guessable(parts)

    def answer(self, step: EagleStep, *guesses: Any) -> DraftNodes:
        """Return the children of the step's nodes.

        After a commit the root has new logits, from the target's feature. Where it had children
        before, the new ones among its best are added.
        """
        found = children(step.asked, *guesses)
        known = step.root and 0 not in step.request.leaves
        return without_known(found, step.request.text.tree) if known else found

    def close(self, session: str) -> None:
        kept = self.kept.pop(session, None)
        if kept is not None and kept.first == FIRST:
            self.finished.keep(kept.text[: kept.prefix], kept.cache)

    def step(self, request: ExpandRequest) -> EagleStep | None:
        """Bring the session's cache up to date with its text, and list the rows to compute.

        Returns None if nothing can be read yet.
        """
        text, features = request.text, request.text.features
        if features is None or not len(features.rows):
            return None
        kept = self.kept.get(text.session)
        if kept is None or kept.prefix <= features.start:
            kept = self.kept[text.session] = self.new_session(text, features)
        kept.list_own(text.tokens, self.common)
        length, context = len(text.tokens), self.model.context
        readable = max(kept.prefix, min(length, context, features.end + 1))
        whole = readable == length
        reuse_cache(kept, text, whole, whole and 0 in request.leaves)
        missing = readable - kept.prefix
        if not whole:
            return EagleStep(request, kept, missing, (), (), False, readable < context)
        leaves, ancestors = [], []
        for leaf in request.leaves:
            slots = ancestor_slots(kept, text.tree, leaf, length - 1) if leaf else None
            if slots is not None and length - 1 + text.tree.depth[leaf] < context:
                leaves.append(leaf)
                ancestors.append(slots)
        return EagleStep(request, kept, missing, leaves, ancestors, missing > 0, False)

    def new_session(self, text: Text, features: FeatureRows) -> EagleCache:
        """Start with a copy of the longest prefix that another text shares with this one."""
        first = max(FIRST, features.start + 1)
        others: Iterable[tuple[Sequence[int], TorchCache]] = (
            (other.text[: other.prefix], other.cache)
            for other in self.kept.values()
            if other.first == FIRST
        )
        found = self.finished.longest(text.tokens, others)
        if found is not None and found[1] >= first:
            cache, length = found
            assert isinstance(cache, TorchCache)
            return EagleCache(cache.fork(length), FIRST, length, text_key(text.tokens[:length]))
        cache = self.model.new_cache()
        cache.append(first)
        return EagleCache(cache, first, first, text_key(text.tokens[:first]))


@contextmanager
def undone_on_failure(steps: Sequence[EagleStep]) -> Iterator[None]:
    """Take back the slots of a pass that fails."""
    lengths = [step.kept.cache.length for step in steps]
    try:
        yield
    except BaseException:
        for step, length in zip(steps, lengths, strict=True):
            step.kept.cache.truncate(min(length, step.kept.cache.length))
        raise


def reuse_cache(kept: EagleCache, text: Text, whole: bool, root: bool) -> None:
    """Keep the slots of the text, followed by those of its tree if the text can be read to its end.

    The rows of newly committed tokens will be computed again, in their slots; so will the row of
    the root, if `root`.
    """
    kept.text = text.tokens
    if kept.prefix == len(text.tokens):
        if not root:
            return
        kept.prefix -= 1
        kept.key = text_key(text.tokens[: kept.prefix])
    path, survivors, key = list[int](), dict[int, int](), kept.key
    if whole:
        for token in islice(text.tokens, kept.prefix, None):
            key = child_key(key, token)
            if key not in kept.slots:
                break
            path.append(kept.slots[key])
        if kept.prefix + len(path) == len(text.tokens):
            names = set(text.tree.key[1:])
            survivors = {name: slot for name, slot in kept.slots.items() if name in names}
    kept.cache.keep(kept.prefix, [*path, *survivors.values()])
    begin = kept.prefix + len(path)
    kept.slots = dict(zip(survivors, range(begin, begin + len(survivors)), strict=True))


def ancestor_slots(kept: EagleCache, tree: TokenTree, leaf: int, root: int) -> list[int] | None:
    """Return the slots of a leaf's ancestors below the root, its parent's first.

    `root` is the slot of the root. Returns None unless the cache holds them all and the root.
    """
    if kept.cache.length <= root:
        return None
    found, node = [], tree.parent[leaf]
    while node > 0:
        if (slot := kept.slots.get(tree.key[node])) is None:
            return None
        found.append(slot)
        node = tree.parent[node]
    return found


def without_known(found: DraftNodes, tree: TokenTree) -> DraftNodes:
    """Leave out children that the root has."""
    new = np.array(
        [
            parent > 0 or tree.child(0, token) is None
            for parent, token in zip(found.parents.tolist(), found.tokens.tolist(), strict=True)
        ],
        dtype=np.bool_,
    )
    return DraftNodes(found.parents[new], found.tokens[new], found.scores[new])


def build(context: DrafterContext) -> EagleDrafter:
    """Build the drafter. Raises ModelRefused for a checkpoint of another target, or if none ships
    for this one.
    """
    return EagleDrafter(EaglePass(*pass_arguments(context, METHOD, read_eagle)))


def pass_arguments(
    context: DrafterContext, method: str, read: Callable[[Path, ModelIdentity], Layer]
) -> tuple[Layer, torch.Tensor, torch.Tensor, int, torch.dtype, torch.device]:
    """Return the arguments of an EaglePass or a BlockPass.

    Raises ModelRefused for a checkpoint of another target, or if none ships for this one.
    """
    target = context.target
    config = read_config(find_folder(target), target)
    identity = target_identity(config, load_tokenizer(target))
    folder = find_checkpoint(context.draft, method, identity)
    embedding, unembedding = read_embeddings(target)
    device = find_device(context.device)
    dtype = find_dtype(context.dtype, device)
    if context.threads is not None:
        torch.set_num_threads(context.threads)
    return (
        read(folder, identity),
        embedding,
        unembedding,
        max_context(config.get_text_config(decoder=True), target),
        dtype if isinstance(dtype, torch.dtype) else embedding.dtype,
        device,
    )
