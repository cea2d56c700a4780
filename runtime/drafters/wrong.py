"""Drafts with the draft model and corrupts every guess, to measure what a useless drafter costs."""

from runtime.drafters.base import DrafterContext
from runtime.drafters.model import ModelDrafter
from runtime.drafters.noisy import NoisyDrafter


def build(context: DrafterContext) -> NoisyDrafter:
    model = context.load(context.draft)
    return NoisyDrafter(ModelDrafter(model), model.vocabulary, wrong=1.0)
