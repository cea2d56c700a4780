"""The norms and products of a Llama-like model's layers, from the parameters of its module."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from runtime.kernels.linear import LinearOp
from runtime.kernels.rowwise import has_kernel, rms_norm, rotate, silu_gate


class RMSNorm:
    """Computes x * weight / sqrt(mean(x^2) + eps) over the last dimension in float32.

    By torch it evaluates x / hypot(|x|, sqrt(d eps)) * (sqrt(d) weight), which takes four calls;
    F.rms_norm makes ten. Without `compiled` it always does.
    """

    def __init__(self, weight: torch.Tensor, eps: float, compiled: bool = True) -> None:
        size, self.compiled = weight.shape[-1], compiled
        self.weight, self.eps = weight.detach().float().contiguous(), eps
        self._scaled = self.weight * size**0.5
        self._least = torch.tensor((size * eps) ** 0.5, dtype=torch.float32)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if self.compiled and has_kernel(rows, rows.shape[-1]):
            return rms_norm(rows, self.weight, self.eps)
        size = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32).hypot_(
            self._least
        )
        scaled: torch.Tensor = (rows / size).mul_(self._scaled)
        return scaled.to(rows.dtype)


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Heads of queries, heads of keys, and numbers of a head."""

    heads: int
    kv_heads: int
    dim: int


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    before: RMSNorm
    qkv: LinearOp
    heads: RMSNorm | None  # of queries and keys, head by head
    out: LinearOp
    after: RMSNorm
    gate_up: LinearOp
    down: LinearOp
    kind: str  # names the window


def read_layer(
    layer: Any, kind: str, heads: int, kv_heads: int, pack: bool, compiled: bool
) -> LlamaLayer:
    """Return the norms and products of a layer of transformers' module."""
    attention, mlp = layer.self_attn, layer.mlp
    of_heads = None
    if hasattr(attention, "q_norm"):
        q, k = (
            half.weight.detach().expand(count, -1)
            for half, count in ((attention.q_norm, heads), (attention.k_norm, kv_heads))
        )
        of_heads = RMSNorm(torch.cat([q, k]), attention.q_norm.variance_epsilon, compiled)
    return LlamaLayer(
        norm(layer.input_layernorm, compiled),
        fused(attention.q_proj, attention.k_proj, attention.v_proj, pack=pack),
        of_heads,
        fused(attention.o_proj, pack=pack),
        norm(layer.post_attention_layernorm, compiled),
        fused(mlp.gate_proj, mlp.up_proj, pack=pack),
        fused(mlp.down_proj, pack=pack),
        kind,
    )


def gated(rows: torch.Tensor) -> torch.Tensor:
    """Return silu(first half) * second half of each row: (n, 2 size) -> (n, size)."""
    if has_kernel(rows, rows.shape[1] // 2):
        return silu_gate(rows)
    gate, up = rows.chunk(2, -1)
    return F.silu(gate).mul_(up)


def turn(heads: torch.Tensor, norms: RMSNorm | None, angles: torch.Tensor) -> None:
    """Normalise and rotate heads (n, heads, dim) in place: x cos + roll(x, dim / 2) sin.

    angles  (n, 2, 1, dim): cosines, and sines with a negated first half
    """
    plain = heads if norms is None else norms(heads)
    if not has_kernel(heads, heads.shape[-1]):
        cos, sin = angles.unbind(1)
        torch.addcmul(plain * cos, plain.roll(heads.shape[-1] // 2, -1), sin, out=heads)
        return
    if norms is not None:
        heads.copy_(plain)
    rotate(heads, angles)


def norm(module: Any, compiled: bool) -> RMSNorm:
    return RMSNorm(module.weight, module.variance_epsilon, compiled)


def fused(*linears: nn.Linear, pack: bool) -> LinearOp:
    """Fuse linear layers with the same input; their parameters become views of the fused ones."""
    if len(linears) == 1:
        return LinearOp(linears[0].weight, linears[0].bias, pack)
    weight = torch.cat([linear.weight.detach() for linear in linears])
    for linear, view in zip(
        linears, weight.split([linear.out_features for linear in linears]), strict=True
    ):
        linear.weight.data = view
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return LinearOp(weight, torch.cat(biases) if biases else None, pack)
