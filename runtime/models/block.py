"""The draft layer of a block drafter (DFlash, arXiv 2602.06036): one pass guesses several places.

It is an EAGLE layer whose rows may also be masks. After the row of the last committed token follow
mask rows, one for each further place, with positions ahead and the same feature. So one pass gives
states of all places at once, and each place's logits are the distribution of its token whatever the
tokens in between are. A light Markov head corrects them by the token at the place before (DSpark,
arXiv 2607.05147), so that a tree of paths costs no further pass of the layer.

Shapes as in runtime.models.eagle; B is the number of places, and r the rank of the Markov head.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.models.base import ModelIdentity
from runtime.models.eagle import (
    Eagle,
    EagleShape,
    bfloat16_tensors,
    layer_shape,
    load_weights,
)
from runtime.models.head_checkpoint import read_settings, whole_number, write_checkpoint

METHOD = "block"
MAX_PLACES, MAX_RANK = 32, 4096


@dataclass(frozen=True, slots=True)
class BlockShape:
    """The settings of a checkpoint.

    layer   of the draft layer
    places  B, the number of places that a pass guesses: the row of the last token and B - 1 masks
    rank    r, the rank of the Markov head
    """

    layer: EagleShape
    places: int
    rank: int

    def as_settings(self) -> dict[str, Any]:
        return {**self.layer.as_settings(), "places": self.places, "rank": self.rank}


class Block(Eagle):
    """The draft layer with masks and the Markov head.

    `mask_embed` (B - 1, d) stand for the embeddings of the tokens that nobody knows yet. Logits of
    place j after token t are `logits_after(state, embedding of t, unembedding)` for j > 0, and
    `logits(state, unembedding)` for place 0, whose row knows its token. The former are a sum: of
    the place's own logits, and of a product of rank r.
    """

    def __init__(self, hidden_size: int, shape: BlockShape) -> None:
        super().__init__(hidden_size, shape.layer)
        d, self.block_shape = hidden_size, shape
        self.mask_embed = nn.Parameter(torch.randn(shape.places - 1, d))
        self.markov_gate = nn.Linear(d, shape.rank, bias=False)
        self.markov_in = nn.Linear(d, shape.rank, bias=False)
        self.markov_out = nn.Linear(shape.rank, d, bias=False)

    def gates(self, states: Tensor) -> Tensor:
        """Return what the Markov head takes from states (..., d): (..., r)."""
        return F.silu(self.markov_gate(self.final_norm(states)))

    def markov(self, gates: Tensor, embeddings: Tensor) -> Tensor:
        """Return (..., d), whose product with the unembedding corrects the logits of a place.

        embeddings  (..., d), the target's, of the tokens at the place before
        """
        corrected: Tensor = self.markov_out(gates * self.markov_in(self.token_norm(embeddings)))
        return corrected

    def logits_after(self, states: Tensor, embeddings: Tensor, unembedding: Tensor) -> Tensor:
        """Return logits (..., K) of a place above 0, given the tokens at the place before."""
        return F.linear(self.rows_after(states, embeddings), unembedding)

    def rows_after(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Return the rows (..., d) whose products with the unembedding are `logits_after`."""
        corrected = self.markov(self.gates(states), embeddings)
        rows: Tensor = self.final_norm(states) + corrected
        return rows


def read_block(folder: Path, identity: ModelIdentity) -> Block:
    """Read a checkpoint that was trained for this target, in its stored type.

    Raises ModelRefused as `read_eagle` does.
    """
    settings = read_settings(folder, METHOD, identity)
    shape = BlockShape(
        layer_shape(folder, settings, identity),
        whole_number(folder, settings, "places", 2, MAX_PLACES),
        whole_number(folder, settings, "rank", 1, MAX_RANK),
    )
    with torch.device("meta"):
        module = Block(identity.hidden_size, shape)
    return load_weights(folder, module, METHOD, identity)


def write_block(folder: Path, module: Block, identity: ModelIdentity) -> None:
    """Write a checkpoint in bfloat16. Raises OSError."""
    write_checkpoint(
        folder, METHOD, identity, module.block_shape.as_settings(), bfloat16_tensors(module)
    )
