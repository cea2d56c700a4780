"""Features: hidden states of the target that a drafter may ask for (EAGLE, arXiv 2401.15077).

They travel and are kept as the bits of bfloat16 numbers. `rows.view(np.int16)` shares its memory
with a torch tensor, and `.view(torch.bfloat16)` of that reads the numbers.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.core import limits
from runtime.core.errors import InvalidRequest

FeatureBits = npt.NDArray[np.uint16]
EXPONENT_BITS = np.uint16(0x7F80)  # all set in infinities and NaN


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """The hidden states that a drafter asks for, concatenated in this order.

    layers  rising; k is the input of decoder layer k (0: the embeddings); the number of layers L
            means the output of the last layer, before the final norm

    Raises InvalidRequest for layers that no model has, or for too many.
    """

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= limits.FEATURE_LAYERS:
            raise InvalidRequest(
                f"features of {len(self.layers)} layers: ask for 1 to {limits.FEATURE_LAYERS}",
                "features",
            )
        if self.layers[0] < 0 or list(self.layers) != sorted(set(self.layers)):
            raise InvalidRequest(
                f"feature layers {list(self.layers)}: give rising numbers from 0", "features"
            )


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Features of consecutive tokens of a text.

    start  position in the text of the first row
    rows   bfloat16 bits (n, width); width = number of layers x hidden size
    """

    start: int
    rows: FeatureBits

    @property
    def end(self) -> int:
        """Return the position after the last row."""
        return self.start + len(self.rows)


def all_finite(rows: FeatureBits) -> bool:
    """Return False if any number is infinite or NaN."""
    return not bool((rows & EXPONENT_BITS == EXPONENT_BITS).any())


@dataclass(frozen=True, slots=True)
class LayerFeatures:
    """Hidden states of several layers, side by side.

    layers  rising
    rows    bfloat16 bits (n, number of layers x hidden size)
    """

    layers: tuple[int, ...]
    rows: FeatureBits

    def of(self, layers: tuple[int, ...]) -> FeatureBits | None:
        """Return the columns of these layers; None if one of them is missing."""
        if layers == self.layers:
            return self.rows
        if not set(layers) <= set(self.layers):
            return None
        by_layer = self.rows.reshape(len(self.rows), len(self.layers), -1)
        places = [self.layers.index(layer) for layer in layers]
        return by_layer[:, places].reshape(len(self.rows), -1)


class FeatureBuffer:
    """The features of one text, of consecutive tokens from `start` on; rows are only appended.

    Committed tokens never change, so nothing is ever rolled back.
    """

    def __init__(self, layers: tuple[int, ...], start: int = 0) -> None:
        self.layers, self.start, self.end = layers, start, start
        self._rows: FeatureBits = np.empty((0, 0), np.uint16)

    @property
    def width(self) -> int:
        """Return the numbers per row; 0 before the first row."""
        width: int = self._rows.shape[1]
        return width

    def append(self, rows: FeatureRows) -> bool:
        """Append rows; those that are known already are skipped.

        Returns False, and changes nothing, if rows are missing in between or the width differs.
        """
        if self.start == self.end:
            self.start = self.end = rows.start
        if rows.start > self.end or self.width not in (0, rows.rows.shape[1]):
            return False
        new = rows.rows[self.end - rows.start :]
        used, needed = self.end - self.start, self.end - self.start + len(new)
        if needed > len(self._rows):
            grown = np.empty((max(needed, 2 * len(self._rows)), rows.rows.shape[1]), np.uint16)
            if used:
                grown[:used] = self._rows[:used]
            self._rows = grown
        self._rows[used:needed] = new
        self.end += len(new)
        return True

    def between(self, start: int, end: int) -> FeatureRows:
        """Return the rows of positions [start, end), as far as they are known, without a copy."""
        start = max(start, self.start)
        end = max(start, min(end, self.end))
        return FeatureRows(start, self._rows[start - self.start : end - self.start])

    def fork(self, length: int) -> "FeatureBuffer":
        """Return a copy without the positions from `length` on, and without spare memory."""
        other = FeatureBuffer(self.layers)
        other.append(self.between(0, length))
        return other
