"""Builds inputs for the samplers."""

from collections.abc import Callable

import numpy as np
import torch

from runtime.core.sampler_reference import SamplingInput
from runtime.core.sampling_params import SamplingParams

EOS = frozenset({0, 3})
build: Callable[..., SamplingParams] = SamplingParams


def ask(
    sampling: SamplingParams,
    paths: list[list[int]],
    text: tuple[int, ...] = (1, 2),
    prompt: int = 1,
) -> SamplingInput:
    return SamplingInput(sampling, prompt, text, paths, EOS)


def some_logits(rows: int, vocabulary: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(rows).standard_normal((rows, vocabulary)).astype(np.float32) * 2
    )
