"""A short pass for Llama-like models: a small model's step otherwise spends most time between
products.

It supports rotary positions, grouped heads, a gated MLP and RMS norms; also biases, norms of
queries and keys, and sliding windows. It computes what transformers' code computes, from the same
parameters. Products with the same input are fused, angles come from a table, and a layer's keys and
values are written at once. On a CPU a list of compiled calls does all that (LlamaCalls), without
Python between them. Pseudo rows (see Branch) follow all other rows, so each matrix is read once for
both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from runtime.kernels.attention import Attention, has_attention, load_attention
from runtime.kernels.linear import LinearOp, has_room
from runtime.kernels.packed_weight import MAX_ROWS
from runtime.models.attention_mask import additive_mask, layer_windows
from runtime.models.base import Branch, OutputSpec, PassInput, PassOutput, Rows
from runtime.models.generic import logit_rows, torch_cache
from runtime.models.hf import max_context
from runtime.models.layer_states import check_layers, split_features
from runtime.models.llama_calls import CachedText, LlamaCalls, can_list
from runtime.models.llama_layers import HeadShape, fused, gated, norm, read_layer, turn

MODEL_TYPES = {"llama", "mistral", "qwen2", "qwen3"}
INITIAL_POSITIONS = 512  # in the first table of angles


@dataclass(frozen=True, slots=True)
class PartView:
    """The rows of one part in a pass, and per-layer views of its cache.

    start, end  its rows among those of all parts
    planes      (2 x layers, heads, slots, dim), keys and values
    slot        of the first row
    masks       by layer type, for torch's attention
    kernels     by layer type; None: torch computes attention
    places      its rows if they are not [start, end): pseudo rows follow the rows of all parts
    """

    start: int
    end: int
    planes: torch.Tensor
    slot: int
    masks: dict[str, torch.Tensor | None]
    kernels: dict[str, Attention] | None = None
    places: torch.Tensor | None = None


class LlamaPass:
    """A ForwardPass that shares the memory of the parameters with `module`.

    On a CPU it computes in float32 between products, where shorter types are slower, and by code
    compiled for the processor; elsewhere, or if not `compiled`, in the module's type by torch.
    """

    def __init__(self, module: PreTrainedModel, compiled: bool = True) -> None:
        pack = has_room(module)
        body: Any = module.model
        first, config = body.layers[0].self_attn, module.config
        self._dim: int = first.head_dim
        self._scale: float = first.scaling
        self._kv: int = config.num_key_value_heads
        self._heads: int = config.num_attention_heads
        self._dtype: torch.dtype = module.dtype
        self._compiled = compiled and module.device.type == "cpu"
        self._stream = torch.float32 if self._compiled else self._dtype
        self._windows = layer_windows(config)
        self._embedding: torch.Tensor = body.embed_tokens.weight.detach()
        kinds = getattr(config, "layer_types", None) or [""] * len(body.layers)
        self._layers = [
            read_layer(layer, kind, self._heads, self._kv, pack, self._compiled)
            for layer, kind in zip(body.layers, kinds, strict=True)
        ]
        shape = HeadShape(self._heads, self._kv, self._dim)
        listed = self._compiled and can_list(self._layers, shape)
        self._calls = LlamaCalls(self._layers, shape) if listed else None
        self._norm = norm(body.norm, self._compiled)
        self._head = fused(module.lm_head, pack=pack)
        self._rotary, self._context = body.rotary_emb, max_context(config, config.model_type)
        self._rope = self._rope_table(min(INITIAL_POSITIONS, self._context))

    def __call__(self, parts: Sequence[PassInput]) -> list[torch.Tensor]:
        views = self._views(parts)
        angles = self._angles(np.concatenate([part.rows.positions for part in parts]))
        x = self._run_layers(range(len(self._layers)), self._embed(parts), angles, views)
        x, kept = last_rows(x, parts)
        return list(self._head(self._norm(x)).float().split(kept))

    def check(self, output_spec: OutputSpec) -> None:
        """Implement ForwardPass (runtime.models.hf)."""
        layers = [branch.layer for branch in output_spec.branches]
        if layers != sorted(layers) or not all(0 <= layer < len(self._layers) for layer in layers):
            raise LookupError(f"pseudo rows that enter at layers {layers} of {len(self._layers)}")
        check_layers(output_spec.features, len(self._layers))

    def show(self, parts: Sequence[PassInput], output_spec: OutputSpec) -> list[PassOutput]:
        """Implement ForwardPass."""
        counts = [len(part.rows.tokens) for part in parts]
        branch_rows = [len(part.branch_rows) if output_spec.branches else 0 for part in parts]
        n, m = sum(counts), sum(branch_rows)
        branches = output_spec.branches if m else ()
        beginnings = [end - count for end, count in zip(row_ends(parts), counts, strict=True)]
        sources = np.array(
            [
                start + row
                for part, start in zip(parts, beginnings, strict=True)
                for row in part.branch_rows
            ],
            dtype=np.int64,
        )
        positions = np.concatenate([part.rows.positions for part in parts])
        angles = self._angles(
            np.concatenate(
                [positions, *(positions[sources] + ahead for ahead in range(1, len(branches) + 1))]
            )
        )
        ridden = torch.from_numpy(sources).to(self._embedding.device)
        views, x, states = self._views(parts), self._embed(parts), list[torch.Tensor]()
        for index, end in pairwise(self._stops(output_spec.features, branches)):
            if index in output_spec.features:
                states.append(x[:n].to(torch.bfloat16, copy=True))
            if entering := [branch for branch in branches if branch.layer == index]:
                sprout = x.index_select(0, ridden)
                sprouts = (branch.map(sprout.to(self._dtype)) for branch in entering)
                x = torch.cat([x, *(sprout.to(x.dtype) for sprout in sprouts)])
                views = self._views_with_branches(parts, (len(x) - n) // m, len(branches))
            entered = angles[: len(x)] if branches else angles
            x = self._run_layers(range(index, end), x, entered, views)
        if len(self._layers) in output_spec.features:
            states.append(x[:n].to(torch.bfloat16))
        features = split_features(output_spec.features, states, counts)
        x, kept = last_rows(x, parts)
        n, hidden = sum(kept), self._norm(x)
        logits = self._head(hidden).float()
        of_rows = (
            hidden[:n].to(self._dtype).split(kept) if output_spec.hidden else [None] * len(parts)
        )
        pseudo = (
            logits[n:].unflatten(0, (len(branches), m)).transpose(0, 1).split(branch_rows)
            if m
            else [None] * len(parts)
        )
        of_pseudo = [
            rows if count else None for rows, count in zip(pseudo, branch_rows, strict=True)
        ]
        return [
            PassOutput(*of_one)
            for of_one in zip(logits[:n].split(kept), of_rows, of_pseudo, features, strict=True)
        ]

    def unembed(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden.to(self._dtype)).float()

    def products(self) -> list[LinearOp]:
        """Return the products of a pass."""
        layers = [(one.qkv, one.out, one.gate_up, one.down) for one in self._layers]
        return [*chain.from_iterable(layers), self._head]

    def _embed(self, parts: Sequence[PassInput]) -> torch.Tensor:
        ids = concat_ids([part.rows.tokens for part in parts]).to(self._embedding.device)
        return self._embedding.index_select(0, ids).to(self._stream)

    def _angles(self, positions: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return cosines and sines of each row, (rows, 2, 1, dim)."""
        if len(self._rope) < self._context and (longest := int(positions.max())) >= len(self._rope):
            self._rope = self._rope_table(min(2 * longest, self._context))
        return self._rope.index_select(0, torch.from_numpy(positions).to(self._rope.device))

    def _stops(self, features: Sequence[int], branches: Sequence[Branch]) -> list[int]:
        """Return the layers between which nothing but layers runs: the first one, ..., the end."""
        layers = len(self._layers)
        return sorted({0, *features, *(branch.layer for branch in branches), layers})

    def _run_layers(
        self, layers: range, x: torch.Tensor, angles: torch.Tensor, views: Sequence[PartView]
    ) -> torch.Tensor:
        """Return the rows after these layers."""
        if self._calls is not None and len(x) <= MAX_ROWS and views[0].places is None:
            texts = [
                CachedText(view.planes, view.slot, view.end - view.start, view.kernels)
                for view in views
                if view.kernels is not None
            ]
            if len(texts) == len(views):
                return self._calls.run(layers, x, angles, texts)
        for index in layers:
            x = self._run_layer(index, x, angles, views)
        return x

    def _run_layer(
        self, index: int, x: torch.Tensor, angles: torch.Tensor, views: Sequence[PartView]
    ) -> torch.Tensor:
        """Return the rows after layer `index`."""
        layer, middle = self._layers[index], self._heads + self._kv
        qkv = layer.qkv(layer.before(x)).view(len(x), middle + self._kv, self._dim)
        turn(qkv.narrow(1, 0, middle), layer.heads, angles)
        x = layer.out(self._attend(index, layer.kind, qkv, views), x)
        return layer.down(gated(layer.gate_up(layer.after(x))), x)

    def _attend(
        self, index: int, kind: str, qkv: torch.Tensor, views: Sequence[PartView]
    ) -> torch.Tensor:
        """Return (rows, heads * dim), from (rows, heads of queries, of keys, of values, dim).

        Calls per text dominate a small model's pass, so most work is done for all texts at once.
        """
        places = (
            torch.cat([view.places for view in views if view.places is not None])
            if views[0].places is not None
            else None
        )
        rows = qkv if places is None else qkv.index_select(0, places)
        queries = rows.narrow(1, 0, self._heads)
        new = rows.narrow(1, self._heads, 2 * self._kv).unflatten(1, (2, self._kv))
        new, outputs, start = new.permute(1, 2, 0, 3), [], 0
        for view in views:
            count = view.end - view.start
            pair = view.planes.narrow(0, 2 * index, 2).narrow(2, 0, view.slot + count)
            pair.narrow(2, view.slot, count).copy_(new.narrow(2, start, count))
            keys, values = pair.unbind(0)
            own = queries.narrow(0, start, count)
            if view.kernels is None:
                outputs.append(self._attend_by_torch(own, keys, values, view.masks[kind]))
            else:
                outputs.append(view.kernels[kind](own, keys, values))
            start += count
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined if places is None else torch.empty_like(joined).index_copy_(0, places, joined)

    def _attend_by_torch(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        output = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None].to(keys.dtype),
            keys[None],
            values[None],
            attn_mask=mask,
            scale=self._scale,
            enable_gqa=self._heads != self._kv,
        )
        return output[0].transpose(0, 1).reshape(len(queries), -1).to(queries.dtype)

    def _views(self, parts: Sequence[PassInput]) -> list[PartView]:
        """Return views of the rows alone, without pseudo rows."""
        return [
            self._view(part, part.rows, end)
            for part, end in zip(parts, row_ends(parts), strict=True)
        ]

    def _views_with_branches(
        self, parts: Sequence[PassInput], entered: int, branches: int
    ) -> list[PartView]:
        """Return views of the rows and of the pseudo rows that have entered."""
        ends, before = row_ends(parts), 0
        n, m = ends[-1], sum(len(part.branch_rows) for part in parts)
        views = []
        for part, end in zip(parts, ends, strict=True):
            rows, own = (
                with_pseudo_rows(part, entered),
                np.arange(before, before + len(part.branch_rows)),
            )
            if len(parts) == 1:
                views.append(self._view(part, rows, len(rows.positions)))
                continue
            places = np.concatenate(
                [
                    np.arange(end - len(part.rows.tokens), end),
                    *(n + branch * m + own for branch in range(entered)),
                ]
            )
            views.append(
                replace(
                    self._view(part, rows, end),
                    places=torch.from_numpy(places).to(self._embedding.device),
                )
            )
            before += len(part.branch_rows)
        return views

    def _view(self, part: PassInput, rows: Rows, end: int) -> PartView:
        cache, count = torch_cache(part), len(rows.positions)
        slots, device = cache.start + count, self._embedding.device
        masks = {
            kind: additive_mask(rows, cache.positions[:slots], window, -np.inf)
            for kind, window in self._windows.items()
        }
        planes = cache.planes()
        kernels = None
        if self._compiled and has_attention(device, planes.dtype, self._dim, self._scale):
            kernel = load_attention(planes.dtype, self._dim, self._scale)
            shape = count, self._heads, self._kv, self._dim
            kernels = {kind: Attention(kernel, shape, slots, mask) for kind, mask in masks.items()}
        return PartView(
            end - count,
            end,
            planes,
            cache.start,
            {}
            if kernels
            else {
                kind: None if mask is None else torch.from_numpy(mask).to(device, self._dtype)
                for kind, mask in masks.items()
            },
            kernels,
        )

    def _rope_table(self, positions: int) -> torch.Tensor:
        """Return (positions, 2, 1, dim): cosines, and sines with a negated first half.

        A rotation is then x cos + roll(x, dim / 2) sin.
        """
        with torch.inference_mode():
            like = torch.empty(0, dtype=self._stream, device=self._embedding.device)
            cos, sin = self._rotary(like, torch.arange(positions, device=like.device)[None])
            sin[..., : self._dim // 2].neg_()
            return torch.stack([cos[0], sin[0]], dim=1)[:, :, None]


def is_llama(module: PreTrainedModel) -> bool:
    """Return whether `module` is built as LlamaPass expects; a comparison must show that they
    agree.
    """
    config = module.config
    if config.model_type not in MODEL_TYPES or config.hidden_act not in ("silu", "swish"):
        return False
    linear = all(
        isinstance(child, nn.Linear)
        for name, child in module.named_modules()
        if name.endswith(("_proj", "lm_head"))
    )
    return linear and len({layer.self_attn.head_dim for layer in module.model.layers}) == 1


def row_ends(parts: Sequence[PassInput]) -> list[int]:
    """Return the end of each part's rows among those of all parts."""
    return list(accumulate(len(part.rows.tokens) for part in parts))


def last_rows(x: torch.Tensor, parts: Sequence[PassInput]) -> tuple[torch.Tensor, list[int]]:
    """Return the rows that get logits, then the pseudo rows, and the logits of each part."""
    ends, kept = row_ends(parts), [logit_rows(part) for part in parts]
    if sum(kept) < ends[-1]:
        last = [x[end - count : end] for end, count in zip(ends, kept, strict=True)]
        x = torch.cat([*last, x[ends[-1] :]])
    return x, kept


def with_pseudo_rows(part: PassInput, branches: int) -> Rows:
    """Return the rows of a part followed by its pseudo rows, branch by branch, which have no
    tokens.
    """
    rows, branch_rows = part.rows, list(part.branch_rows)
    positions = np.concatenate(
        [rows.positions, *(rows.positions[branch_rows] + ahead for ahead in range(1, branches + 1))]
    )
    own = np.kron(np.tri(branches, dtype=np.bool_), np.eye(len(branch_rows), dtype=np.bool_))
    hidden = np.zeros((len(rows.positions), len(own)), dtype=np.bool_)
    visible = np.block(
        [[rows.visible, hidden], [np.tile(rows.visible[branch_rows], (branches, 1)), own]]
    )
    return Rows(rows.tokens, positions, rows.prefix, visible)


def concat_ids(arrays: Sequence[npt.NDArray[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(
        np.ascontiguousarray(arrays[0]) if len(arrays) == 1 else np.concatenate(arrays)
    )
