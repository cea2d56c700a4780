"""A short pass for models built as Llama is, on a CPU: most of a small model's step is otherwise spent between its products.

Rotary positions, grouped heads, a gated MLP and RMS norms; biases, norms of queries and keys, and sliding windows where the model has
them. It computes what transformers' code computes, from the same parameters: products that share their input become one, angles are
looked up, a layer's keys and values are written at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from runtime.models.base import Part
from runtime.models.generic import stored, wanted
from runtime.models.hf import context_of
from runtime.models.linear import Product, has_room
from runtime.models.mask import additive, windows_of

MODEL_TYPES = {"llama", "mistral", "qwen2", "qwen3"}
ANGLES = 512  # positions whose angles are computed at first


class Norm:
    """x * weight / sqrt(mean(x^2) + eps) over the last dimension, computed in float32.

    As x / hypot(|x|, sqrt(d eps)) * (sqrt(d) weight), which takes four calls where F.rms_norm makes ten.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        size = weight.shape[-1]
        self.weight = weight.detach().float() * size**0.5
        self.least = torch.tensor((size * eps) ** 0.5, dtype=torch.float32)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        size = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32).hypot_(self.least)
        scaled: torch.Tensor = (rows / size).mul_(self.weight)
        return scaled.to(rows.dtype)


@dataclass(frozen=True, slots=True)
class Layer:
    before: Norm
    qkv: Product
    heads: Norm | None  # of queries and keys, head by head
    out: Product
    after: Norm
    gate_up: Product
    down: Product
    kind: str  # names the window


@dataclass(frozen=True, slots=True)
class Lane:
    """One part in a pass: its rows, and views of its cache, of which each layer has one."""

    start: int
    end: int
    new: Sequence[torch.Tensor]  # (2, heads, rows, dim): where a layer's new keys and values go
    keys: Sequence[torch.Tensor]  # (1, heads, slots, dim)
    values: Sequence[torch.Tensor]
    masks: dict[str, torch.Tensor | None]


class LlamaPass:
    """Runs parts as Generic does. `module` and this share the memory of their parameters."""

    def __init__(self, module: PreTrainedModel) -> None:
        pack = has_room(module)
        body: Any = module.model
        first, config = body.layers[0].self_attn, module.config
        self._dim: int = first.head_dim
        self._scale: float = first.scaling
        self._kv: int = config.num_key_value_heads
        self._heads: int = config.num_attention_heads
        self._dtype: torch.dtype = module.dtype
        self._windows = windows_of(config)
        self._embedding: torch.Tensor = body.embed_tokens.weight.detach()
        kinds = getattr(config, "layer_types", None) or [""] * len(body.layers)
        self._layers = [self._layer(layer, kind, pack) for layer, kind in zip(body.layers, kinds, strict=True)]
        self._norm = norm(body.norm)
        self._head = fused(module.lm_head, pack=pack)
        self._rotary, self._context = body.rotary_emb, context_of(config, config.model_type)
        self._angles = self._table(min(ANGLES, self._context))

    def __call__(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        tokens, positions = joint([part.rows.tokens for part in parts]), joint([part.rows.positions for part in parts])
        lanes = self._lanes(parts)
        n, middle = len(tokens), self._heads + self._kv
        if len(self._angles) < self._context and (longest := int(positions.max())) >= len(self._angles):
            self._angles = self._table(min(2 * longest, self._context))
        cos, sin = self._angles.index_select(0, positions).unbind(1)
        x = self._embedding.index_select(0, tokens)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(layer.before(x)).view(n, middle + self._kv, self._dim)
            qk = qkv.narrow(1, 0, middle)
            plain = qk if layer.heads is None else layer.heads(qk)
            torch.addcmul(plain * cos, plain.roll(self._dim // 2, -1), sin, out=qk)
            x = layer.out(self._attend(index, layer.kind, qkv, lanes), x)
            gate, up = layer.gate_up(layer.after(x)).chunk(2, -1)
            x = layer.down(F.silu(gate).mul_(up), x)
        kept = [wanted(part) for part in parts]
        if sum(kept) < n:
            x = torch.cat([x[lane.end - count : lane.end] for lane, count in zip(lanes, kept, strict=True)])
        return list(self._head(self._norm(x)).float().split(kept))

    def _attend(self, index: int, kind: str, qkv: torch.Tensor, lanes: Sequence[Lane]) -> torch.Tensor:
        """(rows, heads * dim), from (rows, heads of queries, of keys, of values, dim)."""
        outputs = []
        for lane in lanes:
            rows = lane.end - lane.start
            own = qkv if len(lanes) == 1 else qkv.narrow(0, lane.start, rows)
            queries, new = own.split((self._heads, 2 * self._kv), 1)
            lane.new[index].copy_(new.view(rows, 2, self._kv, self._dim).permute(1, 2, 0, 3))
            output = F.scaled_dot_product_attention(
                queries.transpose(0, 1).unsqueeze(0),
                lane.keys[index],
                lane.values[index],
                attn_mask=lane.masks[kind],
                scale=self._scale,
                enable_gqa=self._heads != self._kv,
            )
            outputs.append(output.transpose(1, 2).reshape(rows, -1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _lanes(self, parts: Sequence[Part]) -> list[Lane]:
        ends = accumulate(len(part.rows.tokens) for part in parts)
        return [self._lane(part, end) for part, end in zip(parts, ends, strict=True)]

    def _lane(self, part: Part, end: int) -> Lane:
        cache, rows = stored(part), part.rows
        masks = {kind: additive(rows, cache.positions, window, -np.inf) for kind, window in self._windows.items()}
        planes = cache.planes()
        in_use = planes.narrow(2, 0, cache.length).unsqueeze(1).unbind(0)
        return Lane(
            end - len(rows.tokens),
            end,
            planes.narrow(2, cache.start, len(rows.tokens)).unflatten(0, (-1, 2)).unbind(0),
            in_use[::2],
            in_use[1::2],
            {kind: None if mask is None else torch.from_numpy(mask).to(self._dtype) for kind, mask in masks.items()},
        )

    def _layer(self, layer: Any, kind: str, pack: bool) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        heads = None
        if hasattr(attention, "q_norm"):
            q, k = (
                half.weight.detach().expand(count, -1) for half, count in ((attention.q_norm, self._heads), (attention.k_norm, self._kv))
            )
            heads = Norm(torch.cat([q, k]), attention.q_norm.variance_epsilon)
        return Layer(
            norm(layer.input_layernorm),
            fused(attention.q_proj, attention.k_proj, attention.v_proj, pack=pack),
            heads,
            fused(attention.o_proj, pack=pack),
            norm(layer.post_attention_layernorm),
            fused(mlp.gate_proj, mlp.up_proj, pack=pack),
            fused(mlp.down_proj, pack=pack),
            kind,
        )

    def _table(self, positions: int) -> torch.Tensor:
        """(positions, 2, 1, dim): cosines, and sines whose first half is negative, so that rotation is x cos + roll(x, dim / 2) sin."""
        with torch.inference_mode():
            cos, sin = self._rotary(self._embedding, torch.arange(positions)[None])
            sin[..., : self._dim // 2].neg_()
            return torch.stack([cos[0], sin[0]], dim=1)[:, :, None]


def fits(module: PreTrainedModel) -> bool:
    """Whether `module` is built as LlamaPass expects; that they agree is shown by comparison."""
    config = module.config
    if config.model_type not in MODEL_TYPES or config.hidden_act not in ("silu", "swish"):
        return False
    linear = all(isinstance(child, nn.Linear) for name, child in module.named_modules() if name.endswith(("_proj", "lm_head")))
    return linear and len({layer.self_attn.head_dim for layer in module.model.layers}) == 1


def joint(arrays: Sequence[npt.NDArray[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(arrays[0]) if len(arrays) == 1 else np.concatenate(arrays))


def norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def fused(*linears: nn.Linear, pack: bool) -> Product:
    """One product for several of the same input. The parameters of `linears` become views of the joint one: no memory is taken twice."""
    if len(linears) == 1:
        return Product(linears[0].weight, linears[0].bias, pack)
    weight = torch.cat([linear.weight.detach() for linear in linears])
    for linear, view in zip(linears, weight.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = view
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return Product(weight, torch.cat(biases) if biases else None, pack)
