"""Drafts with the draft model and corrupts every guess, to measure what a useless drafter costs."""

from runtime.drafters import model
from runtime.drafters.base import DrafterContext
from runtime.drafters.noisy import NoisyDrafter


def build(context: DrafterContext) -> NoisyDrafter:
    inner = model.build(context)
    return NoisyDrafter(inner, inner.vocabulary, wrong=1.0)
