"""On a virtual clock, whatever a drafter is like, it costs almost nothing.

A drafter that computes slows the target down by 40 %, and nothing is known when a text begins.
"""

from typing import Any

import pytest

from runtime.schedulers.base import Scheduler
from runtime.schedulers.living import Living
from runtime.schedulers.plain import Plain
from runtime.sim.forecast import Setting, simulate
from runtime.sim.pair_profile import PairProfile


class Ungated(Living):
    """Never rests."""

    def __init__(self, times: dict[int, float]) -> None:
        super().__init__(times)
        self.gate = None  # type: ignore[assignment]


def speed(policy: type[Living], tokens: int, **changed: Any) -> float:
    """Tokens per second of a text of so many tokens, relative to plain decoding on its own."""
    known = {
        "target": {1: 0.02, 8: 0.022, 16: 0.03, 64: 0.1},
        "draft": {1: 0.002, 16: 0.0025},
        "acceptance": {1: 0.34, 4: 0.5},
        "beside": 1.4,
    }
    pair = PairProfile.model_validate({**known, **changed})

    def rate(scheduler: Scheduler, drafters: int) -> float:
        setting = Setting(length=tokens, once=True, drafters=drafters)
        return simulate(pair, lambda: scheduler, setting).tokens_per_second

    return rate(policy(pair.target), 1) / rate(Plain(), 0)


USELESS = {"acceptance": {1: 0.0, 4: 0.0}}
SLOW = {"draft": {1: 0.05, 16: 0.06}}
VERY_SLOW = {"draft": {1: 0.5, 16: 0.6}}
WEAK = {"acceptance": {1: 0.1, 4: 0.2}}


@pytest.mark.parametrize("tokens", [64, 400])
@pytest.mark.parametrize("drafter", [USELESS, WEAK, {}], ids=str)
def test_no_drafter_makes_decoding_slower(drafter: dict[str, Any], tokens: int) -> None:
    assert speed(Living, tokens, **drafter) > 0.98


def test_a_slow_drafter_soon_rests() -> None:
    """A pass of it lasts as long as two or three steps of the target, and cannot be ended."""
    assert speed(Living, 64, **SLOW) > 0.95 > speed(Ungated, 64, **SLOW)
    assert speed(Living, 400, **SLOW) > 0.98 > speed(Ungated, 400, **SLOW)


def test_a_pass_as_long_as_25_steps_costs_that_long() -> None:
    assert speed(Living, 400, **VERY_SLOW) > 0.92


@pytest.mark.parametrize("beside", [1.0, 1.2])
def test_a_good_drafter_loses_little_to_probes(beside: float) -> None:
    good = {"acceptance": {1: 0.75, 4: 0.9}, "beside": beside}
    assert speed(Living, 1000, **good) > 0.97 * speed(Ungated, 1000, **good)
