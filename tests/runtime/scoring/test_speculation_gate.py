"""Speculation stops where plain decoding is faster, and is found again where it is not."""

from itertools import pairwise

import numpy as np
import pytest

from runtime.scoring.gate_account import MAX_REST, PLAIN, TRIAL_BUDGET, Way
from runtime.scoring.speculation_gate import (
    FIRST_PROBE_STEPS,
    MAX_RESERVE,
    PROBE_STEPS,
    SpeculationGate,
    load_of,
)

TIMES = {1: 0.02, 2: 0.021, 4: 0.024, 8: 0.03}
Step = tuple[float, float]  # mean tokens, and seconds relative to a plain step
ALL: tuple[Way, ...] = ("all",)
BOTH: tuple[Way, ...] = ("heads", "all")


class World:
    """Plain steps give a token each; others what `steps` says. Times are noisy.

    `hope` is what a step is expected to give; None: nobody says.
    """

    def __init__(
        self,
        gate: SpeculationGate,
        steps: dict[Way, Step],
        seed: int = 0,
        noise: float = 0.2,
        hope: float | None = None,
    ) -> None:
        self.gate, self.steps, self.noise = gate, steps, noise
        self.hope = hope
        self.random = np.random.default_rng(seed)
        self.taken: list[Way] = []
        self.tokens, self.seconds = 0, 0.0

    def step(self, ways: tuple[Way, ...] = ALL, sessions: int = 1) -> None:
        self.gate.begin(ways)
        mean, slow = self.steps[self.gate.way] if self.gate.way != PLAIN else (1.0, 1.0)
        tokens = sessions + int(self.random.poisson(sessions * (mean - 1.0)))
        spread = float(self.random.gamma(1 / self.noise**2, self.noise**2)) if self.noise else 1.0
        self.taken.append(self.gate.way)
        self.tokens += tokens
        self.seconds += slow * TIMES[sessions]
        expected = None if self.hope is None else sessions * self.hope
        seconds = slow * spread * TIMES[sessions]
        self.gate.observe(ways, sessions, sessions, tokens, seconds, expected=expected)

    def run(self, tokens: int, ways: tuple[Way, ...] = ALL) -> float:
        """The speed over so many tokens, relative to plain decoding."""
        before, began = self.tokens, self.seconds
        while self.tokens < before + tokens:
            self.step(ways)
        return (self.tokens - before) * TIMES[1] / (self.seconds - began)


def mean_speed(step: Step, tokens: int, noise: float = 0.2, hope: float | None = None) -> float:
    worlds = (World(SpeculationGate(TIMES), {"all": step}, seed, noise, hope) for seed in range(16))
    return float(np.mean([world.run(tokens) for world in worlds]))


@pytest.mark.parametrize(("tokens", "least"), [(64, 0.95), (256, 0.975), (1000, 0.985)])
@pytest.mark.parametrize(
    "step",
    [(1.0, 1.0), (1.0, 1.1), (1.0, 1.4), (1.0, 2.5), (1.3, 1.5), (1.4, 1.45), (2.0, 2.6)],
    ids=str,
)
def test_no_drafter_costs_much(step: Step, tokens: int, least: float) -> None:
    """From the first token on, with steps that vary by a fifth, and nothing known before.

    Two steps of a trial that take 2.5 times as long are already 5 % of 64 tokens.
    """
    assert mean_speed(step, tokens) > least


@pytest.mark.parametrize("step", [(1.0, 1.4), (1.3, 1.5)], ids=str)
def test_nor_on_a_machine_whose_steps_vary_by_half(step: Step) -> None:
    assert mean_speed(step, 300, noise=0.5) > 0.95


@pytest.mark.parametrize("step", [(1.5, 1.2), (2.4, 1.3), (4.0, 1.5)], ids=str)
def test_a_good_drafter_loses_little_to_probes(step: Step) -> None:
    gained = step[0] / step[1]
    assert mean_speed(step, 2000) > 0.965 * gained
    assert mean_speed(step, 64) > 0.8 * gained


def test_probes_are_rare() -> None:
    world = World(SpeculationGate(TIMES), {"all": (2.4, 1.3)})
    world.run(4000)
    assert 0 < world.taken.count(PLAIN) < 0.05 * len(world.taken)
    assert 2 < world.gate.probes < 20
    assert world.gate.speedup == pytest.approx(2.4 / 1.3, rel=0.3)


def test_it_measures_plain_decoding_before_it_judges() -> None:
    world = World(SpeculationGate(TIMES), {"all": (2.0, 1.0)}, noise=0.0)
    for _ in range(FIRST_PROBE_STEPS + 2):
        world.step()
    assert world.taken == [*[PLAIN] * (FIRST_PROBE_STEPS + 1), "all"]


def test_drafters_that_still_compute_do_not_spoil_a_probe() -> None:
    """After the way has changed, the time of two steps passes until they rest."""
    gate = SpeculationGate(TIMES)
    for _ in range(1 + 2 + PROBE_STEPS):
        assert gate.speedup == 1.0
        gate.observe(ALL, 1, 1, 1, TIMES[1], settle=2 * TIMES[1])
    assert gate.account.record(PLAIN).steps == pytest.approx(PROBE_STEPS, rel=0.2)
    never_answered = SpeculationGate(TIMES)
    for _ in range(1 + 2 + PROBE_STEPS):
        never_answered.observe(ALL, 1, 1, 1, TIMES[1], settle=None)
    assert never_answered.account.record(PLAIN).steps < PROBE_STEPS


def test_a_drafter_that_becomes_good_is_found_again_and_one_that_turns_bad_is_dropped() -> None:
    world = World(SpeculationGate(TIMES), {"all": (1.0, 1.4)})
    world.run(2000)
    world.steps["all"] = (2.4, 1.3)
    world.run(2 * MAX_REST)
    assert world.run(500) > 1.5
    world.steps["all"] = (1.0, 1.4)
    began = world.tokens
    assert world.run(500) > 0.95
    assert world.tokens - began <= 501


def test_rests_grow_with_each_failed_trial() -> None:
    world = World(SpeculationGate(TIMES), {"all": (1.0, 1.4)}, noise=0.0)
    world.run(6000)
    turns = [n for n in range(1, len(world.taken)) if world.taken[n] != world.taken[n - 1]]
    rests = [after - before for before, after in pairwise(turns) if world.taken[before] == PLAIN]
    assert rests[1:-1] == sorted(rests[1:-1])
    assert max(rests) <= MAX_REST
    spent = sum(way != PLAIN for way in world.taken) * 0.4
    assert spent < 0.01 * world.tokens + 2 * TRIAL_BUDGET


def test_the_faster_of_heads_and_all_is_used() -> None:
    cases: list[tuple[dict[Way, Step], Way]] = [
        ({"all": (1.6, 1.5), "heads": (1.5, 1.05)}, "heads"),
        ({"all": (2.6, 1.3), "heads": (1.3, 1.05)}, "all"),
    ]
    for steps, best in cases:
        world = World(SpeculationGate(TIMES), steps)
        world.run(3000, BOTH)
        assert world.taken[-500:].count(best) > 400


def test_each_load_has_an_account_of_its_own() -> None:
    assert [load_of(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]
    world = World(SpeculationGate(TIMES), {"all": (2.0, 1.2)})
    world.run(300)
    world.steps["all"] = (1.05, 1.5)
    for _ in range(200):
        world.step(sessions=8)
    assert world.gate.way == PLAIN
    assert world.taken[-150:].count("all") < 15
    world.steps["all"] = (2.0, 1.2)
    world.step()
    assert world.gate.way == "all"


def test_without_helpers_a_step_is_a_measurement_and_nothing_changes() -> None:
    gate = SpeculationGate(TIMES)
    for _ in range(50):
        gate.observe((), 1, 1, 1, 0.02)
    assert gate.way == "all"
    assert gate.account.record(PLAIN).speed == pytest.approx(1.0)
    gate.observe(ALL, 1, 1, 2, 0.02)
    assert gate.way == "all"  # what plain decoding takes is known already


def test_a_pause_of_the_machine_is_no_fault_of_the_drafter() -> None:
    world = World(SpeculationGate(TIMES), {"all": (2.4, 1.3)}, noise=0.0)
    world.run(200)
    world.gate.observe(ALL, 1, 1, 2, 100 * TIMES[1])
    assert world.gate.account.home == "all"


@pytest.mark.parametrize("step", [(1.5, 1.2), (1.4, 1.2), (2.4, 1.3)], ids=str)
def test_a_drafter_that_keeps_its_promise_is_not_dropped_by_chance(step: Step) -> None:
    """In a short text single outcomes end trials; what was expected of them does not."""
    by_chance, expected = mean_speed(step, 96), mean_speed(step, 96, hope=step[0])
    assert expected >= by_chance
    assert expected > 0.9 * step[0] / step[1]


@pytest.mark.parametrize(("tokens", "least"), [(64, 0.93), (256, 0.965), (1000, 0.98)])
@pytest.mark.parametrize("step", [(1.0, 1.1), (1.0, 1.4), (1.3, 1.5)], ids=str)
@pytest.mark.parametrize("hope", [1.5, 2.5, 5.0])
def test_a_drafter_of_which_too_much_is_expected_costs_little(
    step: Step, tokens: int, least: float, hope: float
) -> None:
    """What is expected of guesses comes from how such guesses did before, and may be wrong."""
    assert mean_speed(step, tokens, hope=hope) > least


def test_what_was_earned_is_kept_by_the_next_process() -> None:
    world = World(SpeculationGate(TIMES), {"all": (2.4, 1.3)})
    world.run(300)
    earned = world.gate.account.budget
    assert earned > TRIAL_BUDGET
    again = SpeculationGate(TIMES)
    again.restore(world.gate.to_dict())
    assert again.account.budget == pytest.approx(earned)


def test_earned_tokens_pay_for_a_new_trial() -> None:
    world = World(SpeculationGate(TIMES), {"all": (2.6, 1.3)}, noise=0.0)
    world.run(400)
    assert world.gate.account.reserve == MAX_RESERVE
    world.steps["all"] = (1.0, 1.6)
    world.run(300)
    assert world.gate.account.home == PLAIN
    assert world.gate.account.reserve < MAX_RESERVE
    assert world.taken[-300:].count("all") > TRIAL_BUDGET / 0.6 + 2
