"""Drafts with some of the target's own layers, without training.

See "Draft & Verify" (arXiv 2309.08168) and LayerSkip (arXiv 2404.16710). `outrider tune layers`
finds the layers. The drafter loads only those layers, on its own device and with its own cache, so
unlike in the papers target and drafter compute at the same time.
"""

from runtime.drafters.base import DrafterContext
from runtime.drafters.model import ModelDrafter


def build(context: DrafterContext) -> ModelDrafter:
    return ModelDrafter(context.load_layers(context.target))
