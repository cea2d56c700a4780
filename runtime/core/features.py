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
