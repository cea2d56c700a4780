"""S3D (Zhong, Bharadwaj 2024, arXiv 2405.20314): drafts several tokens per pass with mask rows.

The drafter is the target without its middle layers. Each mask row after the token to continue
guesses one place further ahead. Only the mask embeddings and a low-rank adapter on the remaining
layers are trained; the target does not change. The drafter's device holds only these layers. Mask
rows are the pseudo rows of runtime.models.base that enter below the first layer, so nothing of them
stays in a cache.
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
from runtime.models.loader import load_tokenizer, read_config
from runtime.models.lora import make_adapter, merge
from runtime.models.model_folder import find_folder
from runtime.models.sampler import Candidates, candidates_all

BRANCHES = 2  # guesses per mask row
MAX_MASKS, MAX_RANK = 16, 1024  # of masks, and of the adapter's rank


class S3D(nn.Module):
    """The trained weights: mask embeddings (masks, hidden size) and an adapter for `layers`.

    `layers` are the layers of the target that remain.
    """

    def __init__(
        self, layers: Sequence[nn.Module], hidden_size: int, masks: int, rank: int
    ) -> None:
        super().__init__()
        self.mask_embed = nn.Parameter(torch.randn(masks, hidden_size))
        self.layers = make_adapter(layers, rank)


class MaskDrafter(ModelDrafter):
    """A ModelDrafter whose passes carry mask rows next to the likeliest leaf of each session.

    The guesses for a place hang below the best guess of the place before. The target may still ask
    about a leaf there, which then gets its own row. Mask rows are omitted at the end of the
    context.
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
    """Return the sampling input of the places after the first leaf's child.

    Only the number of tokens up to there is known, not the tokens.
    """
    text, leaf = step.request.text, step.leaves[0]
    path, unknown = text.tree.tokens_to(leaf), text.tree.token[leaf]
    paths = [[*path, *[unknown] * place] for place in range(1, places + 1)]
    return SamplingInput(text.sampling, text.prompt, text.tokens, paths, frozenset())


def attach_lookahead(nearest: DraftNodes, leaf: int, far: Candidates, roots: int) -> DraftNodes:
    """Attach the guesses for each further place, (places, k), below the best child of `leaf`.

    The tree has `roots` nodes.
    """
    best = np.flatnonzero(nearest.parents == leaf)[:1].tolist()
    levels = [nearest]
    for tokens, scores in zip(*far, strict=True):
        level = children(best if len(levels) == 1 else [0], tokens[None], scores[None])
        if not len(best) or not len(level.tokens):
            break
        levels.append(level)
    return stack(levels, roots)


def check_kept_layers(folder: Path, settings: Settings, layer_count: int) -> list[int]:
    """Return the layer numbers of a checkpoint.

    Raises ModelRefused unless they are rising layer numbers of the target.
    """
    layers: Any = settings.get("layers")
    whole = (
        isinstance(layers, list)
        and bool(layers)
        and all(type(layer) is int and 0 <= layer < layer_count for layer in layers)
    )
    if not whole or layers != sorted(set(layers)):
        raise ModelRefused(
            f"{folder}/config.json: layers {str(layers)[:32]} must rise and lie "
            f"between 0 and {layer_count - 1}: copy the file again"
        )
    return [*layers]


def build(context: DrafterContext) -> MaskDrafter:
    """Build the drafter. Raises ModelRefused for a checkpoint of another target or a target without
    mask rows.
    """
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
