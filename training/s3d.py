"""Training of S3D (arXiv 2405.20314): mask rows follow each token and pass through the kept layers,
which have an adapter."""

from typing import Any

import torch
from torch import Tensor, nn

from runtime.drafters.s3d import S3D
from runtime.models.lora import adapter_applied
from training.heads import Forward
from training.hidden_transfer import pseudo_row_mask
from training.loop import TrainingSettings
from training.teacher import States, Teacher

# for Muon: an adapter's two matrices multiply each other, and they change weights that are already
# trained
ADAPTER_RATE = 0.007


def s3d_settings(steps: int, seed: int) -> TrainingSettings:
    return TrainingSettings(steps, seed, matrix_rate=ADAPTER_RATE)


def default_skipped(layers: int) -> list[int]:
    """Return the layers skipped by default: a quarter is kept before them, and one layer after
    them."""
    return list(range(max(1, layers // 4), layers - 1))


def new_s3d(teacher: Teacher, layers: list[int], masks: int, rank: int, seed: int) -> S3D:
    """Create an untrained drafter. Mask rows start as random embeddings of the usual magnitude."""
    torch.manual_seed(seed)
    body: Any = teacher.module.model
    made = S3D([body.layers[layer] for layer in layers], teacher.hidden_size, masks, rank)
    with torch.no_grad():
        made.mask_embed.mul_(body.embed_tokens.weight.float().std().cpu())
    return made


def make_forward(made: S3D, teacher: Teacher, layers: list[int]) -> Forward:
    """Return the forward pass of the drafter.

    State 0 of row p is the row's own state after the kept layers. State i is that of its mask row i
    at position p + i.
    """
    body: Any = teacher.module.model
    kept: list[nn.Module] = [body.layers[layer] for layer in layers]

    def states(seen: States) -> tuple[Tensor, Tensor]:
        tokens, masks = seen.layers[0], made.mask_embed
        (batch, context), device = tokens.shape[:2], tokens.device
        rows = masks.to(tokens.dtype).repeat_interleave(context, 0).expand(batch, -1, -1)
        x = torch.cat([tokens, rows], dim=1)
        places = (
            (
                torch.arange(context).repeat(1 + len(masks), 1)
                + torch.arange(1 + len(masks))[:, None]
            )
            .flatten()[None]
            .to(device)
        )
        mask, angles = s3d_mask(context, len(masks), device), body.rotary_emb(x, places)
        with adapter_applied(kept, made.layers):
            for layer in kept:
                x = layer(x, attention_mask=mask, position_ids=places, position_embeddings=angles)
        found: Tensor = body.norm(x).view(batch, 1 + len(masks), context, -1).movedim(1, 0)
        return found, torch.zeros((), device=device)

    return states


def s3d_mask(context: int, masks: int, device: torch.device) -> Tensor:
    """Return the attention mask, bool (1, 1, n, n), for n rows: the text's, then the masks' by
    position.

    A row of the text sees the preceding text and no mask row.
    """
    text = torch.ones(context, context, dtype=torch.bool, device=device).tril()
    none = torch.zeros(context, masks * context, dtype=torch.bool, device=device)
    return torch.cat(
        [torch.cat([text, none], dim=1)[None, None], pseudo_row_mask(context, masks, device)], dim=2
    )
