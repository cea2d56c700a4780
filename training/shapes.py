"""What a draft model should look like: as fast as a budget of milliseconds asks, shallow and wide rather than deep and narrow.

"Decoding Speculative Decoding" (arXiv 2402.01528): what a draft costs is its depth, what it guesses right follows its size.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from runtime.core.errors import InvalidRequest
from runtime.models.fast_path import enable_fast_path
from runtime.models.hf import HFModel
from runtime.models.step_timing import step_times

DEPTHS = (
    2,
    3,
    4,
    6,
    8,
)  # one layer alone cannot look up what followed an earlier occurrence, which takes two
WIDTHS = (1, 2, 4, 8)  # rows of a pass that are measured
BUDGET_ROWS = 4  # of the pass that the budget is for: the children of one leaf
HEAD_SIZE = 64  # dimensions of an attention head
HIDDEN_STEP = 64  # hidden sizes are multiples of it
MAX_HIDDEN = 4096


@dataclass(frozen=True, slots=True)
class DraftShape:
    hidden: int
    layers: int

    @property
    def intermediate(self) -> int:
        """Of the gated MLP: eight thirds of the hidden size, in multiples of 64."""
        return max(64, round(self.hidden * 8 / 3 / 64) * 64)

    def parameters(self, vocabulary: int) -> int:
        """Of all matrices; the embedding counts once, it is the unembedding too."""
        return (
            self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)
            + vocabulary * self.hidden
        )

    def config(self, vocabulary: int, context: int, end: int | None) -> LlamaConfig:
        return llama_config(self.hidden, self.layers, self.intermediate, vocabulary, context, end)


def llama_config(
    hidden: int, layers: int, intermediate: int, vocabulary: int, context: int, end: int | None
) -> LlamaConfig:
    """Of heads of HEAD dimensions; embedding and unembedding are one."""
    heads = max(1, hidden // HEAD_SIZE)
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


Times = dict[int, float]  # seconds of a pass by its rows
Measure = Callable[[DraftShape], Times]


def make_measure(vocabulary: int, device: torch.device) -> Measure:
    """t(w) of untrained models: what a pass takes does not depend on what the weights are."""

    def measure(shape: DraftShape) -> Times:
        module = LlamaForCausalLM(shape.config(vocabulary, 128, None)).to(device)
        model = HFModel(module, f"{shape.layers} layers of {shape.hidden}")
        enable_fast_path(model)
        return step_times(model, WIDTHS, time.monotonic)

    return measure


def shapes_of_size(parameters: int, vocabulary: int) -> list[DraftShape]:
    """For each depth the shape whose size is nearest to so many parameters."""
    hidden = range(HIDDEN_STEP, MAX_HIDDEN + 1, HIDDEN_STEP)
    return [
        min(
            (DraftShape(width, depth) for width in hidden),
            key=lambda shape: abs(math.log(shape.parameters(vocabulary) / parameters)),
        )
        for depth in DEPTHS
    ]


def widest_within(budget: float, depth: int, measure: Measure) -> tuple[DraftShape, Times] | None:
    """The widest shape of so many layers whose pass of ROWS rows takes at most `budget` seconds; None where the narrowest takes longer.

    Twice as wide as long as that fits, then halfway between what fits and what does not: no model far beyond the budget is made.
    """
    fitting, good, bad = None, 0, MAX_HIDDEN // HIDDEN_STEP + 1
    while bad - good > 1:
        width = (
            min(max(1, 2 * good), (good + bad) // 2)
            if bad > MAX_HIDDEN // HIDDEN_STEP
            else (good + bad) // 2
        )
        shape = DraftShape(width * HIDDEN_STEP, depth)
        times = measure(shape)
        if times[BUDGET_ROWS] <= budget:
            fitting, good = (shape, times), width
        else:
            bad = width
    return fitting


def propose_shape(
    budget: float, vocabulary: int, measure: Measure
) -> tuple[DraftShape, dict[DraftShape, Times]]:
    """The largest shape within `budget` seconds, and t(w) of the shapes of its size at every depth.

    Of shapes that are about as large (a tenth less), the shallowest. Raises InvalidRequest for a budget that nothing fits into.
    """
    fitting = [
        found for depth in DEPTHS if (found := widest_within(budget, depth, measure)) is not None
    ]
    if not fitting:
        least = measure(DraftShape(HIDDEN_STEP, DEPTHS[0]))[BUDGET_ROWS]
        raise InvalidRequest(
            f"latency {1e3 * budget:g} ms is below what the smallest shape takes here ({1e3 * least:.2f} ms): raise it",
            "latency",
        )
    largest = max(shape.parameters(vocabulary) for shape, _ in fitting)
    chosen = min(
        (shape for shape, _ in fitting if shape.parameters(vocabulary) >= 0.9 * largest),
        key=lambda shape: shape.layers,
    )
    known = dict(fitting)
    curve = {
        shape: known.get(shape) or measure(shape)
        for shape in (chosen, *shapes_of_size(chosen.parameters(vocabulary), vocabulary))
    }
    return chosen, curve
