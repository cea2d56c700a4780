"""The norms and products of a Llama-like model's layers, from the parameters of its module."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from runtime.kernels.linear import LinearOp


class RMSNorm:
    """Computes x * weight / sqrt(mean(x^2) + eps) over the last dimension in float32.

    It evaluates x / hypot(|x|, sqrt(d eps)) * (sqrt(d) weight), which takes four calls; F.rms_norm
    makes ten.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        size = weight.shape[-1]
        self.weight = weight.detach().float() * size**0.5
        self.least = torch.tensor((size * eps) ** 0.5, dtype=torch.float32)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        size = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32).hypot_(
            self.least
        )
        scaled: torch.Tensor = (rows / size).mul_(self.weight)
        return scaled.to(rows.dtype)


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


def read_layer(layer: Any, kind: str, heads: int, kv_heads: int, pack: bool) -> LlamaLayer:
    """Return the norms and products of a layer of transformers' module."""
    attention, mlp = layer.self_attn, layer.mlp
    of_heads = None
    if hasattr(attention, "q_norm"):
        q, k = (
            half.weight.detach().expand(count, -1)
            for half, count in ((attention.q_norm, heads), (attention.k_norm, kv_heads))
        )
        of_heads = RMSNorm(torch.cat([q, k]), attention.q_norm.variance_epsilon)
    return LlamaLayer(
        norm(layer.input_layernorm),
        fused(attention.q_proj, attention.k_proj, attention.v_proj, pack=pack),
        of_heads,
        fused(attention.o_proj, pack=pack),
        norm(layer.post_attention_layernorm),
        fused(mlp.gate_proj, mlp.up_proj, pack=pack),
        fused(mlp.down_proj, pack=pack),
        kind,
    )


def norm(module: Any) -> RMSNorm:
    return RMSNorm(module.weight, module.variance_epsilon)


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
