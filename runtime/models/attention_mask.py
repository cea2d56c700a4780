"""Which slots a row sees, as numbers to add to attention scores."""

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedConfig

from runtime.models.base import Rows


def additive_mask(
    rows: Rows, positions: npt.NDArray[np.int64], window: int | None, hide: float
) -> npt.NDArray[np.float32] | None:
    """(n, slots): 0 where a row looks, `hide` where it does not; None for one row that sees every slot.

    `positions` are of all slots of the cache, the rows' own included. With a `window`, a row sees what lies less than that before it
    *in the text*: slots of a tree are not in the order of the text, so positions decide.
    """
    first, hidden = rows.prefix, ~rows.visible
    if window is not None and rows.positions.max() - positions.min() >= window:
        far = rows.positions[:, None] - positions[None, :] >= window
        far[:, first:] |= hidden
        first, hidden = 0, far
    if len(hidden) == 1 and not hidden.any():
        return None
    mask = np.zeros((len(hidden), len(positions)), dtype=np.float32)
    mask[:, first:][hidden] = hide
    return mask


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """The window of each type of layer that the model has (None = all of the text); one entry where all layers are alike."""
    window = getattr(config, "sliding_window", None)
    types = sorted(set(getattr(config, "layer_types", None) or ()))
    if not types:
        return {"": window}
    return {kind: window if kind == "sliding_attention" else None for kind in types}
