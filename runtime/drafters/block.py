"""A block drafter (DFlash, arXiv 2602.06036; DSpark, 2607.05147): one pass for all next places.

After a commit one heavy pass reads its tokens with the target's own hidden states, and ends in a
block of mask rows: it guesses all next places at once. The tree below the new root then grows to
any width by light passes alone, which order the guesses of a place by the token before it. Nothing
is guessed beyond the block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from runtime.drafters.base import DrafterContext, ExpandRequest
from runtime.drafters.eagle import (
    EagleDrafter,
    EagleStep,
    pass_arguments,
    reuse_cache,
    undone_on_failure,
)
from runtime.drafters.model import BRANCHES, CHUNK_TOKENS, FINISHED_SLOTS
from runtime.models.block import METHOD, read_block
from runtime.models.block_pass import BlockPass, PlacedNodes, Places
from runtime.models.eagle_pass import EagleInput, Slots


@dataclass(frozen=True, slots=True)
class RootPlaces:
    """The places after the text with this key."""

    key: int
    places: Places


class BlockDrafter(EagleDrafter):
    """Drafts with a block layer. Its cache holds the rows of the text and none of the tree."""

    model: BlockPass

    def __init__(
        self,
        model: BlockPass,
        branches: int = BRANCHES,
        chunk: int = CHUNK_TOKENS,
        finished: int = FINISHED_SLOTS,
    ) -> None:
        super().__init__(model, branches, chunk, finished)
        self.found: dict[str, RootPlaces] = {}

    def step(self, request: ExpandRequest) -> EagleStep | None:
        text, features = request.text, request.text.features
        if features is None or not len(features.rows):
            return None
        kept = self.kept.get(text.session)
        if kept is None or kept.prefix <= features.start:
            kept = self.kept[text.session] = self.new_session(text, features)
            self.found.pop(text.session, None)
        length, context = len(text.tokens), self.model.context
        readable = max(kept.prefix, min(length, context, features.end + 1))
        whole = readable == length
        found = self.found.get(text.session)
        known = found is not None and found.key == text.tree.key[0]
        reuse_cache(kept, text, whole, whole and not known)
        missing = readable - kept.prefix
        if not whole:
            return EagleStep(request, kept, missing, (), (), False, readable < context)
        count = self.masks(length) + 1
        leaves = [leaf for leaf in request.leaves if leaf and text.tree.depth[leaf] < count]
        return EagleStep(request, kept, missing, leaves, (), 0 in request.leaves, False)

    def masks(self, length: int) -> int:
        """Return the number of mask rows after a text: fewer at the end of the context."""
        return min(self.model.place_count - 1, self.model.context - length)

    def logits(self, steps: Sequence[EagleStep]) -> tuple[list[torch.Tensor], Slots]:
        """Run a heavy pass over the texts with new tokens, and a light one over all nodes."""
        heavy = [step for step in steps if step.missing]
        if heavy:
            self.read(heavy)
        asking = [step for step in steps if step.asked]
        if not asking:
            return [torch.empty(0)] * len(steps), self.model.draft_tokens
        below = iter(self.model.below([self.placed_nodes(step) for step in asking]))
        found = [next(below) if step.asked else torch.empty(0) for step in steps]
        return found, self.model.draft_tokens

    def read(self, steps: Sequence[EagleStep]) -> None:
        """Read the new tokens of each text, and guess the places after those read to their end."""
        with undone_on_failure(steps):
            passed = self.model.places([self.block_input(step) for step in steps])
        for step, places in zip(steps, passed, strict=True):
            step.kept.cache.truncate(step.kept.prefix + step.missing)
            replace(step, leaves=()).commit_rows()
            if places is not None:
                text = step.request.text
                self.found[text.session] = RootPlaces(text.tree.key[0], places)

    def block_input(self, step: EagleStep) -> EagleInput:
        """Append the slots of the rows of text, and of the block behind them if the text ends."""
        rows = replace(step, leaves=(), ancestors=(), root=not step.reading).pass_input()
        if step.reading:
            return rows
        m, cache, end = step.missing, rows.cache, step.kept.prefix + step.missing
        masks = self.masks(end)
        cache.append(masks)
        visible = np.ones((m + masks, cache.length - rows.first), dtype=np.bool_)
        visible[:m] = False
        visible[:m, : end - rows.first] = rows.visible
        positions = np.arange(step.kept.prefix, end + masks)
        return replace(rows, positions=positions, visible=visible)

    def placed_nodes(self, step: EagleStep) -> PlacedNodes:
        tree, nodes = step.request.text.tree, step.asked
        return PlacedNodes(
            self.found[step.request.text.session].places,
            np.array([tree.depth[node] for node in nodes], dtype=np.int64),
            np.array([tree.token[node] for node in nodes], dtype=np.int64),
        )

    def close(self, session: str) -> None:
        self.found.pop(session, None)
        super().close(session)


def build(context: DrafterContext) -> BlockDrafter:
    """Build the drafter. Raises ModelRefused for a checkpoint of another target, or if none ships
    for this one.
    """
    return BlockDrafter(BlockPass(*pass_arguments(context, METHOD, read_block)))
