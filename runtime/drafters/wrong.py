"""A draft model with every guess spoilt: for measuring what a useless drafter costs."""

from runtime.drafters.base import DrafterContext
from runtime.drafters.model import ModelDrafter
from runtime.drafters.noisy import Noisy


def build(ingredients: DrafterContext) -> Noisy:
    model = ingredients.load(ingredients.draft)
    return Noisy(ModelDrafter(model), model.vocabulary, wrong=1.0)
