"""A faster pass where the model has one, once it has shown that it computes the same."""

import logging

import numpy as np
import torch

from runtime.models.base import causal
from runtime.models.hf import MISFITS, ROUNDING, HFModel, relative_error
from runtime.models.linear import has_room, pack
from runtime.models.llama import LlamaPass, fits

LENGTH = 24  # of the text that is compared

log = logging.getLogger(__name__)


def quicken(model: HFModel) -> None:
    """On a CPU: LlamaPass where the model is built so and it agrees with the model's own pass, else packed products in that."""
    if model.device.type != "cpu":
        return
    if not (fits(model.module) and agrees(model)) and has_room(model.module):
        pack(model.module)


def agrees(model: HFModel) -> bool:
    """Gives the model a LlamaPass; takes it back where it computes something else."""
    text = causal(np.random.default_rng(0).integers(0, model.vocabulary, min(LENGTH, model.context)), 0)
    expected = model.forward(model.new_cache(), text)
    try:
        model.step = LlamaPass(model.module)
        error = relative_error(model.forward(model.new_cache(), text), expected)
    except MISFITS as misfit:
        log.warning("model %s keeps transformers' own pass: the faster one does not fit it (%s)", model.name, misfit)
        model.step = model.generic
        return False
    if not error <= (1e-4 if model.dtype == torch.float32 else ROUNDING[False]):
        log.warning("model %s keeps transformers' own pass: the faster one is off by %.2g", model.name, error)
        model.step = model.generic
        return False
    return True
