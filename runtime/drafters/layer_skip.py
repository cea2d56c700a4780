"""Some of the target's own layers as drafter ("Draft & Verify", arXiv 2309.08168; LayerSkip, 2404.16710): nothing is trained.

Which layers is found by `outrider tune layers`. It runs on a device of its own and loads those layers alone, so it has a cache of its own:
unlike there, target and drafter compute at the same time.
"""

from runtime.drafters.base import DrafterContext
from runtime.drafters.model import ModelDrafter


def build(context: DrafterContext) -> ModelDrafter:
    return ModelDrafter(context.load_layers(context.target))
