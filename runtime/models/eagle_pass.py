"""The pass of an EAGLE draft layer over rows of several texts: what a drafter computes.

A row has a token and the feature of the token before it, see runtime.models.eagle. Its slot of the
cache holds its keys, its values and its state, which is the feature of the rows below it. So a text
can be read with the target's features, and continued from the layer's own states in any tree.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from runtime.core import limits
from runtime.core.clock import Clock
from runtime.core.features import FeatureBits, FeatureSpec
from runtime.kernels.attention import Attention, has_attention, load_attention
from runtime.kernels.linear import LinearOp, has_room
from runtime.kv.store import TorchCache
from runtime.models.eagle import Eagle, rotary_angles
from runtime.models.llama_layers import RMSNorm, fused, gated, turn
from runtime.models.step_timing import TEXT_TOKENS

Slots = npt.NDArray[np.int64]
INITIAL_POSITIONS = 512  # in the first table of angles


def no_tokens() -> Slots:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class EagleInput:
    """One text's share of a pass: m rows of its text, then guesses. The cache has slots for all.

    cache      of `EaglePass.new_cache`
    tokens     int64 (n,)
    positions  int64 (n,) of the tokens in the text
    features   bfloat16 bits (m, width): the target's, of the tokens before the first m rows
    parents    int64 (n - m,): slots whose states are the features of the other rows
    begin      slot of the first row; the rows of the text follow one another from there, and the
               other rows take the last n - m slots
    first      slots before it are hidden from all rows
    visible    bool (n, length - first): the slots that each row attends to, its own included
    wanted     int64 (w,): rows whose children are asked for
    own        int64 (e,): tokens outside of the draft vocabulary that can be guessed too
    """

    cache: TorchCache
    tokens: Slots
    positions: Slots
    features: FeatureBits
    parents: Slots
    begin: int
    first: int
    visible: npt.NDArray[np.bool_]
    wanted: Slots
    own: Slots = field(default_factory=no_tokens)


class EaglePass:
    """Computes what `module` does, with weights and cache in `dtype` on `device`.

    On a CPU it computes in float32 between products, by code compiled for the processor, as
    LlamaPass does; elsewhere in `dtype`, by torch.

    embedding    (vocabulary, d), the target's
    unembedding  (vocabulary, d), the target's; the layer guesses its draft vocabulary only, and
                 what a text has of its own
    context      most tokens of a text
    """

    def __init__(
        self,
        module: Eagle,
        embedding: torch.Tensor,
        unembedding: torch.Tensor,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = module.shape
        self.context, self.dtype, self.device = context, dtype, device
        self.feature_spec = FeatureSpec(shape.layers)
        self.width = module.fuse.in_features
        self.vocabulary = len(embedding)
        self.draft_tokens = module.draft_tokens.cpu().numpy()
        module = module.to(device, dtype)
        pack = has_room(module)
        self._heads, self._kv, self._dim = shape.heads, shape.kv_heads, shape.head_dim
        self._theta, self._scale = shape.rope_theta, shape.head_dim**-0.5
        compiled = device.type == "cpu"
        self._stream = torch.float32 if compiled else dtype
        self._compiled = compiled and has_attention(device, dtype, self._dim, self._scale)
        self._state = 1, embedding.shape[1]
        self._embedding = embedding.to(device)
        self._fuse = fused(module.fuse, pack=pack)
        self._token_norm, self._feature_norm, self._mlp_norm, self._final_norm = (
            RMSNorm(norm.weight, norm.eps, compiled)
            for norm in (
                module.token_norm,
                module.feature_norm,
                module.mlp_norm,
                module.final_norm,
            )
        )
        self._qkv = fused(module.q, module.k, module.v, pack=pack)
        self._out = fused(module.o, pack=pack)
        self._gate_up = fused(module.gate, module.up, pack=pack)
        self._down = fused(module.down, pack=pack)
        self._unembedding = unembedding.to(device)
        rows = unembedding[module.draft_tokens.to(unembedding.device)].to(device, dtype)
        self._head = LinearOp(rows, None, pack)
        self._rope = self._rope_table(min(INITIAL_POSITIONS, context))

    def new_cache(self) -> TorchCache:
        """Return a cache for the whole context and a full tree; memory grows with use."""
        slots = self.context + limits.TREE_NODES
        pair = (2 * self._kv, self._dim), self._state
        return TorchCache([pair], slots, self.dtype, self.device)

    def __call__(self, parts: Sequence[EagleInput]) -> list[torch.Tensor]:
        """Return float32 logits (w, k) of each part's wanted rows over `guessable(parts)`."""
        with torch.inference_mode():
            return self._run(parts)

    def _run(self, parts: Sequence[EagleInput]) -> list[torch.Tensor]:
        states = self._layer(parts, self._embed(parts), self._features(parts))
        wanted = []
        for part, rows in zip(parts, states, strict=True):
            plane = part.cache.plane(self._state, 0)[0, 0]
            self._write(part, plane, rows)
            wanted.append(rows.index_select(0, self._index([part.wanted])))
        kept = wanted[0] if len(parts) == 1 else torch.cat(wanted)
        final = self._final_norm(kept)
        logits = self._head(final).float()
        if len(own := own_tokens(parts)):
            rows = self._unembedding.index_select(0, self._index([own])).to(self.dtype)
            logits = torch.cat([logits, F.linear(final.to(self.dtype), rows).float()], dim=-1)
        found = list(logits.split([len(rows) for rows in wanted]))
        if len(parts) > 1:  # no text shows in another one
            for part, rows in zip(parts, found, strict=True):
                others = np.flatnonzero(~np.isin(own, part.own)) + len(self.draft_tokens)
                rows[:, self._index([others])] = -torch.inf
        return found

    def guessable(self, parts: Sequence[EagleInput]) -> Slots:
        """Return the tokens (k,) that a pass over these parts can guess: the draft vocabulary, and
        then the parts' own."""
        return np.concatenate([self.draft_tokens, own_tokens(parts)])

    def _layer(
        self, parts: Sequence[EagleInput], embedded: torch.Tensor, features: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the states of each part's rows. Their keys and values are in the cache then."""
        counts = [len(part.positions) for part in parts]
        x = torch.cat([self._token_norm(embedded), self._feature_norm(features)], dim=-1)
        middle = self._heads + self._kv
        qkv = self._qkv(x).view(len(x), middle + self._kv, self._dim)
        angles = self._angles(np.concatenate([part.positions for part in parts]))
        turn(qkv.narrow(1, 0, middle), None, angles)
        attended = [
            self._attend(part, rows) for part, rows in zip(parts, qkv.split(counts), strict=True)
        ]
        x = self._out(attended[0] if len(parts) == 1 else torch.cat(attended), features)
        states = self._down(gated(self._gate_up(self._mlp_norm(x))), x)
        return list(states.split(counts))

    def _embed(self, parts: Sequence[EagleInput]) -> torch.Tensor:
        """Return the embedding of each part's tokens, (tokens, d)."""
        tokens = self._index([part.tokens for part in parts])
        return self._embedding.index_select(0, tokens).to(self._stream)

    def spread(self, logits: torch.Tensor, tokens: Slots) -> torch.Tensor:
        """Return logits (n, vocabulary) of the target's tokens, from those of some; others have
        -inf."""
        found = logits.new_full((len(logits), self.vocabulary), -torch.inf)
        return found.index_copy_(1, self._index([tokens]), logits)

    def _features(self, parts: Sequence[EagleInput]) -> torch.Tensor:
        """Return the feature of each row, (rows, d)."""
        found = []
        for part, rows in zip(parts, self._fused(parts), strict=True):
            if len(rows):
                found.append(rows)
            if len(part.parents):
                plane = part.cache.plane(self._state, 0)[0, 0]
                found.append(plane.index_select(0, self._index([part.parents])).to(self._stream))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _fused(self, parts: Sequence[EagleInput]) -> list[torch.Tensor]:
        """Return the features of each part's rows of text, (m, d)."""
        bits = [part.features for part in parts if len(part.features)]
        if not bits:
            return [torch.empty(0)] * len(parts)
        joined = np.ascontiguousarray(bits[0] if len(bits) == 1 else np.concatenate(bits))
        states = torch.from_numpy(joined.view(np.int16)).view(torch.bfloat16)
        rows = self._fuse(states.to(self.device, self._stream))
        return list(rows.split([len(part.features) for part in parts]))

    def _attend(self, part: EagleInput, qkv: torch.Tensor) -> torch.Tensor:
        """Return (rows, heads * dim), from (rows, heads of queries, of keys, of values, dim)."""
        plane = part.cache.plane((2 * self._kv, self._dim), 0)[0]
        self._write(part, plane.transpose(0, 1), qkv.narrow(1, self._heads, 2 * self._kv))
        seen, queries = plane[:, part.first :], qkv.narrow(1, 0, self._heads)
        mask = np.where(part.visible, np.float32(0), np.float32(-np.inf))
        if self._compiled:
            shape = len(qkv), self._heads, self._kv, self._dim
            kernel = load_attention(self.dtype, self._dim, self._scale)
            attention = Attention(kernel, shape, seen.shape[1], mask)
            return attention(queries, seen[: self._kv], seen[self._kv :])
        output = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None].to(self.dtype),
            seen[None, : self._kv],
            seen[None, self._kv :],
            attn_mask=torch.from_numpy(mask).to(self.device, self.dtype),
            enable_gqa=self._heads != self._kv,
        )
        return output[0].transpose(0, 1).reshape(len(qkv), -1).to(qkv.dtype)

    def _write(self, part: EagleInput, plane: torch.Tensor, rows: torch.Tensor) -> None:
        """Write rows (n, ...) into their slots of `plane` (slots, ...)."""
        text = len(part.features)
        guesses = len(rows) - text
        if text:
            plane[part.begin : part.begin + text] = rows[:text]
        if guesses:
            plane[len(plane) - guesses :] = rows[text:]

    def _index(self, arrays: Sequence[Slots]) -> torch.Tensor:
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return torch.from_numpy(np.ascontiguousarray(joined)).to(self.device)

    def _angles(self, positions: Slots) -> torch.Tensor:
        """Return cosines and sines of each row, (rows, 2, 1, dim)."""
        if (longest := int(positions.max())) >= len(self._rope):
            self._rope = self._rope_table(min(2 * longest, self.context))
        return self._rope.index_select(0, self._index([positions]))

    def _rope_table(self, positions: int) -> torch.Tensor:
        """Return (positions, 2, 1, dim), as LlamaPass does."""
        with torch.inference_mode():
            angles = rotary_angles(torch.arange(positions), self._dim, self._theta)[0]
            cos, sin = angles.cos(), angles.sin()
            table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], dim=1)
            return table[:, :, None].to(self.device, self._stream)


def own_tokens(parts: Sequence[EagleInput]) -> Slots:
    """Return the own tokens of all parts, each once."""
    if len(parts) == 1:
        return parts[0].own
    found: Slots = np.unique(np.concatenate([part.own for part in parts]))
    return found


def guess_times(
    model: EaglePass, widths: Sequence[int], clock: Clock, repeats: int = 20
) -> dict[int, float]:
    """Return median seconds of a pass over so many guesses after a text of TEXT_TOKENS tokens.

    Widths are interleaved, as in `step_times`; the first round is not counted.
    """
    text = min(TEXT_TOKENS, model.context - 1)
    cache, tokens = model.new_cache(), np.zeros(text, dtype=np.int64)
    cache.append(text)
    none = np.zeros(0, dtype=np.int64)
    bits = np.zeros((text, model.width), dtype=np.uint16)
    seen = np.tri(text, dtype=np.bool_)
    model([EagleInput(cache, tokens, np.arange(text), bits, none, 0, 0, seen, none)])
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    for _ in range(repeats + 1):
        for width, found in seconds.items():
            cache.append(width)
            rows, above = np.zeros(width, dtype=np.int64), np.full(width, text - 1)
            seen = np.ones((width, text + width), dtype=np.bool_)
            seen[:, text:] = np.eye(width)
            guesses = EagleInput(
                cache, rows, above + 1, bits[:0], above, text, 0, seen, np.arange(width)
            )
            began = clock()
            float(model([guesses])[0][0, 0])  # waits for the device
            found.append(clock() - began)
            cache.truncate(text)
    return {width: statistics.median(found[1:]) for width, found in seconds.items()}
