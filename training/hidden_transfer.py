"""Training of hidden transfer (arXiv 2404.12022): pseudo states of later positions pass through the
frozen target's upper layers together with its own states."""

from typing import Any

import torch
from torch import Tensor

from runtime.core.errors import ModelRefused
from runtime.heads.hidden_transfer import HiddenTransfer
from runtime.models.attention_mask import layer_windows
from runtime.models.llama import is_llama
from training.heads import Forward
from training.teacher import States, Teacher

# weight of the layer-wise distance between pseudo and true states, relative to the distance of
# their predictions
STATE_LOSS_WEIGHT = 0.5


class ReadOnlyCache:
    """A cache with the target's keys and values of a text, for rows that read but add none.

    It has the one cache method that layers call.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        real = self.cache.layers[layer]
        return torch.cat([real.keys, keys], dim=2), torch.cat([real.values, values], dim=2)


def check_target(teacher: Teacher, context: int) -> None:
    """Raise ModelRefused if the target's layers cannot be run one by one over a text of this
    length."""
    name, config = teacher.model.name, teacher.module.config
    if not is_llama(teacher.module):
        raise ModelRefused(
            f"model {name} ({config.model_type}) is not a Llama-like model: train medusa for it"
        )
    if any(window is not None and window <= context for window in layer_windows(config).values()):
        raise ModelRefused(
            f"model {name} attends to fewer than {context} tokens: give a smaller --context"
        )


def default_layers(layers: int, positions: int) -> list[int]:
    """Return the layer at which each position's pseudo states enter: a third of the way up, and one
    layer later for each further position."""
    return [min(layers - 1, max(1, layers // 3) + i) for i in range(positions)]


def make_forward(maps: HiddenTransfer, teacher: Teacher) -> Forward:
    """Return the forward pass of the pseudo rows.

    Pseudo row i of row p enters layer l_i at position p + 1 + i. It sees everything that row p
    sees, row p, the pseudo rows before it, and itself. The additional loss is the squared distance
    of pseudo from true states after each layer, relative to the size of the true states.
    """
    body: Any = teacher.module.model
    lowest, positions = min(maps.layers), len(maps.layers)

    def states(seen: States) -> tuple[Tensor, Tensor]:
        batch, context = seen.last.shape[:2]
        places = (
            torch.arange(context, device=seen.last.device).repeat(positions, 1)
            + torch.arange(positions)[:, None].to(seen.last.device)
            + 1
        )
        mask, keys = (
            pseudo_row_mask(context, positions, seen.last.device),
            ReadOnlyCache(seen.cache),
        )
        x = seen.last[:, :0]
        far, terms = torch.zeros((), device=seen.last.device), 0
        for number in range(lowest, len(body.layers)):
            for entering in range(
                x.shape[1] // context, sum(layer <= number for layer in maps.layers)
            ):
                x = torch.cat(
                    [x, maps.pseudo(entering, seen.layers[number].float()).to(x.dtype)], dim=1
                )
            n = x.shape[1]
            where = places.flatten()[None, :n]
            x = body.layers[number](
                x,
                attention_mask=mask[:, :, :n, : context + n],
                position_ids=where,
                past_key_values=keys,
                position_embeddings=body.rotary_emb(x, where),
            )
            if number + 1 < len(body.layers):
                far = far + state_distance(
                    x.view(batch, -1, context, x.shape[-1]), seen.layers[number + 1]
                )
                terms += 1
        found: Tensor = body.norm(x).view(batch, positions, context, -1).movedim(1, 0)
        return found, STATE_LOSS_WEIGHT * far / max(1, terms)

    return states


def pseudo_row_mask(context: int, positions: int, device: torch.device) -> Tensor:
    """Return the attention mask of pseudo rows: bool (1, 1, positions * context, (1 + positions) *
    context). The keys are those of the text, followed by those of the pseudo rows."""
    text = torch.ones(context, context, dtype=torch.bool, device=device).tril()
    own = torch.eye(context, dtype=torch.bool, device=device)
    none = torch.zeros_like(own)
    rows = [[text, *(own if j <= i else none for j in range(positions))] for i in range(positions)]
    return torch.cat([torch.cat(row, dim=1) for row in rows])[None, None]


def state_distance(pseudo: Tensor, true: Tensor) -> Tensor:
    """Return the squared distance relative to the true states' squares, averaged over positions.

    `pseudo` (batch, positions, context, hidden) is shifted right by one more than `true` (batch,
    context, hidden) for each position.
    """
    total = torch.zeros((), device=true.device)
    for i in range(pseudo.shape[1]):
        wanted = true[:, 1 + i :].float()
        off = pseudo[:, i, : wanted.shape[1]].float() - wanted
        total = total + off.square().sum(-1).div(wanted.square().sum(-1).clamp_min(1e-6)).mean()
    return total / pseudo.shape[1]
