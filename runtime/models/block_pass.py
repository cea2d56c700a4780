"""The passes of a block drafter: a heavy one through the draft layer, then light ones below it.

A heavy pass reads new rows of a text, and ends in a block: the mask rows after its last token. What
it found for each place is kept as `Places`. A light pass gives the logits of nodes of the tree from
that and from their own tokens: a table lookup and two small products, for any number of nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from runtime.kernels.linear import LinearOp
from runtime.models.block import Block
from runtime.models.eagle_pass import EagleInput, EaglePass, Slots
from runtime.models.llama_layers import fused


@dataclass(frozen=True, slots=True)
class Places:
    """What a heavy pass found for each place after a text, place 0 being the next token.

    logits  (n, K), of the draft tokens, whatever stands at the places before
    gates   (n, r), for the Markov head; zero at place 0, whose row knew the token before
    """

    logits: torch.Tensor
    gates: torch.Tensor


@dataclass(frozen=True, slots=True)
class PlacedNodes:
    """Nodes of one text's tree.

    depths  int64 (w,), below the number of places
    tokens  int64 (w,)
    """

    places: Places
    depths: Slots
    tokens: Slots


class BlockPass(EaglePass):
    """Computes what `module` does, in `dtype` on `device`. Arguments as of EaglePass."""

    def __init__(
        self,
        module: Block,
        embedding: torch.Tensor,
        unembedding: torch.Tensor,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(module, embedding, unembedding, context, dtype, device)
        self.place_count = module.block_shape.places
        pack = self._head.choice.kernel != "torch"
        self._masks = module.mask_embed.detach().to(device, self._stream)
        self._gate = fused(module.markov_gate, pack=pack)
        self._token_in = fused(module.markov_in, pack=pack)
        with torch.inference_mode(False), torch.no_grad():
            rows = self._head.weight.float() @ module.markov_out.weight.detach().float()
            self._markov = LinearOp(rows.to(dtype), None, pack)

    def places(self, parts: Sequence[EagleInput]) -> list[Places | None]:
        """Return the places after each part; None for a part without a block.

        Rows of a part beyond its tokens, which belong to its text, are mask rows. They have the
        feature of its last token's row.
        """
        with torch.inference_mode():
            return self._places(parts)

    def _places(self, parts: Sequence[EagleInput]) -> list[Places | None]:
        blocks = [len(part.positions) - len(part.tokens) for part in parts]
        embedded, features = [], []
        texts = self._embed(parts).split([len(part.tokens) for part in parts])
        for text, rows, masks in zip(texts, self._fused(parts), blocks, strict=True):
            embedded += [text, self._masks[:masks]]
            features += [rows, rows[-1:].expand(masks, -1)]
        states = self._layer(parts, torch.cat(embedded), torch.cat(features))
        asked = [part for part, masks in enumerate(blocks) if len(parts[part].wanted)]
        if not asked:
            return [None] * len(parts)
        chosen = [states[part][-1 - blocks[part] :] for part in asked]
        rows = self._final_norm(torch.cat(chosen))
        gates = torch.nn.functional.silu(self._gate(rows))
        counts = [len(one) for one in chosen]
        found: list[Places | None] = [None] * len(parts)
        for part, logits, of in zip(
            asked, self._head(rows).split(counts), gates.split(counts), strict=True
        ):
            of[0] = 0
            found[part] = Places(logits, of)
        return found

    def below(self, parts: Sequence[PlacedNodes]) -> list[torch.Tensor]:
        """Return float32 logits (w, K) of the children of each part's nodes over the draft
        tokens."""
        with torch.inference_mode():
            depths = [self._index([part.depths]) for part in parts]
            gates, logits = (
                torch.cat([rows.index_select(0, at) for rows, at in zip(of, depths, strict=True)])
                for of in (
                    [part.places.gates for part in parts],
                    [part.places.logits for part in parts],
                )
            )
            tokens = self._index([np.concatenate([part.tokens for part in parts])])
            embedded = self._embedding.index_select(0, tokens).to(self._stream)
            rows = gates * self._token_in(self._token_norm(embedded))
            found = self._markov(rows, logits).float()
            return list(found.split([len(part.tokens) for part in parts]))
