"""Hidden transfer (Wu et al. 2024, arXiv 2404.12022; its successor FIRP, 2410.20488): linear maps at chosen layers turn a token's state
into pseudo states of the places after it, which pass the remaining layers beside the verified rows, in the same pass. Maps are trained;
the target is left as it is.
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

BRANCHES = 6  # guesses of a place
MAX_MAPS = 16  # maps


class HiddenTransfer(nn.Module):
    """One map for each place ahead. `layers[i]`: how many layers of the target the i-th pseudo state has no part in. Maps begin as
    identity."""

    def __init__(self, hidden_size: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.maps = nn.ModuleList(identity_linear(hidden_size) for _ in self.layers)

    def pseudo(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The state (..., d) of the place index + 1 after that of `hidden` (..., d), both behind layers[index] layers."""
        state: torch.Tensor = self.maps[index](hidden)
        return state


def identity_linear(size: int) -> nn.Linear:
    linear = nn.Linear(size, size)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class HiddenTransferHead:
    """A Head. Where nothing rode beside the row that the target stopped at, it is silent."""

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
    """Raises ModelRefused for what are no layers of the target in their order."""
    layers: Any = settings.get("layers")
    whole = (
        isinstance(layers, list)
        and 0 < len(layers) <= MAX_MAPS
        and all(type(layer) is int and 0 < layer < layer_count for layer in layers)
    )
    if not whole or layers != sorted(layers):
        raise ModelRefused(
            f"{folder}/config.json: {str(layers)[:32]} are not 1 to {MAX_MAPS} layers from 1 to {layer_count - 1} that do not fall"
        )
    return [*layers]


def build(context: HeadContext) -> HiddenTransferHead:
    """Raises ModelRefused where nothing was trained for this target."""
    if context.folder is None:
        raise ModelRefused(
            f"no hidden-transfer ships for this target: {TRAIN_HINT} hidden-transfer, and give its folder"
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
