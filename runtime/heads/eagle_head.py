"""EAGLE on the target itself (arXiv 2401.15077, 2503.01840): the layer of runtime.drafters.eagle.

After each step it reads the features of the accepted rows, and guesses `DEPTH` places in as many
small passes on the target's own device, before the next step begins. It needs no second device,
and its guesses start from the target's newest states. Drafters elsewhere guess further ahead.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from runtime.core import limits
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

DEPTH, WIDTH = 2, 4  # passes, and nodes expanded in each but the first


class EagleHead:
    """A Head that grows a small tree of its own for each session."""

    def __init__(self, drafter: EagleDrafter, depth: int = DEPTH, width: int = WIDTH) -> None:
        self.drafter, self.depth, self.width = drafter, depth, width
        self.output_spec = OutputSpec(features=drafter.feature_spec.layers)

    def propose(self, seen: Sequence[VerifiedStep]) -> list[DraftNodes]:
        texts = [self.text_of(one) for one in seen]
        leaves: list[list[int]] = [[0] for _ in texts]
        for _ in range(self.depth):
            asking = [place for place, chosen in enumerate(leaves) if chosen]
            requests = [ExpandRequest(texts[place], leaves[place]) for place in asking]
            for place, nodes in zip(asking, self.drafter.expand(requests), strict=True):
                leaves[place] = [] if nodes is None else self.insert(texts[place].tree, nodes)
        return [nodes_of(text.tree) for text in texts]

    def text_of(self, seen: VerifiedStep) -> Text:
        """Return the text with its features and an empty tree."""
        text, kept, features = seen.text, seen.features, None
        tree = TokenTree(text.tree.key[0], text.tokens[-1], limits.TREE_NODES, limits.TREE_DEPTH)
        if kept is not None:
            known = kept.between(0, len(text.tokens) - 1)
            bits = LayerFeatures(kept.layers, known.rows).of(self.output_spec.features)
            features = None if bits is None else FeatureRows(known.start, bits)
        return replace(text, tree=tree, features=features)

    def insert(self, tree: TokenTree, nodes: DraftNodes) -> list[int]:
        """Add guesses to the tree; return the likeliest of them, to be expanded next."""
        found = zip(
            nodes.parents.tolist(), nodes.tokens.tolist(), nodes.scores.tolist(), strict=True
        )
        added = [tree.add(parent, token, score) for parent, token, score in found]
        new = [node for node in added if node is not None]
        return sorted(new, key=lambda node: -tree.path[node])[: self.width]

    def close(self, session: str) -> None:
        self.drafter.close(session)


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
