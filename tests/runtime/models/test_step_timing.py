"""Step times are medians over turns, of what the clock says."""

from runtime.models.base import PassInput
from runtime.models.step_timing import fan_rows, step_times
from runtime.models.toy import ToyModel


class Slow(ToyModel):
    """Takes one second per row; every third turn is disturbed, the first pass much slower."""

    def __init__(self) -> None:
        super().__init__(context=32)
        self.now, self.passes = 0.0, 0

    def read(self, part: PassInput):  # type: ignore[no-untyped-def]
        self.now += len(part.rows.tokens) + (100.0 if self.passes % 3 == 1 else 0.0)
        self.passes += 1
        return super().read(part)


def test_medians_by_width() -> None:
    model = Slow()
    assert step_times(model, [1, 4], lambda: model.now) == {1: 1.0, 4: 4.0}
    assert model.passes == 1 + 2 * 6


def test_a_fan_is_a_root_and_its_children() -> None:
    rows = fan_rows(7, 3)
    assert rows.positions.tolist() == [7, 8, 8]
    assert rows.visible.tolist() == [[True, False, False], [True, True, False], [True, False, True]]
    assert rows.prefix == 7
