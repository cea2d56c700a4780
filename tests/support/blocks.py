"""Makes an untrained block layer for the tiny target of tests.support.eagles."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from runtime.core.features import FeatureRows
from runtime.drafters.block import BlockDrafter, build
from runtime.models.block import Block, BlockShape, write_block
from runtime.models.head_checkpoint import target_identity
from runtime.models.loader import load_tokenizer
from tests.support import eagles
from tests.support.masks import ingredients

PLACES, RANK = 4, 6


class Tiny(NamedTuple):
    """Folders of a target and of a block layer for it; the target's module and the layer as
    stored."""

    target: Path
    folder: Path
    module: Any
    block: Block


@cache
def tiny(vocabulary: int = 4096, context: int = 4096) -> Tiny:
    found = eagles.tiny(vocabulary, context)
    torch.manual_seed(2)
    guessed = vocabulary // 2  # every second token
    layer = replace(eagles.SHAPE, draft_vocabulary=guessed)
    block = Block(32, BlockShape(layer, PLACES, RANK))
    block.draft_tokens = torch.arange(guessed) * 2
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    block = block.bfloat16()
    folder = found.folder.with_name("block")
    identity = target_identity(found.module.config, load_tokenizer(str(found.target)))
    write_block(folder, block, identity)
    return Tiny(found.target, folder, found.module, block.float().eval())


def drafter(found: Tiny) -> BlockDrafter:
    return build(ingredients(found.target, found.folder))


def straight(
    found: Tiny, features: FeatureRows, tokens: Sequence[int], path: Sequence[int]
) -> torch.Tensor:
    """Returns logits (draft vocabulary,) of the token after the text and a path of guesses, by the
    module alone. Every token has a row but those before the features."""
    block, table = found.block, found.module.get_input_embeddings().weight
    unembedding = found.module.get_output_embeddings().weight[block.draft_tokens]
    first, end = features.start + 1, len(tokens)
    true = torch.from_numpy(features.rows.view(np.int16)).view(torch.bfloat16).float()
    with torch.inference_mode():
        fused = block.fuse(true)
        rows = torch.cat([table[list(tokens[first:])], block.mask_embed])
        known = torch.cat([fused, fused[-1:].expand(PLACES - 1, -1)])
        q, k, v = block.project(rows, known, torch.arange(first, end + PLACES - 1))
        place = len(path)
        last = end - 1 - first  # the row of the last token sees the text, a mask all
        seen = slice(None, last + 1) if place == 0 else slice(None)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q[None, :, last + place : last + place + 1],
            k[None, :, seen],
            v[None, :, seen],
            enable_gqa=True,
        )[0]
        state = block.finish(fused[-1:], attended)
        if not path:
            logits: torch.Tensor = block.logits(state, unembedding)[0]
        else:
            logits = block.logits_after(state, table[path[-1]][None], unembedding)[0]
    return logits
