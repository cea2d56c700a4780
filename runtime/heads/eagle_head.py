"""EAGLE on the target itself (arXiv 2401.15077, 2503.01840): the layer of runtime.drafters.eagle.

After each step it reads the features of the accepted rows, and grows a tree in small passes on the
target's own device, before the next step begins. Each pass expands the likeliest nodes (EAGLE-2,
2406.16858). It needs no second device, and its guesses start from the target's newest states.
Drafters elsewhere guess further ahead.

    passes  go on while their leaves' path probabilities, summed over the texts, exceed what the
            target would produce meanwhile: sum > PASS_MARGIN * rate * seconds of a pass
"""

from collections.abc import Sequence
from dataclasses import replace
from time import monotonic

import numpy as np

from runtime.core import limits
from runtime.core.clock import Clock
from runtime.core.draft_nodes import DraftNodes
from runtime.core.features import FeatureRows, LayerFeatures
from runtime.core.tree import TokenTree
from runtime.drafters.base import ExpandRequest, Text
from runtime.drafters.eagle import EagleDrafter
from runtime.heads.base import HeadContext, VerifiedStep
from runtime.models.base import OutputSpec
from runtime.models.eagle import METHOD, read_eagle
from runtime.models.eagle_pass import EaglePass
from runtime.models.head_checkpoint import find_checkpoint

FIRST_PASSES, MAX_PASSES = 2, 8  # of a step before any rate is known, and ever
WIDTH = 4  # nodes of a text expanded in a pass, but for the first
PASS_MARGIN = 2.0  # a leaf's children hold a part of its probability, and cost rows
EWMA_WEIGHT = 0.1  # of a new observation
MAX_STEP_SECONDS = 1.0  # a longer time between steps is a pause


class EagleHead:
    """A Head that grows a small tree of its own for each session."""

    def __init__(self, drafter: EagleDrafter, clock: Clock = monotonic) -> None:
        self.drafter, self.clock = drafter, clock
        self.output_spec = OutputSpec(features=drafter.feature_spec.layers)
        self.began: float | None = None  # the guesses of the last step
        self.pass_seconds = 0.0  # moving averages: of a pass, and of a step with its tokens
        self.step_seconds = self.tokens = 0.0

    def propose(self, seen: Sequence[VerifiedStep]) -> list[DraftNodes]:
        self.observe_step(self.clock(), sum(len(one.path) for one in seen))
        texts = [self.text_of(one) for one in seen]
        leaves: list[list[int]] = [[0] for _ in texts]
        for done in range(MAX_PASSES):
            asking = [place for place, chosen in enumerate(leaves) if chosen]
            if not asking or (done and not self.pays(done, texts, leaves)):
                break
            began = self.clock()
            requests = [ExpandRequest(texts[place], leaves[place]) for place in asking]
            for place, nodes in zip(asking, self.drafter.expand(requests), strict=True):
                leaves[place] = [] if nodes is None else insert(texts[place].tree, nodes)
            if done:
                self.pass_seconds = averaged(self.pass_seconds, self.clock() - began)
        return [nodes_of(text.tree) for text in texts]

    def observe_step(self, now: float, tokens: int) -> None:
        """Learn the time from step to step, and the tokens of a step."""
        if self.began is not None and now - self.began < MAX_STEP_SECONDS:
            self.step_seconds = averaged(self.step_seconds, now - self.began)
            self.tokens = averaged(self.tokens, tokens)
        self.began = now

    def pays(self, done: int, texts: Sequence[Text], leaves: Sequence[Sequence[int]]) -> bool:
        """Return whether a further pass is worth its time."""
        if not self.step_seconds or not self.pass_seconds:
            return done < FIRST_PASSES
        mass = sum(
            float(np.exp(np.frombuffer(text.tree.path)[list(chosen)]).sum())
            for text, chosen in zip(texts, leaves, strict=True)
        )
        return mass > PASS_MARGIN * self.tokens / self.step_seconds * self.pass_seconds

    def text_of(self, seen: VerifiedStep) -> Text:
        """Return the text with its features and an empty tree."""
        text, kept, features = seen.text, seen.features, None
        tree = TokenTree(text.tree.key[0], text.tokens[-1], limits.TREE_NODES, limits.TREE_DEPTH)
        if kept is not None:
            known = kept.between(0, len(text.tokens) - 1)
            bits = LayerFeatures(kept.layers, known.rows).of(self.output_spec.features)
            features = None if bits is None else FeatureRows(known.start, bits)
        return replace(text, tree=tree, features=features)

    def close(self, session: str) -> None:
        self.drafter.close(session)


def averaged(old: float, new: float) -> float:
    """Return the moving average; the first observation is taken as it is."""
    return new if not old else old + EWMA_WEIGHT * (new - old)


def insert(tree: TokenTree, nodes: DraftNodes) -> list[int]:
    """Add guesses to the tree; return the likeliest nodes without children, to be expanded next."""
    keys = np.frombuffer(tree.key, np.uint64)[nodes.parents]
    tree.merge(
        keys, nodes.tokens.astype(np.int64), nodes.scores.astype(float), "", lambda _, own: own
    )
    ends = 1 + np.flatnonzero(np.frombuffer(tree.fanout, np.int64)[1:] == 0)
    best = np.argsort(-np.frombuffer(tree.path)[ends], kind="stable")[:WIDTH]
    found: list[int] = ends[best].tolist()
    return found


def nodes_of(tree: TokenTree) -> DraftNodes:
    """Return all nodes below the root, which is the only one that others know."""
    return DraftNodes(
        np.array(tree.parent[1:], dtype=np.int32),
        np.array(tree.token[1:], dtype=np.int32),
        np.array(tree.raw_logprob[1:], dtype=np.float32),
        roots=1,
    )


def build(context: HeadContext) -> EagleHead:
    """Build the head.

    Raises ModelRefused for a checkpoint of another target, or if none ships for this one.
    """
    folder = "" if context.folder is None else str(context.folder)
    module = read_eagle(find_checkpoint(folder, METHOD, context.identity), context.identity)
    model = context.model
    layer = EaglePass(module, *model.embeddings(), model.context, model.dtype, model.device)
    return EagleHead(EagleDrafter(layer))
