"""Installs a faster pass if it computes the same results as the model's own."""

import logging
import os
from collections.abc import Callable

import numpy as np
import torch

from runtime.kernels.cuda_graph import GraphCapture, run_eagerly
from runtime.kernels.kernel_choice import KernelChoice
from runtime.kernels.linear import PackedLinear, has_room, pack
from runtime.kv.arena import Arena
from runtime.models.base import PassInput, causal
from runtime.models.hf import MODEL_ERRORS, ForwardPass, HFModel, row_errors
from runtime.models.layer_subset import float32_sample
from runtime.models.llama import LlamaPass, is_llama
from runtime.models.static_pass import StaticPass

PROBE_LENGTHS = (24, 7)  # tokens of the texts compared
EXACT_TOLERANCE = 1e-4  # relative error of logits in float32
ROUNDED_TOLERANCE = 0.25  # of the median row in 16 bits: rounding alone reaches 0.1 in some models
MAX_SEATS = 8  # texts per static pass, memory permitting
MAX_SEAT_SLOTS = 8192  # per text; the generic pass serves longer ones
FREE_MEMORY_DIVISOR = 8  # seats take at most this fraction of the free memory

log = logging.getLogger(__name__)


def enable_fast_path(model: HFModel) -> None:
    """Install a faster pass that agrees with the model's own.

    It is a StaticPass on a GPU and a LlamaPass on a CPU; other models on a CPU get packed linear
    layers.
    """
    if model.device.type == "cuda":
        enable_static_path(model)
    elif model.device.type == "cpu":
        fast = is_llama(model.module) and install_if_equal(model, llama_pass)
        if not fast and has_room(model.module):
            pack(model.module)


def enable_static_path(model: HFModel) -> bool:
    """Install a StaticPass if the architecture and the free memory allow it and the results agree.

    It is recorded on a GPU and runs eagerly elsewhere. Returns whether it was installed.
    """
    if not is_llama(model.module):
        return False
    like = model.new_cache()
    slots = (
        min(MAX_SEAT_SLOTS, like.capacity) // 8 * 8
    )  # kernels want rows of a mask that begin at multiples of 16 bytes
    seats = seats_for(free_memory(model.device) // FREE_MEMORY_DIVISOR, slots * like.slot_bytes)
    if not seats:
        log.warning(
            "model %s keeps transformers' own pass: no memory for a text of %d tokens",
            model.name,
            slots,
        )
        return False

    def make(model: HFModel) -> StaticPass:
        record = GraphCapture(model.device) if model.device.type == "cuda" else run_eagerly
        arena = Arena(model.new_cache(), seats, slots)
        return StaticPass(model.module, arena, model.generic, record)

    return install_if_equal(model, make)


def seats_for(room: int, seat: int) -> int:
    """Return how many seats of `seat` bytes fit in `room` bytes.

    The result is a power of two, at most MAX_SEATS, or 0.
    """
    count = min(room // seat, MAX_SEATS)
    return 1 << count.bit_length() - 1 if count else 0


def free_memory(device: torch.device) -> int:
    """Return the free memory of the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def kernels_of(model: HFModel) -> list[KernelChoice]:
    """Return the kernels of a pass; none if transformers' code computes all products."""
    if isinstance(model.step, LlamaPass):
        return [product.choice for product in model.step.products()]
    layers = model.module.modules()
    return [layer.product.choice for layer in layers if isinstance(layer, PackedLinear)]


def llama_pass(model: HFModel) -> LlamaPass:
    return LlamaPass(model.module)


def install_if_equal(model: HFModel, make: Callable[[HFModel], ForwardPass]) -> bool:
    """Install the pass that `make` creates if its results are those of the model's own pass.

    A model in 16 bits is compared by a sample in float32 first: rounding would hide a fault.
    """
    try:
        if model.dtype != torch.float32:
            sample = HFModel(float32_sample(model.module), model.name)
            error = install(sample, make).max()
            if not error <= EXACT_TOLERANCE:
                return refuse(model, f"the faster one is off by {error:.2g} in float32")
            del sample
        errors = install(model, make)
    except MODEL_ERRORS as misfit:
        return refuse(model, f"the faster one does not fit it ({misfit})")
    exact = model.dtype == torch.float32
    error = errors.max() if exact else errors.median()
    if not error <= (EXACT_TOLERANCE if exact else ROUNDED_TOLERANCE):
        return refuse(model, f"the faster one is off by {error:.2g}")
    return True


def install(model: HFModel, make: Callable[[HFModel], ForwardPass]) -> torch.Tensor:
    """Install the pass that `make` creates; return the relative error of each row."""
    tokens = np.random.default_rng(0).integers(
        0, model.vocabulary, min(PROBE_LENGTHS[0], model.context)
    )
    expected = probe_logits(model, tokens)
    model.step = make(model)
    return row_errors(probe_logits(model, tokens), expected)


def refuse(model: HFModel, reason: str) -> bool:
    """Restore the model's own pass, and say why."""
    log.warning("model %s keeps transformers' own pass: %s", model.name, reason)
    model.step = model.generic
    return False


def probe_logits(
    model: HFModel, tokens: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> torch.Tensor:
    """Return logits of a text, then of two texts in one pass."""
    alone = model.forward(model.new_cache(), causal(tokens, 0))
    both = [PassInput(model.new_cache(), causal(tokens[:length], 0)) for length in PROBE_LENGTHS]
    return torch.cat([alone, *model.forward_all(both)])
