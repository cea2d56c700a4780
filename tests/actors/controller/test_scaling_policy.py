"""The number of drafters of a pool, decided in a world where it is known what each brings."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from actors.fleet.scaling_policy import (
    IDLE_TIMEOUT_S,
    MAX_TRIAL_PAUSE_S,
    TRIAL_PAUSE_S,
    Decision,
    Sample,
    ScalingState,
    decide_size,
)

PERIOD = 5.0  # seconds between samples
BUSY = 0.9  # of the time, with sessions


@dataclass
class World:
    """Simulates targets and drafters.

    A round accepts `accepted(drafters)` tokens; there are `rate` rounds a second. A new drafter
    joins after `delay` seconds.
    """

    accepted: Callable[[int], float]
    most: int = 4
    least: int = 0
    rate: float = 100.0
    sessions: float = 1.0
    delay: float = 10.0
    known: ScalingState = field(default_factory=lambda: ScalingState(0))
    now: float = 0.0
    steps: float = 0.0
    rounds: float = 0.0
    total: float = 0.0
    busy: float = 0.0
    ready: int = 0
    since: float = 0.0
    decisions: list[Decision] = field(default_factory=list)

    def run(self, seconds: float) -> "World":
        end = self.now + seconds
        while self.now < end:
            self.now += PERIOD
            if self.ready != self.known.count and self.now - self.since >= self.delay:
                self.ready = self.known.count
            rounds = self.rate * self.sessions * PERIOD
            self.rounds += rounds
            self.steps += rounds / self.sessions
            self.total += rounds * self.accepted(self.ready)
            self.busy += BUSY * PERIOD if rounds else 0.0
            self.take(
                Sample(
                    self.now,
                    self.ready,
                    int(self.steps),
                    int(self.rounds),
                    int(self.total),
                    int(self.total),
                    self.busy,
                )
            )
        return self

    def take(self, sample: Sample) -> None:
        self.known, decision = decide_size("pool", self.least, self.most, self.known, sample)
        if decision is not None:
            assert (decision.before, decision.after) == (
                self.decisions[-1].after if self.decisions else 0,
                self.known.count,
            )
            assert self.least <= decision.after <= self.most
            self.decisions.append(decision)
            self.since = self.now

    @property
    def settled(self) -> int:
        """The count that is not just tried out."""
        return self.known.trial.before if self.known.trial else self.known.count


def first_two(drafters: int) -> float:
    """The first brings 1.0 tokens a round, the second 0.5, the others nothing."""
    return (0.0, 1.0, 1.5)[min(drafters, 2)]


def test_it_grows_while_one_more_brings_something_and_no_further() -> None:
    world = World(first_two).run(400)
    assert world.settled == 2
    assert [decision.after for decision in world.decisions[:4]] == [1, 2, 3, 2]
    back = world.decisions[3]
    assert back.why == "one more brought too little"
    assert back.gain == pytest.approx(0.0, abs=0.1)
    assert back.speed == pytest.approx(2.5 * 100 / BUSY, rel=0.02)
    assert back.worth == pytest.approx(0.05 * 2.5 * 100 / BUSY, rel=0.02)


def test_what_is_worth_no_device_goes_to_none() -> None:
    world = World(
        lambda drafters: 0.0,
        known=ScalingState(3),
        ready=3,
        decisions=[Decision("pool", 0, 3, 3, "")],
    ).run(300)
    assert world.settled == 0
    assert world.decisions[1].why == "not worth it"


def test_it_stays_above_its_minimum() -> None:
    world = World(
        lambda drafters: 0.0,
        least=1,
        known=ScalingState(2),
        ready=2,
        decisions=[Decision("pool", 0, 2, 2, "")],
    ).run(1000)
    assert world.settled == 1


def test_it_comes_back_when_it_is_worth_it_again() -> None:
    world = World(lambda drafters: 0.0).run(2000)
    assert world.settled == 0
    world.accepted = first_two
    world.run(MAX_TRIAL_PAUSE_S + 1000)
    assert world.settled == 2


@pytest.mark.parametrize(
    "accepted",
    [lambda n: 0.0, first_two, lambda n: 0.04 * n, lambda n: 0.2 * n**0.5],
    ids=["none", "two", "little", "root"],
)
def test_it_does_not_flap(accepted: Callable[[int], float]) -> None:
    """Trials become rare: each takes a minute, and their pauses double."""
    world = World(accepted).run(20_000)
    late = [decision for decision in world.decisions if decision.at > 12_000]
    assert len(late) <= 8
    assert len({world.run(500).settled for _ in range(5)}) == 1


def test_between_the_two_bars_nothing_changes() -> None:
    """A third that brings 3 % is not taken on, and is kept where it is there."""
    third = lambda drafters: (0.0, 1.0, 1.5, 1.575, 1.575)[drafters]  # noqa: E731 - a table
    assert World(third).run(3000).settled == 2
    world = World(
        third, known=ScalingState(3), ready=3, decisions=[Decision("pool", 0, 3, 3, "")]
    ).run(3000)
    assert world.settled == 3
    assert "one fewer was missed" in {decision.why for decision in world.decisions}


def test_what_one_brings_is_missed_when_the_load_has_changed() -> None:
    world = World(first_two).run(3000)
    assert world.settled == 2
    world.sessions, world.accepted = 8.0, lambda drafters: 0.5 * drafters
    world.run(TRIAL_PAUSE_S * 4)
    assert world.settled == 4, "trials are due at once"


def test_without_work_it_rests_and_with_work_it_is_back() -> None:
    world = World(first_two).run(400)
    world.rate = 0.0
    world.run(IDLE_TIMEOUT_S + 100)
    assert world.known.count == 0
    assert world.decisions[-1].why == f"no work for {IDLE_TIMEOUT_S:g} s"
    world.rate = 100.0
    world.run(PERIOD)
    assert world.known.count == 2
    assert world.decisions[-1].why == "there is work again"


def test_a_target_that_is_replaced_begins_the_window_again() -> None:
    world = World(first_two).run(300)
    count = len(world.decisions)
    world.rounds = world.total = world.steps = 0.0  # its counters are gone
    world.run(10)
    assert len(world.decisions) == count


def test_drafters_that_do_not_come_decide_nothing() -> None:
    world = World(first_two, delay=10_000).run(2000)
    assert [decision.after for decision in world.decisions] == [1], "the first is waited for"


def test_new_bounds_are_kept() -> None:
    world = World(first_two).run(400)
    world.least = world.most = 3
    world.run(PERIOD)
    assert world.known.count == 3
    assert world.decisions[-1].why == "outside its bounds"


def test_another_pool_that_does_the_work_leaves_nothing_to_gain() -> None:
    known, decisions = ScalingState(2), []
    for tick in range(1, 40):
        rounds = 500 * tick
        sample = Sample(
            tick * PERIOD, known.count, rounds, rounds, 2 * rounds, 0, BUSY * tick * PERIOD
        )
        known, decision = decide_size("pool", 0, 4, known, sample)
        decisions += [decision] if decision else []
    assert [decision.after for decision in decisions[:2]] == [1, 0]
    assert decisions[0].gain == 0.0
