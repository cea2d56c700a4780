"""Builds additive attention masks from the slots that each row sees."""

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedConfig

from runtime.models.base import Rows


def additive_mask(
    rows: Rows, positions: npt.NDArray[np.int64], window: int | None, hide: float
) -> npt.NDArray[np.float32] | None:
    """Return (n, slots): 0 for visible slots and `hide` for hidden ones; None if one row sees all
    slots.

    `positions` covers all slots of the cache, those of the rows included. With a `window` a row
    sees only slots less than `window` before it *in the text*. Tree slots are not in text order, so
    positions decide.
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
    """Return the window of each layer type, None for full attention; one entry if all layers are
    alike.
    """
    window = getattr(config, "sliding_window", None)
    types = sorted(set(getattr(config, "layer_types", None) or ()))
    if not types:
        return {"": window}
    return {kind: window if kind == "sliding_attention" else None for kind in types}
