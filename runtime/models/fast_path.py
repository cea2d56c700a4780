"""A faster pass where the model has one, once it has shown that it computes the same."""

import logging
import os
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from runtime.kernels.cuda_graph import GraphCapture, run_eagerly
from runtime.kernels.linear import has_room, pack
from runtime.kv.arena import Arena
from runtime.models.base import PassInput, causal
from runtime.models.hf import MODEL_ERRORS, ROUNDING_TOLERANCE, ForwardPass, HFModel, relative_error
from runtime.models.llama import LlamaPass, is_llama
from runtime.models.static_pass import StaticPass

PROBE_LENGTHS = (24, 7)  # of the texts that are compared
MAX_SEATS = 8  # texts that a static pass reads at once, where there is memory for them
MAX_SEAT_SLOTS = 8192  # of one text: longer ones are read by the generic pass
FREE_MEMORY_DIVISOR = 8  # a static pass takes at most this part of the free memory for its seats

log = logging.getLogger(__name__)


def enable_fast_path(model: HFModel) -> None:
    """Gives the model a faster pass that agrees with its own: StaticPass on a GPU, LlamaPass on a CPU, else packed products there."""
    if model.device.type == "cuda":
        enable_static_path(model)
    elif model.device.type == "cpu":
        fast = is_llama(model.module) and install_if_equal(model, partial(LlamaPass, model.module))
        if not fast and has_room(model.module):
            pack(model.module)


def enable_static_path(model: HFModel) -> bool:
    """Gives the model a StaticPass where it is built for it, there is memory, and the two agree. Recorded on a GPU, plain elsewhere."""
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

    def make() -> StaticPass:
        record = GraphCapture(model.device) if model.device.type == "cuda" else run_eagerly
        return StaticPass(model.module, Arena(like, seats, slots), model.generic, record)

    return install_if_equal(model, make)


def seats_for(room: int, seat: int) -> int:
    """The greatest power of two, at most MAX_SEATS, of seats of `seat` bytes that fit into `room` bytes; 0 where not one does."""
    count = min(room // seat, MAX_SEATS)
    return 1 << count.bit_length() - 1 if count else 0


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def install_if_equal(model: HFModel, make: Callable[[], ForwardPass]) -> bool:
    """Gives the model the pass that `make` makes; takes it back where it computes something else."""
    tokens = np.random.default_rng(0).integers(
        0, model.vocabulary, min(PROBE_LENGTHS[0], model.context)
    )
    expected = probe_logits(model, tokens)
    try:
        model.step = make()
        error = relative_error(probe_logits(model, tokens), expected)
    except MODEL_ERRORS as misfit:
        log.warning(
            "model %s keeps transformers' own pass: the faster one does not fit it (%s)",
            model.name,
            misfit,
        )
        model.step = model.generic
        return False
    if not error <= (1e-4 if model.dtype == torch.float32 else ROUNDING_TOLERANCE[False]):
        log.warning(
            "model %s keeps transformers' own pass: the faster one is off by %.2g",
            model.name,
            error,
        )
        model.step = model.generic
        return False
    return True


def probe_logits(
    model: HFModel, tokens: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> torch.Tensor:
    """Logits of a text alone, then of its beginning beside it."""
    alone = model.forward(model.new_cache(), causal(tokens, 0))
    both = [PassInput(model.new_cache(), causal(tokens[:length], 0)) for length in PROBE_LENGTHS]
    return torch.cat([alone, *model.forward_all(both)])
