"""Wraps a decoder-only causal language model of transformers; one pass reads trees of several
texts.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from runtime.core import limits
from runtime.core.errors import InvalidRequest, ModelRefused
from runtime.kv.base import KVCache
from runtime.kv.store import TorchCache, layout_of
from runtime.models.base import OutputSpec, PassInput, PassOutput, Rows, causal
from runtime.models.generic import TransformersPass, torch_cache

MIN_CONTEXT_TOKENS = 9  # what the check of rollbacks reads
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# transformers' modelling code raises these for models that reject our masks, positions or cache.
MODEL_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)

ROUNDING_TOLERANCE = {
    True: 1e-3,
    False: 5e-2,
}  # relative error of logits that rounding explains, in float32 and in shorter types
PROBE_TOKENS = [1, 2]  # a text; token 0 is often padding, of which the embedding is zero

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class ForwardPass(Protocol):
    """Reads parts whose rows have slots; TransformersPass is the one that fits every model."""

    def __call__(self, parts: Sequence[PassInput]) -> list[torch.Tensor]:
        """Return the logits of each part."""
        ...

    def check(self, output_spec: OutputSpec) -> None:
        """As Open.check. Raises LookupError that says what is missing."""
        ...

    def show(self, parts: Sequence[PassInput], output_spec: OutputSpec) -> list[PassOutput]:
        """Implement HiddenStateModel.forward_outputs.

        The slots of the pseudo rows follow the rows of their part, grouped by branch.
        """
        ...

    def unembed(self, hidden: torch.Tensor) -> torch.Tensor: ...


class HFModel:
    """A Model (runtime.models.base) around `module`, which keeps its device and type.

    Use `runtime.models.loader.load_model` to create one. Raises ModelRefused for a model that
    stores more of a text than keys and values of its tokens.
    """

    def __init__(self, module: PreTrainedModel, name: str) -> None:
        check_config(module.config, type(module), name)
        config = module.config.get_text_config(decoder=True)
        self.module, self._name = module.eval(), name
        self._context = max_context(config, name)
        if "position_ids" not in inspect.signature(module.forward).parameters:
            raise ModelRefused(
                f"model {name} ({config.model_type}) takes no position_ids: "
                "choose one with rotary or learned positions"
            )
        self._device: torch.device = module.device
        self._dtype: torch.dtype = module.dtype
        try:
            with torch.inference_mode():
                probe = module(
                    input_ids=torch.tensor([PROBE_TOKENS], device=self._device), use_cache=True
                )
            self._layout = layout_of(probe.past_key_values.layers)
            self._stored: torch.dtype = probe.past_key_values.layers[0].keys.dtype
        except MODEL_ERRORS as error:
            raise ModelRefused(
                f"model {name} cannot be rolled back exactly ({error}): "
                "choose one with plain attention layers"
            ) from error
        self._vocabulary = int(probe.logits.shape[-1])
        self.generic = TransformersPass(module)
        self.step: ForwardPass = self.generic
        self.generic.can_pack = self._can_pack(probe.logits[0].float())

    def _can_pack(self, expected: torch.Tensor) -> bool:
        """Return whether the module reads two texts in one pass: PROBE_TOKENS and its beginning."""
        parts = [
            PassInput(self.new_cache(), causal(np.array(text), 0))
            for text in (PROBE_TOKENS, PROBE_TOKENS[:1])
        ]
        self.generic.can_pack = True
        try:
            error = relative_error(torch.cat(self.forward_all(parts)), expected[[0, 1, 0]])
        except (InvalidRequest, *MODEL_ERRORS) as misfit:
            log.info("model %s reads several texts one by one: %s", self._name, misfit)
            return False
        if not error <= ROUNDING_TOLERANCE[self._dtype == torch.float32]:
            log.warning(
                "model %s reads several texts one by one: in one pass its logits are off by %.2g",
                self._name,
                error,
            )
            return False
        return True

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

    @property
    def hidden_size(self) -> int:
        size: int = self.module.config.get_text_config(decoder=True).hidden_size
        return size

    @property
    def slot_bytes(self) -> int:
        return self.new_cache().slot_bytes

    def new_cache(self) -> TorchCache:
        """Return a cache for the whole context and a full tree; memory grows with use."""
        return TorchCache(
            self._layout, self._context + limits.TREE_NODES, self._stored, self._device
        )

    def forward(self, cache: KVCache, rows: Rows, last: int | None = None) -> torch.Tensor:
        """Implement Model: float32 (rows, vocabulary) on the model's device.

        On an error the cache is unchanged. Raises InvalidRequest for a token outside the vocabulary
        or a position outside the context.
        """
        return self.forward_all([PassInput(cache, rows, last)])[0]

    def forward_all(self, parts: Sequence[PassInput]) -> list[torch.Tensor]:
        """Implement Model; raises as `forward` does. A text may be in one part only."""
        return self._read(parts, 0, self.step)

    def check(self, output_spec: OutputSpec) -> None:
        """Implement HiddenStateModel."""
        try:
            self.step.check(output_spec)
        except LookupError as error:
            raise ModelRefused(
                f"model {self._name} lacks outputs that this method needs ({error}): "
                "choose another method"
            ) from error

    def forward_outputs(
        self, parts: Sequence[PassInput], output_spec: OutputSpec
    ) -> list[PassOutput]:
        """Implement HiddenStateModel; raises as `forward` does."""
        return self._read(
            parts, len(output_spec.branches), lambda parts: self.step.show(parts, output_spec)
        )

    def embeddings(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Implement HiddenStateModel."""
        given, taken = self.module.get_input_embeddings(), self.module.get_output_embeddings()
        if taken is None:
            raise ModelRefused(
                f"model {self._name} has no unembedding of its own: choose another method"
            )
        return given.weight.detach(), taken.weight.detach()

    def unembed(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.step.unembed(hidden)

    def _read(
        self,
        parts: Sequence[PassInput],
        branches: int,
        read: Callable[[Sequence[PassInput]], list[Result]],
    ) -> list[Result]:
        """Call `read` with slots for the rows and for `branches` pseudo rows per branch row.

        The slots of the pseudo rows are freed afterwards.
        """
        caches = [torch_cache(part) for part in parts]
        positions = [positions_of(part, branches) for part in parts]
        for part, places in zip(parts, positions, strict=True):
            self._check(part.rows.tokens, places)
        if not parts:
            return []
        kept = [cache.length for cache in caches]
        try:
            for cache, places in zip(caches, positions, strict=True):
                start = cache.append(len(places))
                cache.positions[start:] = places
            with torch.inference_mode():
                found = read(parts)
            kept = [
                length + len(part.rows.tokens) for length, part in zip(kept, parts, strict=True)
            ]
            return found
        finally:
            for cache, length in zip(caches, kept, strict=True):
                if cache.length != length:
                    cache.truncate(length)

    def _check(self, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> None:
        # On a GPU an index out of range would end the process, not just the request.
        if tokens.min() < 0 or tokens.max() >= self._vocabulary:
            raise InvalidRequest(
                f"a token id outside the vocabulary of {self._vocabulary} of model {self._name}: "
                "check the tokenizer"
            )
        if positions.min() < 0 or positions.max() >= self._context:
            raise InvalidRequest(
                f"position {positions.max()} is beyond the context of {self._context} "
                f"of model {self._name}: shorten the text"
            )


def positions_of(part: PassInput, branches: int) -> npt.NDArray[np.int64]:
    """Return positions of the rows, then of the pseudo rows, branch by branch."""
    if not part.branch_rows:
        return part.rows.positions
    ridden = part.rows.positions[list(part.branch_rows)]
    return np.concatenate(
        [part.rows.positions, *(ridden + ahead for ahead in range(1, branches + 1))]
    )


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the worst of `row_errors`."""
    return float(row_errors(logits, expected).max())


def row_errors(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return each row's root mean square error, relative to the spread of `expected`."""
    centred = expected - expected.mean(dim=1, keepdim=True)
    errors = (logits - expected).square().mean(dim=1)
    return (errors / centred.square().mean(dim=1).clamp_min(1e-12)).sqrt()


def check_config(config: PreTrainedConfig, kind: type[PreTrainedModel], name: str) -> None:
    """Raise ModelRefused if the configuration rules out a decoder with plain attention layers.

    The check needs no weights.
    """
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise ModelRefused(
            f"model {name} ({config.model_type}) is an encoder-decoder: choose a decoder-only model"
        )
    others = sorted(set(getattr(text, "layer_types", None) or ()) - KNOWN_LAYERS)
    if kind._is_stateful or others:
        what = f"layers of type {', '.join(others)}" if others else "a recurrent state"
        raise ModelRefused(
            f"model {name} ({config.model_type}) has {what}, no exact rollback: "
            "choose a model of plain attention"
        )
    if getattr(text, "alibi", False):
        raise ModelRefused(
            f"model {name} ({config.model_type}) has ALiBi positions, which do not support trees: "
            "choose one with rotary positions"
        )


def max_context(config: PreTrainedConfig, name: str) -> int:
    """Return the maximum text length at which keys do not depend on the later length of the text.

    Raises ModelRefused if there is none, or one below MIN_CONTEXT_TOKENS.

    With `longrope` the angles of all positions change when the text outgrows the original context.
    Cached keys would then differ from those of a fresh prefill, so the original context is the
    limit. The angles of `yarn` are fixed and made for the original context times the factor, which
    is the limit, as in vLLM, also if max_position_embeddings is the original.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        raise ModelRefused(
            f"model {name} ({config.model_type}) has no context length: "
            "set max_position_embeddings in its config.json"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for variant in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        original = variant.get("original_max_position_embeddings") or limit
        match variant:
            case {"rope_type": "longrope"}:
                limit = min(limit, original)
            case {"rope_type": "yarn", "factor": float() | int() as factor} if factor >= 1:
                limit = int(original * factor)
    if limit < MIN_CONTEXT_TOKENS:
        raise ModelRefused(
            f"model {name} has a context of {limit} tokens: "
            f"choose one with at least {MIN_CONTEXT_TOKENS}"
        )
    return limit
