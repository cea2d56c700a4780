"""The EAGLE-3 draft layer (arXiv 2503.01840; EAGLE: 2401.15077): one decoder layer that goes on
from the target's hidden states.

Row i joins two things: the feature of token i, and the embedding of token i + 1. It guesses token
i + 2, and its state serves as the feature of token i + 1 in the next row. The feature of a token
that the target has read is `fuse` of the target's own states; that of a guessed token is the state
of the draft layer itself. Embedding and unembedding are the target's and not part of this module.

Shapes: d is the target's hidden size, n a number of rows, K the size of the draft vocabulary;
leading dimensions are free. Used by the drafter, by the target (`fuse` alone) and by training.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.core.errors import ModelRefused
from runtime.models.base import ModelIdentity
from runtime.models.head_checkpoint import (
    TRAIN_HINT,
    Settings,
    read_settings,
    read_tensors,
    whole_number,
    write_checkpoint,
)

METHOD = "eagle"
MAX_TAPS, MAX_WIDTH = 16, 1 << 20
DRAFT_TOKENS = "draft_tokens"


@dataclass(frozen=True, slots=True)
class EagleShape:
    """The settings of a checkpoint.

    layers            rising numbers of the target's layers whose inputs are fused; the number of
                      layers itself stands for the output of the last one, before the final norm
    intermediate      size of the gated MLP
    heads, kv_heads, head_dim   of the attention; heads is a multiple of kv_heads
    rope_theta, eps   base of the rotary embedding, and the epsilon of the norms
    draft_vocabulary  K, the number of the target's tokens that can be guessed
    """

    layers: tuple[int, ...]
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float
    draft_vocabulary: int

    def as_settings(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}


class Eagle(nn.Module):
    """The draft layer.

    A pass over rows is `project`, attention by the caller over its own cache, then `finish`; the
    next token's logits are `logits(finish(...), unembedding[draft_tokens])`. `fuse` maps the states
    of the shape's layers, concatenated in their order (..., taps * d), to features (..., d).
    """

    draft_tokens: Tensor  # int64 (K,), the target's id of each guessable token

    def __init__(self, hidden_size: int, shape: EagleShape) -> None:
        super().__init__()
        d, self.shape = hidden_size, shape
        rows, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.fuse = nn.Linear(len(shape.layers) * d, d, bias=False)
        self.token_norm, self.feature_norm = RMSNorm(d, shape.eps), RMSNorm(d, shape.eps)
        self.q = nn.Linear(2 * d, rows, bias=False)
        self.k, self.v = nn.Linear(2 * d, kv, bias=False), nn.Linear(2 * d, kv, bias=False)
        self.o = nn.Linear(rows, d, bias=False)
        self.mlp_norm = RMSNorm(d, shape.eps)
        self.gate = nn.Linear(d, shape.intermediate, bias=False)
        self.up = nn.Linear(d, shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, d, bias=False)
        self.final_norm = RMSNorm(d, shape.eps)
        self.register_buffer(DRAFT_TOKENS, torch.arange(shape.draft_vocabulary))

    def project(
        self, embeddings: Tensor, features: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (..., heads, n, head_dim), and keys and values (..., kv_heads, n,
        head_dim), with rotary positions applied.

        embeddings  (..., n, d) of the tokens, from the target's table
        features    (..., n, d) of the tokens before them
        positions   int64 (n,), or (..., n), of the tokens in the text
        """
        x = torch.cat([self.token_norm(embeddings), self.feature_norm(features)], dim=-1)
        q, k, v = (
            y.unflatten(-1, (-1, self.shape.head_dim)).transpose(-2, -3)
            for y in (self.q(x), self.k(x), self.v(x))
        )
        angles = rotary_angles(positions, self.shape.head_dim, self.shape.rope_theta)
        return rotate(q, angles), rotate(k, angles), v

    def finish(self, features: Tensor, attended: Tensor) -> Tensor:
        """Return states (..., n, d), which are the features of the rows' own tokens.

        features  as given to `project`
        attended  (..., heads, n, head_dim), the attention's output
        """
        x = features + self.o(attended.transpose(-2, -3).flatten(-2))
        y = self.mlp_norm(x)
        states: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return states

    def logits(self, states: Tensor, unembedding: Tensor) -> Tensor:
        """Return logits (..., n, K) of the token after each row's own.

        unembedding  (K, d), the rows `draft_tokens` of the target's unembedding
        """
        return F.linear(self.final_norm(states), unembedding)


Layer = TypeVar("Layer", bound=Eagle)


class RMSNorm(nn.Module):
    """Root mean square norm with a learned scale, as in Llama; computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        return (wide * scale * self.weight.float()).to(x.dtype)


def rotary_angles(positions: Tensor, size: int, theta: float) -> Tensor:
    """Return the angles (..., 1, n, size / 2) of float32 rotary embeddings; the 1 is for heads."""
    steps = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
    frequencies = torch.exp(steps * (-math.log(theta) / size))
    return (positions.float().unsqueeze(-1) * frequencies).unsqueeze(-3)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Return x (..., heads, n, head_dim) rotated, the halves of a head forming the pairs, as in
    Llama."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def layer_shape(folder: Path, settings: Settings, identity: ModelIdentity) -> EagleShape:
    """Check the settings of a checkpoint. Raises ModelRefused."""

    def number(name: str, most: int = MAX_WIDTH) -> int:
        return whole_number(folder, settings, name, 1, most)

    shape = EagleShape(
        tap_layers(folder, settings.get("layers"), identity.layers),
        number("intermediate"),
        number("heads", 1024),
        number("kv_heads", 1024),
        number("head_dim", 1024),
        positive(folder, settings, "rope_theta"),
        positive(folder, settings, "eps"),
        number("draft_vocabulary", identity.vocabulary),
    )
    if shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise ModelRefused(
            f"{folder}/config.json: {shape.heads} heads of {shape.head_dim} do not fit "
            f"{shape.kv_heads} kv_heads: copy it again"
        )
    return shape


def tap_layers(folder: Path, value: object, depth: int) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= MAX_TAPS
        or any(type(layer) is not int or not 0 <= layer <= depth for layer in value)
        or value != sorted(set(value))
    ):
        raise ModelRefused(
            f"{folder}/config.json: layers {str(value)[:32]} are not rising numbers from 0 to "
            f"{depth}: copy it again"
        )
    return tuple(value)


def positive(folder: Path, settings: Settings, name: str) -> float:
    value = settings.get(name)
    if isinstance(value, int | float) and 0 < value < 1e12:
        return float(value)
    raise ModelRefused(
        f"{folder}/config.json: {name} {str(value)[:16]} is not a positive number: copy it again"
    )


def read_eagle(folder: Path, identity: ModelIdentity) -> Eagle:
    """Read a checkpoint that was trained for this target, in its stored type.

    Raises ModelRefused for another method or target, wrong or non-finite tensors, and draft tokens
    that the target does not have.
    """
    shape = layer_shape(folder, read_settings(folder, METHOD, identity), identity)
    with torch.device("meta"):
        module = Eagle(identity.hidden_size, shape)
    return load_weights(folder, module, METHOD, identity)


def load_weights(folder: Path, module: Layer, method: str, identity: ModelIdentity) -> Layer:
    """Give a module on the meta device the tensors of a checkpoint. Raises ModelRefused."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    tensors = read_tensors(folder, shapes, whole=(DRAFT_TOKENS,))
    tokens = tensors[DRAFT_TOKENS]
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < identity.vocabulary or len(
        tokens.unique()
    ) < len(tokens):
        raise ModelRefused(
            f"{folder}/model.safetensors: {DRAFT_TOKENS} are not different token ids below "
            f"{identity.vocabulary}: copy it again, or {TRAIN_HINT} {method}"
        )
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def write_eagle(folder: Path, module: Eagle, identity: ModelIdentity) -> None:
    """Write a checkpoint in bfloat16. Raises OSError."""
    write_checkpoint(folder, METHOD, identity, module.shape.as_settings(), bfloat16_tensors(module))


def bfloat16_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module, those of floating point in bfloat16."""
    return {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in module.state_dict().items()
    }
