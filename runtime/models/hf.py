"""Any decoder-only causal language model of transformers, reading trees of guesses in one pass.

The tree is told by a 4-D additive mask and explicit positions. A layer with a sliding window sees what lies less than the
window before the row *in the text*: slots of a tree are not in the order of the text, so its mask is made from positions.
"""

import inspect
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from runtime import limits
from runtime.errors import InvalidRequest, ModelRefused
from runtime.kv.base import KVCache
from runtime.kv.store import TorchCache, layout_of
from runtime.models.base import Rows

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# What transformers' modelling code is known to raise for a model that cannot take our masks, positions or cache.
MISFITS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class HFModel:
    """A Model (runtime.models.base) around `module`, which is used where and in the type it is; see `load.load_model`.

    Raises ModelRefused for a model that keeps more of a text than keys and values of its tokens.
    """

    def __init__(self, module: PreTrainedModel, name: str) -> None:
        check_config(module.config, type(module), name)
        config = module.config.get_text_config(decoder=True)
        self.module, self._name = module.eval(), name
        self._context = context_of(config, name)
        self._windows = windows_of(config)
        self._masks_by_type = len(set(getattr(config, "layer_types", None) or ())) > 1
        accepted = inspect.signature(module.forward).parameters
        if "position_ids" not in accepted:
            raise ModelRefused(f"model {name} ({config.model_type}) cannot be told positions: choose one with rotary or learned positions")
        self._sliced = "logits_to_keep" in accepted
        self._device: torch.device = module.device
        self._dtype: torch.dtype = module.dtype
        self._lowest = torch.finfo(self._dtype).min
        try:
            with torch.inference_mode():
                probe = module(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self._device), use_cache=True)
            self._layout = layout_of(probe.past_key_values.layers)
            self._stored: torch.dtype = probe.past_key_values.layers[0].keys.dtype
        except MISFITS as error:
            raise ModelRefused(f"model {name} cannot be rolled back exactly ({error}): choose one of plain attention layers") from error
        self._vocabulary = int(probe.logits.shape[-1])

    @property
    def name(self) -> str:
        return self._name

    @property
    def vocabulary(self) -> int:
        return self._vocabulary

    @property
    def context(self) -> int:
        return self._context

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def new_cache(self) -> TorchCache:
        """Room for the whole context and a full tree behind it, taken only as it is used."""
        return TorchCache(self._layout, self._context + limits.TREE_NODES, self._stored, self._device)

    def forward(self, cache: KVCache, rows: Rows, last: int | None = None) -> torch.Tensor:
        """As promised by Model: float32 (rows, vocabulary) on the model's device. On an error the cache is as before.

        Raises InvalidRequest for a token outside the vocabulary or a position outside the context.
        """
        if not isinstance(cache, TorchCache):
            raise TypeError(f"a cache of type {type(cache).__name__}: use new_cache()")
        self._check(rows)
        n = len(rows.tokens)
        kept = n if last is None else min(last, n)
        start = cache.append(n)
        cache.positions[start:] = rows.positions
        options = {"logits_to_keep": max(kept, 1)} if self._sliced else {}
        done = False
        try:
            with torch.inference_mode():
                logits: torch.Tensor = self.module(
                    input_ids=self._row(rows.tokens),
                    position_ids=self._row(rows.positions),
                    attention_mask=self._mask(rows, cache.positions),
                    past_key_values=cache,
                    use_cache=True,
                    **options,
                ).logits[0]
                done = True
                return logits[logits.shape[0] - kept :].float()
        finally:
            if not done:
                cache.truncate(start)

    def _check(self, rows: Rows) -> None:
        # On a GPU an index out of range would end the process and not the request.
        if rows.tokens.min() < 0 or rows.tokens.max() >= self._vocabulary:
            raise InvalidRequest(f"a token id outside the vocabulary of {self._vocabulary} of model {self._name}: check the tokenizer")
        if rows.positions.min() < 0 or rows.positions.max() >= self._context:
            raise InvalidRequest(
                f"position {rows.positions.max()} is beyond the context of {self._context} of model {self._name}: shorten it"
            )

    def _row(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)[None]).to(self._device)

    def _mask(self, rows: Rows, positions: npt.NDArray[np.int64]) -> Any:
        """None where all rows see all slots and there is one row; else the additive mask, by layer type where there are several."""
        masks = {kind: self._additive(rows, positions, window) for kind, window in self._windows.items()}
        if self._masks_by_type and any(mask is not None for mask in masks.values()):
            # A layer type that needs no mask gets one all the same: None would have transformers make its own for all.
            n = len(rows.tokens)
            zeros = torch.zeros((1, 1, n, len(positions)), dtype=self._dtype, device=self._device)
            return {kind: zeros if mask is None else mask for kind, mask in masks.items()}
        return next(iter(masks.values()))

    def _additive(self, rows: Rows, positions: npt.NDArray[np.int64], window: int | None) -> torch.Tensor | None:
        """(1, 1, n, slots): 0 where a row looks, the lowest number where it does not; None for one row that sees every slot."""
        n, slots = len(rows.tokens), len(positions)
        first, hidden = rows.prefix, ~rows.visible
        if window is not None and rows.positions.max() - positions.min() >= window:
            far = rows.positions[:, None] - positions[None, :] >= window
            far[:, first:] |= hidden
            first, hidden = 0, far
        if n == 1 and not hidden.any():
            return None
        mask = torch.zeros((1, 1, n, slots), dtype=self._dtype, device=self._device)
        mask[..., first:].masked_fill_(torch.from_numpy(hidden).to(self._device), self._lowest)
        return mask


def check_config(config: PreTrainedConfig, kind: type[PreTrainedModel], name: str) -> None:
    """Raises ModelRefused for what is known, before any weight is read, not to be a decoder of plain attention layers."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise ModelRefused(f"model {name} ({config.model_type}) is an encoder-decoder: choose a decoder-only model")
    others = sorted(set(getattr(text, "layer_types", None) or ()) - KNOWN_LAYERS)
    if kind._is_stateful or others:
        what = f"layers of type {', '.join(others)}" if others else "a recurrent state"
        raise ModelRefused(f"model {name} ({config.model_type}) has {what}, no exact rollback: choose a model of plain attention")
    if getattr(text, "alibi", False):
        raise ModelRefused(
            f"model {name} ({config.model_type}) has ALiBi positions, which no tree can have: choose one with rotary positions"
        )


def context_of(config: PreTrainedConfig, name: str) -> int:
    """The longest text whose keys do not depend on how long the text becomes later.

    With `longrope` the angles of all positions change where the text outgrows the original context: cached keys would no longer be
    those of a fresh prefill, so the original context is the limit.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        raise ModelRefused(f"model {name} ({config.model_type}) names no context length: set max_position_embeddings in its config.json")
    rope = getattr(config, "rope_parameters", None) or {}
    for variant in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if variant.get("rope_type") == "longrope":
            limit = min(limit, variant.get("original_max_position_embeddings") or limit)
    return limit


def windows_of(config: PreTrainedConfig) -> dict[str, int | None]:
    """The window of each type of layer that the model has (None = all of the text); one entry where all layers are alike."""
    window = getattr(config, "sliding_window", None)
    types = sorted(set(getattr(config, "layer_types", None) or ()))
    if not types:
        return {"": window}
    return {kind: window if kind == "sliding_attention" else None for kind in types}
