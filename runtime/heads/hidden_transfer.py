"""Hidden transfer: linear maps turn a token's hidden state into pseudo states of later places.

See Wu et al. (2024, arXiv 2404.12022) and its successor FIRP (arXiv 2410.20488). The pseudo states
enter at chosen layers and pass the remaining layers together with the verified rows, in the same
pass. Only the maps are trained; the target does not change.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.core.draft_nodes import NO_NODES, DraftNodes
from runtime.core.errors import ModelRefused
from runtime.core.tree_builder import best_first
from runtime.heads.base import HeadContext, VerifiedStep, ask_ahead
from runtime.models.base import Branch, OutputSpec
from runtime.models.head_checkpoint import TRAIN_HINT, Settings, read_settings, read_tensors
from runtime.models.sampler import candidates_all

BRANCHES = 6  # guesses per place
MAX_MAPS = 16


class HiddenTransfer(nn.Module):
    """One map per place ahead, initialised to the identity.

    The i-th pseudo state skips the first `layers[i]` layers of the target.
    """

    def __init__(self, hidden_size: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.maps = nn.ModuleList(identity_linear(hidden_size) for _ in self.layers)

    def pseudo(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Map states (..., d) to the states (..., d) `index` + 1 places later.

        Both are the states after layers[index] layers.
        """
        state: torch.Tensor = self.maps[index](hidden)
        return state


def identity_linear(size: int) -> nn.Linear:
    linear = nn.Linear(size, size)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class HiddenTransferHead:
    """A Head that is silent if no pseudo row branched from the row at which the target stopped."""

    def __init__(self, module: HiddenTransfer) -> None:
        self.output_spec = OutputSpec(
            branches=tuple(
                Branch(layer, linear)
                for layer, linear in zip(module.layers, module.maps, strict=True)
            )
        )

    def propose(self, seen: Sequence[VerifiedStep]) -> list[DraftNodes]:
        places = [
            one.branch_rows.index(one.path[-1])
            if one.output.branch_logits is not None and one.path[-1] in one.branch_rows
            else None
            for one in seen
        ]
        asked = [
            (
                one.output.branch_logits[place],
                ask_ahead(one, len(self.output_spec.branches)),
                BRANCHES,
            )
            for one, place in zip(seen, places, strict=True)
            if place is not None
        ]
        guesses = iter(candidates_all(asked))
        return [NO_NODES if place is None else best_first(*next(guesses)) for place in places]

    def close(self, session: str) -> None:
        pass


def check_branch_layers(folder: Path, settings: Settings, layer_count: int) -> list[int]:
    """Return the layer numbers of a checkpoint.

    Raises ModelRefused unless they are layer numbers of the target that do not fall.
    """
    layers: Any = settings.get("layers")
    whole = (
        isinstance(layers, list)
        and 0 < len(layers) <= MAX_MAPS
        and all(type(layer) is int and 0 < layer < layer_count for layer in layers)
    )
    if not whole or layers != sorted(layers):
        raise ModelRefused(
            f"{folder}/config.json: {str(layers)[:32]} must be 1 to {MAX_MAPS} "
            f"layers from 1 to {layer_count - 1} that do not fall"
        )
    return [*layers]


def build(context: HeadContext) -> HiddenTransferHead:
    """Build the head. Raises ModelRefused if it was not trained for this target."""
    if context.folder is None:
        raise ModelRefused(
            "no hidden-transfer ships for this target: "
            f"{TRAIN_HINT} hidden-transfer, and give its folder"
        )
    settings, d = (
        read_settings(context.folder, "hidden-transfer", context.identity),
        context.identity.hidden_size,
    )
    layers = check_branch_layers(context.folder, settings, context.identity.layers)
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(len(layers)):
        shapes |= {f"maps.{index}.weight": (d, d), f"maps.{index}.bias": (d,)}
    module = HiddenTransfer(d, layers)
    module.load_state_dict(read_tensors(context.folder, shapes))
    return HiddenTransferHead(
        module.to(context.model.device, context.model.dtype).eval().requires_grad_(False)
    )
