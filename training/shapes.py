"""The shape of a draft model: within a latency budget, shallow and wide rather than deep and
narrow.

"Decoding Speculative Decoding" (arXiv 2402.01528) finds that a draft's latency follows its depth,
and its acceptance its size.
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
    # at least two: an induction head, which copies what followed an earlier occurrence, needs two
    # layers
)
WIDTHS = (1, 2, 4, 8)  # measured rows of a pass
BUDGET_ROWS = 4  # rows of the budgeted pass: the children of one leaf
HEAD_SIZE = 64  # dimensions of an attention head
HIDDEN_STEP = 64  # hidden sizes are multiples of it
MAX_HIDDEN = 4096


@dataclass(frozen=True, slots=True)
class DraftShape:
    hidden: int
    layers: int

    @property
    def intermediate(self) -> int:
        """The size of the gated MLP: eight thirds of the hidden size, in multiples of 64."""
        return max(64, round(self.hidden * 8 / 3 / 64) * 64)

    def parameters(self, vocabulary: int) -> int:
        """Return the size of all matrices; the tied embedding counts once."""
        return (
            self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)
            + vocabulary * self.hidden
        )

    def config(self, vocabulary: int, context: int, end: int | None) -> LlamaConfig:
        return llama_config(self.hidden, self.layers, self.intermediate, vocabulary, context, end)


def llama_config(
    hidden: int, layers: int, intermediate: int, vocabulary: int, context: int, end: int | None
) -> LlamaConfig:
    """Return a config with heads of HEAD_SIZE dimensions and tied embeddings."""
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
    """Return a function that measures t(w) of untrained models; the weights do not affect the
    time."""

    def measure(shape: DraftShape) -> Times:
        module = LlamaForCausalLM(shape.config(vocabulary, 128, None)).to(device)
        model = HFModel(module, f"{shape.layers} layers of {shape.hidden}")
        enable_fast_path(model)
        return step_times(model, WIDTHS, time.monotonic)

    return measure


def shapes_of_size(parameters: int, vocabulary: int) -> list[DraftShape]:
    """Return, for each depth, the shape whose size is closest to `parameters`."""
    hidden = range(HIDDEN_STEP, MAX_HIDDEN + 1, HIDDEN_STEP)
    return [
        min(
            (DraftShape(width, depth) for width in hidden),
            key=lambda shape: abs(math.log(shape.parameters(vocabulary) / parameters)),
        )
        for depth in DEPTHS
    ]


def widest_within(budget: float, depth: int, measure: Measure) -> tuple[DraftShape, Times] | None:
    """Return the widest shape of this depth whose pass of BUDGET_ROWS rows fits `budget` seconds.

    Return None if even the narrowest is too slow. The search doubles the width while it fits and
    then bisects, so no model far beyond the budget is built.
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
    """Return the largest shape within `budget` seconds, and t(w) of shapes of its size at every
    depth.

    Among shapes of about the same size (up to a tenth smaller) it chooses the shallowest. Raises
    InvalidRequest if nothing fits the budget.
    """
    fitting = [
        found for depth in DEPTHS if (found := widest_within(budget, depth, measure)) is not None
    ]
    if not fitting:
        least = measure(DraftShape(HIDDEN_STEP, DEPTHS[0]))[BUDGET_ROWS]
        raise InvalidRequest(
            f"latency {1e3 * budget:g} ms is less than the smallest shape takes here "
            f"({1e3 * least:.2f} ms): raise it",
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
