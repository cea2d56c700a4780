"""A faster pass where the model has one, once it has shown that it computes the same."""

import logging
import os
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from runtime.kernels.cuda_graph import Capture, straight
from runtime.kernels.linear import has_room, pack
from runtime.kv.arena import Arena
from runtime.models.base import Part, causal
from runtime.models.hf import MISFITS, ROUNDING, HFModel, Pass, relative_error
from runtime.models.llama import LlamaPass, fits
from runtime.models.static_pass import StaticPass

LENGTHS = (24, 7)  # of the texts that are compared
SEATS = 8  # texts that a static pass reads at once, where there is memory for them
SEAT_SLOTS = 8192  # of one text: longer ones are read by the generic pass
SHARE = 8  # a static pass takes at most this part of the free memory for its seats

log = logging.getLogger(__name__)


def quicken(model: HFModel) -> None:
    """Gives the model a faster pass that agrees with its own: StaticPass on a GPU, LlamaPass on a CPU, else packed products there."""
    if model.device.type == "cuda":
        steady(model)
    elif model.device.type == "cpu":
        quick = fits(model.module) and agrees(model, partial(LlamaPass, model.module))
        if not quick and has_room(model.module):
            pack(model.module)


def steady(model: HFModel) -> bool:
    """Gives the model a StaticPass where it is built for it, there is memory, and the two agree. Recorded on a GPU, plain elsewhere."""
    if not fits(model.module):
        return False
    like = model.new_cache()
    slots = (
        min(SEAT_SLOTS, like.capacity) // 8 * 8
    )  # kernels want rows of a mask that begin at multiples of 16 bytes
    seats = seats_for(free_memory(model.device) // SHARE, slots * like.slot_bytes)
    if not seats:
        log.warning(
            "model %s keeps transformers' own pass: no memory for a text of %d tokens",
            model.name,
            slots,
        )
        return False

    def make() -> StaticPass:
        record = Capture(model.device) if model.device.type == "cuda" else straight
        return StaticPass(model.module, Arena(like, seats, slots), model.generic, record)

    return agrees(model, make)


def seats_for(room: int, seat: int) -> int:
    """The greatest power of two, at most SEATS, of seats of `seat` bytes that fit into `room` bytes; 0 where not one does."""
    count = min(room // seat, SEATS)
    return 1 << count.bit_length() - 1 if count else 0


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def agrees(model: HFModel, make: Callable[[], Pass]) -> bool:
    """Gives the model the pass that `make` makes; takes it back where it computes something else."""
    tokens = np.random.default_rng(0).integers(0, model.vocabulary, min(LENGTHS[0], model.context))
    expected = read(model, tokens)
    try:
        model.step = make()
        error = relative_error(read(model, tokens), expected)
    except MISFITS as misfit:
        log.warning(
            "model %s keeps transformers' own pass: the faster one does not fit it (%s)",
            model.name,
            misfit,
        )
        model.step = model.generic
        return False
    if not error <= (1e-4 if model.dtype == torch.float32 else ROUNDING[False]):
        log.warning(
            "model %s keeps transformers' own pass: the faster one is off by %.2g",
            model.name,
            error,
        )
        model.step = model.generic
        return False
    return True


def read(model: HFModel, tokens: np.ndarray[tuple[int], np.dtype[np.int64]]) -> torch.Tensor:
    """Logits of a text alone, then of its beginning beside it."""
    alone = model.forward(model.new_cache(), causal(tokens, 0))
    both = [Part(model.new_cache(), causal(tokens[:length], 0)) for length in LENGTHS]
    return torch.cat([alone, *model.forward_all(both)])
