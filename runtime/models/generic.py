"""Runs transformers' own code, for any decoder with plain attention; the oracle of the faster
passes.

The tree is expressed by a 4-D additive mask and explicit positions.

Several texts make one pass. Their rows are concatenated, so linear layers, norms and experts run
once for all of them. Only attention runs text by text, each with its own cache and mask, in an
attention function registered with transformers' AttentionInterface. A model that bypasses that
interface gets one pass per text.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from runtime.kv.packed import PackedCache
from runtime.kv.store import TorchCache
from runtime.models.attention_mask import additive_mask, layer_windows
from runtime.models.base import OutputSpec, PassInput, PassOutput
from runtime.models.layer_states import check_layers, decoder_layers, recorded, split_features

ATTENTION_NAME = "outrider"  # of our function in AttentionInterface


class TransformersPass:
    """Runs `module` on parts whose TorchCaches have slots and positions for the rows.

    `can_pack` says whether several parts fit one pass.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        self.module, self.can_pack = module, False
        self._config = module.config.get_text_config(decoder=True)
        self._windows = layer_windows(self._config)
        self._masks_by_type = len(set(getattr(self._config, "layer_types", None) or ())) > 1
        self._sliced = "logits_to_keep" in inspect.signature(module.forward).parameters
        self._device: torch.device = module.device
        self._dtype: torch.dtype = module.dtype
        self._lowest = torch.finfo(self._dtype).min

    def __call__(self, parts: Sequence[PassInput]) -> list[torch.Tensor]:
        """Return the float32 logits of each part, as `Model.forward_all` does.

        Caches are not rolled back on an error.
        """
        if len(parts) > 1 and self.can_pack:
            return self.read_packed(parts)
        return [self.read_one(part) for part in parts]

    def check(self, output_spec: OutputSpec) -> None:
        """Implement ForwardPass (runtime.models.hf)."""
        if output_spec.branches:
            raise LookupError("transformers' own pass takes no pseudo rows")
        if output_spec.hidden and self.module.get_output_embeddings() is None:
            raise LookupError("nothing is known to turn its hidden states into logits")
        if output_spec.features:
            check_layers(output_spec.features, len(decoder_layers(self.module)))

    def show(self, parts: Sequence[PassInput], output_spec: OutputSpec) -> list[PassOutput]:
        """Return the inputs of the unembedding as hidden states. Pseudo rows are not supported."""
        if output_spec.features:
            layers, counts = output_spec.features, [len(part.rows.tokens) for part in parts]
            with recorded(self.module, layers) as states:
                outputs = self.show(parts, replace(output_spec, features=()))
            features = split_features(layers, [torch.cat(pieces) for pieces in states], counts)
            return [
                replace(output, features=shown)
                for output, shown in zip(outputs, features, strict=True)
            ]
        if not output_spec.hidden:
            return [PassOutput(logits) for logits in self(parts)]
        given: list[torch.Tensor] = []
        hook = self.module.get_output_embeddings().register_forward_pre_hook(
            lambda module, inputs: given.append(inputs[0][0])
        )
        try:
            logits = self(parts)
        finally:
            hook.remove()
        hidden = torch.cat(given).split([len(part.rows.tokens) for part in parts])
        return [PassOutput(*of_one) for of_one in zip(logits, hidden, strict=True)]

    def unembed(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.module.get_output_embeddings()(hidden.to(self._dtype))
        return logits.float()

    def read_one(self, part: PassInput) -> torch.Tensor:
        """Read one text in its own pass."""
        rows, cache = part.rows, torch_cache(part)
        mask = self._by_type(
            {kind: self.mask(part, window) for kind, window in self._windows.items()}
        )
        kept = logit_rows(part)
        logits = self._run(rows.tokens, rows.positions, mask, cache, max(kept, 1))
        return logits[logits.shape[0] - kept :].float()

    def read_packed(self, parts: Sequence[PassInput]) -> list[torch.Tensor]:
        """Read all texts in one pass. Raises LookupError if the model bypasses the interface."""
        caches = [torch_cache(part) for part in parts]
        masks: dict[str, torch.Tensor | None] = {}
        for kind, window in self._windows.items():
            pieces = [self.mask(part, window) for part in parts]
            filled = [
                self._zeros(cache.length) if piece is None else piece
                for piece, cache in zip(pieces, caches, strict=True)
            ]
            masks[kind] = torch.cat([piece.view(1, 1, 1, -1) for piece in filled], dim=-1)
        ends = list(accumulate(len(part.rows.tokens) for part in parts))
        kept = [logit_rows(part) for part in parts]
        rows = np.concatenate(
            [np.arange(end - count, end) for end, count in zip(ends, kept, strict=True)]
        )
        index = torch.from_numpy(rows).to(self._device)
        packed = PackedCache(caches, len(caches[0].layers))
        tokens, positions = (
            np.concatenate([getattr(part.rows, name) for part in parts])
            for name in ("tokens", "positions")
        )
        with self._packed_attention(packed):
            logits = self._run(
                tokens, positions, self._by_type(masks), packed, index if len(index) else 1
            )
        if not len(index) or not self._sliced:
            logits = logits[index[: len(logits)]]
        return list(logits.float().split(kept))

    def _run(
        self, tokens: Any, positions: Any, mask: Any, cache: Any, keep: torch.Tensor | int
    ) -> torch.Tensor:
        logits: torch.Tensor = self.module(
            input_ids=self._row(tokens),
            position_ids=self._row(positions),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": keep} if self._sliced else {}),
        ).logits[0]
        return logits

    @contextmanager
    def _packed_attention(self, packed: PackedCache) -> Iterator[None]:
        """Use our attention function inside the block; the module is unmodified otherwise."""
        default = self._config._attn_implementation
        token = CURRENT_PASS.set((packed, default))
        self._config._attn_implementation = ATTENTION_NAME
        try:
            yield
        finally:
            self._config._attn_implementation = default
            CURRENT_PASS.reset(token)

    def _row(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)[None]).to(self._device)

    def _zeros(self, slots: int) -> torch.Tensor:
        return torch.zeros((1, 1, 1, slots), dtype=self._dtype, device=self._device)

    def _by_type(self, masks: dict[str, torch.Tensor | None]) -> Any:
        """Return one mask, or None if nothing is hidden; a mask per layer type if the model has
        several.
        """
        first = next((mask for mask in masks.values() if mask is not None), None)
        if self._masks_by_type and first is not None:
            # Give every layer type a mask: after None, transformers would create its own for all.
            return {
                kind: torch.zeros_like(first) if mask is None else mask
                for kind, mask in masks.items()
            }
        return first

    def mask(self, part: PassInput, window: int | None) -> torch.Tensor | None:
        """Return the mask of one part, (1, 1, n, slots), see runtime.models.attention_mask."""
        mask = additive_mask(part.rows, torch_cache(part).positions, window, self._lowest)
        return (
            None
            if mask is None
            else torch.from_numpy(mask).to(self._device, self._dtype)[None, None]
        )


def torch_cache(part: PassInput) -> TorchCache:
    if not isinstance(part.cache, TorchCache):
        raise TypeError(f"a cache of type {type(part.cache).__name__}: use new_cache()")
    return part.cache


def logit_rows(part: PassInput) -> int:
    """Return the number of rows, counted from the last, that get logits."""
    rows = len(part.rows.tokens)
    return rows if part.last is None else min(part.last, rows)


CURRENT_PASS: ContextVar[tuple[PackedCache, str]] = ContextVar("CURRENT_PASS")


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention text by text, with the function that the model would use for one text.

    query           (1, heads, rows, dim), rows of all texts
    attention_mask  (1, 1, 1, sum of rows x slots), the concatenated masks of the texts
    """
    packed, default = CURRENT_PASS.get()
    function = attention_function(module, default)
    outputs, row, place = [], 0, 0
    for cache, (keys, values) in zip(packed.caches, packed.take_written(), strict=True):
        n, slots = cache.length - cache.start, cache.length
        mask = attention_mask[..., place : place + n * slots].view(1, 1, n, slots)
        outputs.append(
            function(module, query[:, :, row : row + n], keys, values, mask, **options)[0]
        )
        row, place = row + n, place + n * slots
    return torch.cat(outputs, dim=1), None


def attention_function(
    module: torch.nn.Module, name: str
) -> Callable[..., tuple[torch.Tensor, Any]]:
    """Return transformers' attention function of the implementation `name`.

    Raises LookupError for one that does not follow its conventions.
    """
    if name == "eager":
        name = "eager_attention_forward"
        function = getattr(sys.modules[type(module).__module__], name, None)
    else:
        function = ALL_ATTENTION_FUNCTIONS.get(name)
    if function is None:
        raise LookupError(f"no attention function {name} for {type(module).__name__}")
    found: Callable[..., tuple[torch.Tensor, Any]] = function
    return found


AttentionInterface.register(ATTENTION_NAME, packed_attention)
