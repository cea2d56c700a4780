"""S3D (Zhong, Bharadwaj 2024, arXiv 2405.20314): the target without its middle layers, and mask rows behind the token that is to be
continued, each of which guesses a place further ahead: several tokens for one pass.

What the masks are and a low-rank adapter on the layers that stay are trained; the target is left as it is. A device of its own needs
these layers alone. Mask rows are the pseudo rows of runtime.models.base, begun below the first layer: nothing of them stays in a cache.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from runtime.core.draft_nodes import DraftNodes, stack
from runtime.core.errors import ModelRefused
from runtime.core.sampler_reference import SamplingInput
from runtime.drafters.base import DrafterContext
from runtime.drafters.model import ModelDrafter, SessionStep, children
from runtime.models.base import Branch, HiddenStateModel, OutputSpec, PassInput
from runtime.models.head_checkpoint import (
    Settings,
    read_settings,
    read_tensors,
    target_identity,
    whole_number,
)
from runtime.models.loader import find_folder, load_tokenizer, read_config
from runtime.models.lora import make_adapter, merge
from runtime.models.sampler import Candidates, candidates_all

BRANCHES = 2  # guesses of a mask row
MAX_MASKS, MAX_RANK = 16, 1024  # masks; rank of the adapter


class S3D(nn.Module):
    """What is trained: the embeddings of the masks, (masks, hidden size), and an adapter for `layers`, the target's own that stay."""

    def __init__(
        self, layers: Sequence[nn.Module], hidden_size: int, masks: int, rank: int
    ) -> None:
        super().__init__()
        self.mask_embed = nn.Parameter(torch.randn(masks, hidden_size))
        self.layers = make_adapter(layers, rank)


class MaskDrafter(ModelDrafter):
    """A ModelDrafter whose passes have mask rows beside the likeliest leaf of each session, but at the end of the context.

    What they guess of a place hangs below the best guess of the place before; a leaf there can still be asked about, and is then read.
    """

    def __init__(self, model: HiddenStateModel, masks: torch.Tensor) -> None:
        super().__init__(model)
        self.open, self.output_spec = (
            model,
            OutputSpec(branches=tuple(Branch(0, partial(expand_mask, mask)) for mask in masks)),
        )

    def guess(self, steps: Sequence[SessionStep]) -> list[DraftNodes]:
        output = (
            self.open.forward_outputs(
                [self.with_mask_rows(step) for step in steps], self.output_spec
            )
            if steps
            else []
        )
        for step in steps:
            step.commit_rows()
        nearest = self.children(
            steps,
            [
                one.logits[len(one.logits) - len(step.leaves) :]
                for step, one in zip(steps, output, strict=True)
            ],
        )
        branch_logits = [
            (step, one.branch_logits[0])
            for step, one in zip(steps, output, strict=True)
            if one.branch_logits is not None
        ]
        far = iter(
            candidates_all(
                [(rows, lookahead_input(step, len(rows)), BRANCHES) for step, rows in branch_logits]
            )
        )
        return [
            found
            if one.branch_logits is None
            else attach_lookahead(found, step.leaves[0], next(far), len(step.request.text.tree))
            for step, one, found in zip(steps, output, nearest, strict=True)
        ]

    def with_mask_rows(self, step: SessionStep) -> PassInput:
        pass_input, row = step.pass_input(), len(step.missing)
        fits = (
            step.leaves
            and pass_input.rows.positions[row] + len(self.output_spec.branches) < self.model.context
        )
        return replace(pass_input, branch_rows=(row,)) if fits else pass_input


def expand_mask(mask: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return mask.to(states.dtype).expand_as(states)


def lookahead_input(step: SessionStep, places: int) -> SamplingInput:
    """What follows the first leaf's child, what follows that, and so on, whatever they may be: of these tokens only the number is known."""
    text, leaf = step.request.text, step.leaves[0]
    path, unknown = text.tree.tokens_to(leaf), text.tree.token[leaf]
    paths = [[*path, *[unknown] * place] for place in range(1, places + 1)]
    return SamplingInput(text.sampling, text.prompt, text.tokens, paths, frozenset())


def attach_lookahead(nearest: DraftNodes, leaf: int, far: Candidates, roots: int) -> DraftNodes:
    """Hang the guesses for each place further ahead, (places, k), below the best child of `leaf`. The tree has `roots` nodes."""
    best = np.flatnonzero(nearest.parents == leaf)[:1].tolist()
    levels = [nearest]
    for tokens, scores in zip(*far, strict=True):
        level = children(best if len(levels) == 1 else [0], tokens[None], scores[None])
        if not len(best) or not len(level.tokens):
            break
        levels.append(level)
    return stack(levels, roots)


def check_kept_layers(folder: Path, settings: Settings, layer_count: int) -> list[int]:
    """Raises ModelRefused for what are no layers of the target in their order."""
    layers: Any = settings.get("layers")
    whole = (
        isinstance(layers, list)
        and bool(layers)
        and all(type(layer) is int and 0 <= layer < layer_count for layer in layers)
    )
    if not whole or layers != sorted(set(layers)):
        raise ModelRefused(
            f"{folder}/config.json: layers {str(layers)[:32]} are not some of 0 to {layer_count - 1} that rise: copy it again"
        )
    return [*layers]


def build(context: DrafterContext) -> MaskDrafter:
    """Raises ModelRefused for a folder that was not trained for this target, and for a target that takes no mask rows."""
    folder, target = Path(context.draft), context.target
    identity = target_identity(read_config(find_folder(target), target), load_tokenizer(target))
    settings = read_settings(folder, "s3d", identity)
    layers = check_kept_layers(folder, settings, identity.layers)
    masks, rank = (
        whole_number(folder, settings, "masks", 1, MAX_MASKS),
        whole_number(folder, settings, "rank", 1, MAX_RANK),
    )
    learned: list[S3D] = []

    def change(module: Any) -> None:
        made = S3D(module.model.layers, identity.hidden_size, masks, rank)
        made.load_state_dict(
            read_tensors(
                folder, {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
            )
        )
        merge(module.model.layers, made.layers)
        learned.append(made)

    model = context.load_changed(target, layers, change)
    drafter = MaskDrafter(model, learned[0].mask_embed.detach().to(model.device))
    model.check(drafter.output_spec)
    return drafter
