"""What a drafter may ask for, and the bits that travel."""

import numpy as np
import pytest

from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.features import FeatureRows, FeatureSpec, all_finite


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ((), "features of 0 layers"),
        (tuple(range(limits.FEATURE_LAYERS + 1)), f"ask for 1 to {limits.FEATURE_LAYERS}"),
        ((-1, 2), "[-1, 2]: give rising numbers from 0"),
        ((2, 2), "rising"),
        ((3, 1), "rising"),
    ],
)
def test_what_no_drafter_may_ask_for_is_named(layers: tuple[int, ...], says: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        FeatureSpec(layers)
    assert says in str(refused.value)


def test_rows_know_where_they_end() -> None:
    assert FeatureRows(5, np.zeros((3, 2), np.uint16)).end == 8


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_infinities_and_nan_are_found(bits: int) -> None:
    rows = np.full((2, 2), 0x7F7F, np.uint16)  # the largest finite number
    assert all_finite(rows)
    rows[1, 1] = bits
    assert not all_finite(rows)
