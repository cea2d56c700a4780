"""A draft model with every guess spoilt: for measuring what a useless drafter costs."""

from runtime.drafters.base import DrafterContext
from runtime.drafters.model import ModelDrafter
from runtime.drafters.noisy import NoisyDrafter


def build(context: DrafterContext) -> NoisyDrafter:
    model = context.load(context.draft)
    return NoisyDrafter(ModelDrafter(model), model.vocabulary, wrong=1.0)
