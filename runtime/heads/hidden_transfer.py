"""Hidden transfer (Wu et al. 2024, arXiv 2404.12022; its successor FIRP, 2410.20488): linear maps at chosen layers turn a token's state
into pseudo states of the places after it, which pass the remaining layers beside the verified rows, in the same pass. Maps are trained;
the target is left as it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.core.draft_nodes import NOTHING, DraftNodes
from runtime.core.errors import ModelRefused
from runtime.core.tree_builder import ways
from runtime.heads.base import HeadContext, Seen, ask_ahead
from runtime.models.base import Branch, Look
from runtime.models.head_checkpoint import TRAIN, Settings, read_settings, read_tensors
from runtime.models.sampler import candidates_all

BRANCHES = 6  # guesses of a place
MOST = 16  # maps


class HiddenTransfer(nn.Module):
    """One map for each place ahead. `layers[i]`: how many layers of the target the i-th pseudo state has no part in. Maps begin as
    identity."""

    def __init__(self, hidden_size: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.maps = nn.ModuleList(unchanging(hidden_size) for _ in self.layers)

    def pseudo(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The state (..., d) of the place index + 1 after that of `hidden` (..., d), both behind layers[index] layers."""
        state: torch.Tensor = self.maps[index](hidden)
        return state


def unchanging(size: int) -> nn.Linear:
    linear = nn.Linear(size, size)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class HiddenTransferHead:
    """A Head. Where nothing rode beside the row that the target stopped at, it is silent."""

    def __init__(self, module: HiddenTransfer) -> None:
        self.look = Look(
            branches=tuple(
                Branch(layer, linear)
                for layer, linear in zip(module.layers, module.maps, strict=True)
            )
        )

    def propose(self, seen: Sequence[Seen]) -> list[DraftNodes]:
        places = [
            one.riders.index(one.path[-1])
            if one.shown.ridden is not None and one.path[-1] in one.riders
            else None
            for one in seen
        ]
        asked = [
            (one.shown.ridden[place], ask_ahead(one, len(self.look.branches)), BRANCHES)
            for one, place in zip(seen, places, strict=True)
            if place is not None
        ]
        guesses = iter(candidates_all(asked))
        return [NOTHING if place is None else ways(*next(guesses)) for place in places]

    def close(self, session: str) -> None:
        pass


def layers_of(folder: Path, settings: Settings, most: int) -> list[int]:
    """Raises ModelRefused for what are no layers of the target in their order."""
    layers: Any = settings.get("layers")
    whole = (
        isinstance(layers, list)
        and 0 < len(layers) <= MOST
        and all(type(layer) is int and 0 < layer < most for layer in layers)
    )
    if not whole or layers != sorted(layers):
        raise ModelRefused(
            f"{folder}/config.json: {str(layers)[:32]} are not 1 to {MOST} layers from 1 to {most - 1} that do not fall"
        )
    return [*layers]


def build(mount: HeadContext) -> HiddenTransferHead:
    """Raises ModelRefused where nothing was trained for this target."""
    if mount.folder is None:
        raise ModelRefused(
            f"no hidden-transfer ships for this target: {TRAIN} hidden-transfer, and give its folder"
        )
    settings, d = (
        read_settings(mount.folder, "hidden-transfer", mount.identity),
        mount.identity.hidden_size,
    )
    layers = layers_of(mount.folder, settings, mount.identity.layers)
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(len(layers)):
        shapes |= {f"maps.{index}.weight": (d, d), f"maps.{index}.bias": (d,)}
    module = HiddenTransfer(d, layers)
    module.load_state_dict(read_tensors(mount.folder, shapes))
    return HiddenTransferHead(
        module.to(mount.model.device, mount.model.dtype).eval().requires_grad_(False)
    )
