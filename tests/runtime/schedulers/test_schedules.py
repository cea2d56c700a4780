"""The schedules match timelines worked out by hand from the papers' formulas.

There is one session, one drafter and no network. A forward pass of the drafter takes t and a step
of the target T (`step`), both whole numbers, so every time is exact. A draft arrives when its pass
ends; a commit arrives at once, but a running pass is finished.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core.messages import Round, Style
from runtime.core.node_keys import text_key
from runtime.core.tree import TokenTree
from runtime.schedulers.amusd import Amusd
from runtime.schedulers.base import Scheduler, SessionView
from runtime.schedulers.blocking import PATIENCE_FACTOR
from runtime.schedulers.pearl import Pearl, gamma
from runtime.schedulers.plain import Plain
from runtime.schedulers.sync import Sync

RIGHT, WRONG = 1, 100
TICK = 1e-6  # of the clock
Ranks = Callable[
    [int], int | None
]  # for a position of the output: where the target's token is among the guesses, if at all


def perfect(_: int) -> int:
    return 0


def wrong_at(*positions: int) -> Ranks:
    return lambda position: None if position in positions else 0


@dataclass(frozen=True, slots=True)
class Step:
    began: float
    rows: int
    tokens: int  # committed at its end


class Drafter:
    """Expands the best leaves of the tree; from `silent` on it sends nothing."""

    def __init__(
        self, tree: TokenTree, style: Style, t: float, ranks: Ranks, length: int, silent: float
    ) -> None:
        self.tree, self.style, self.t, self.ranks, self.length, self.silent = (
            tree,
            style,
            t,
            ranks,
            length,
            silent,
        )
        self.committed = 0
        self.passes = 0  # since the last commit
        self.leaves: list[int] = []  # keys; empty while it rests
        self.ends = math.inf

    def start(self, now: float) -> None:
        if self.leaves or (self.style.passes and self.passes >= self.style.passes):
            return
        tree, room = self.tree, self.length - self.committed - 1
        ripe = [
            node for node in range(len(tree)) if not tree.expanded[node] and tree.depth[node] < room
        ]
        nodes = sorted(ripe, key=lambda node: -tree.path[node])[: self.style.width]
        self.leaves = [tree.key[node] for node in nodes]
        self.ends = now + self.t if nodes else math.inf
        for node in nodes:
            tree.expanded[node] = True

    def grow(self) -> bool:
        """Ends a pass; returns True if it gave new nodes. Leaves that died give none."""
        grown, now = False, self.ends
        alive = {key: node for node, key in enumerate(self.tree.key)}
        for leaf in [alive[key] for key in self.leaves if key in alive]:
            path = self.tree.tokens_to(leaf)
            rank = self.ranks(self.committed + len(path)) if set(path) <= {RIGHT} else None
            for branch in range(self.style.branches if now < self.silent else 0):
                token = RIGHT if branch == rank else WRONG + branch
                grown |= (
                    self.tree.add(leaf, token, math.log(0.5) if branch == 0 else math.log(0.4))
                    is not None
                )
        self.passes, self.leaves, self.ends = self.passes + 1, [], math.inf
        self.start(now)
        return grown

    def hear(self, tokens: int, now: float) -> None:
        self.committed += tokens
        self.passes = -1 if self.leaves else 0  # the pass under way is none of the new ones
        self.start(now)


class Race:
    """Target and drafter side by side until `length` tokens are committed."""

    def __init__(
        self,
        scheduler: Scheduler,
        t: float,
        step: float,
        ranks: Ranks = perfect,
        length: int = 40,
        silent: float = math.inf,
    ) -> None:
        self.scheduler, self.computed, self.length = scheduler, step, length
        self.tree = TokenTree(text_key([7]), 7, 512, 64)
        self.drafter = Drafter(self.tree, scheduler.style, t, ranks, length, silent)
        self.now = self.ready = self.committed_at = self.growth_at = 0.0
        self.hit, self.missed, self.width, self.growths = False, True, 0, 0
        self.steps: list[Step] = []

    def run(self) -> "Race":
        self.drafter.start(0.0)
        while self.drafter.committed < self.length:
            plan = self.scheduler.plan([self.view()])
            if plan.wait > 0.0:
                self.wait(self.now + max(plan.wait, TICK))
            else:
                self.step(plan.rows[0])
        return self

    @property
    def room(self) -> int:
        return self.length - self.drafter.committed - 1

    def view(self) -> SessionView:
        gains = np.sort(np.exp(self.tree.path[1:]))[::-1]
        leaves = [
            path
            for path, fanout in zip(self.tree.path, self.tree.fanout, strict=True)
            if not fanout
        ]
        return SessionView(
            gains,
            np.sort(np.exp(leaves))[::-1],
            depth=max(self.tree.depth),
            drafters=int(self.room > 0),
            hit=self.hit,
            width=self.width,
            waited=self.now - self.ready,
            since_commit=self.now - self.committed_at,
            since_growth=self.now - self.growth_at,
            growths=self.growths,
        )

    def wait(self, until: float) -> None:
        """For the next growth, or so long."""
        while self.drafter.ends <= until:
            self.now = self.drafter.ends
            if self.grow():
                return
        self.now = until

    def grow(self) -> bool:
        at = self.drafter.ends
        grown = self.drafter.grow()
        if grown:
            self.scheduler.on_growth(at - self.growth_at, self.missed, 1)
            self.growth_at, self.missed, self.growths = at, False, self.growths + 1
        return grown

    def step(self, rows: int) -> None:
        nodes, began = set(self.tree.best_nodes(rows)), self.now
        assert len(nodes) == rows
        while self.drafter.ends <= began + self.computed:
            self.grow()
        node, accepted = 0, 0
        while (child := self.tree.child(node, RIGHT)) is not None and child in nodes:
            node, accepted = child, accepted + 1
        self.hit = self.tree.reroot([RIGHT] * (accepted + 1))
        self.steps.append(Step(began, rows, accepted + 1))
        self.scheduler.observe(
            [
                Round(
                    "s",
                    len(self.steps),
                    rows,
                    accepted,
                    self.hit,
                    began - self.ready,
                    self.computed,
                    0.0,
                )
            ]
        )
        self.now = self.ready = self.committed_at = began + self.computed
        self.missed, self.width, self.growths = not self.hit, rows, 0
        self.growth_at = self.growth_at if self.hit else self.now
        self.drafter.hear(accepted + 1, self.now)


def timeline(race: Race) -> list[tuple[float, int, int]]:
    return [(step.began, step.rows, step.tokens) for step in race.run().steps]


def repeated(
    first: float, period: float, rows: int, tokens: int, count: int
) -> list[tuple[float, int, int]]:
    return [(first + period * i, rows, tokens) for i in range(count)]


def test_plain_takes_a_step_for_a_token() -> None:
    assert timeline(Race(Plain(), t=2, step=8, length=10)) == repeated(0, 8, 0, 1, 10)


# In turn: k*t + T a round (Leviathan et al., arXiv 2211.17192)


def test_a_round_of_a_chain_takes_k_passes_and_a_step() -> None:
    assert timeline(Race(Sync(1, 1, 4, 4, 2), t=2, step=7, length=40)) == repeated(8, 15, 4, 5, 8)


def test_a_round_of_a_chain_that_is_cut_short_takes_as_long() -> None:
    """Every third token is guessed wrong: two are accepted, one is the target's own."""
    race = Race(
        Sync(1, 1, 4, 4, 2),
        t=2,
        step=7,
        ranks=lambda position: None if position % 3 == 2 else 0,
        length=60,
    )
    assert timeline(race)[:15] == repeated(8, 15, 4, 3, 15)


def test_a_tree_accepts_what_a_chain_misses() -> None:
    """The target's token is the second guess: two binary levels are six nodes, two passes."""
    tree, chain = (
        Race(policy, 2, 7, lambda _: 1, 36) for policy in (Sync(2, 2, 2, 6, 2), Sync(1, 1, 2, 2, 2))
    )
    assert timeline(tree)[:11] == repeated(4, 11, 6, 3, 11)
    assert timeline(chain)[:30] == repeated(4, 11, 2, 1, 30)


def test_a_tree_is_drafted_anew_after_a_hit_beyond_its_rows() -> None:
    """Two rows of six nodes: one level is verified and one node reused, yet two passes follow."""
    assert timeline(Race(Sync(2, 2, 2, 2, 2), t=2, step=17, length=36))[:6] == repeated(
        4, 4 + 17, 2, 2, 6
    )


def test_near_the_end_of_the_text_it_waits_in_vain_but_not_for_long() -> None:
    """Two tokens are left: one pass, four times as long for a second one, then the step."""
    assert timeline(Race(Sync(1, 1, 4, 4, 2), t=2, step=7, length=7)) == [
        (8, 4, 5),
        (15 + 2 + PATIENCE_FACTOR * 2, 1, 2),
    ]


def test_a_drafter_slower_than_said_is_waited_for_when_that_is_known() -> None:
    steps = Race(Sync(1, 1, 4, 4, 1), t=6, step=7, length=200).run().steps
    assert steps[0].rows < 4
    assert {late.began - early.began for early, late in itertools.pairwise(steps[-8:-1])} == {
        4 * 6 + 7
    }


# AMUSD (arXiv 2410.17375): the chain goes on all the time


def test_amusd_keeps_up_with_a_perfect_drafter() -> None:
    """After two passes each step verifies what was drafted in the last: T/t tokens per T."""
    assert timeline(Race(Amusd(2), t=2, step=8, length=43)) == [
        (4, 2, 3),
        *repeated(12, 8, 3, 4, 10),
    ]


def test_a_rejection_costs_amusd_the_pass_under_way_and_two_more() -> None:
    race = Race(Amusd(2), t=2, step=8, ranks=wrong_at(8), length=40)
    assert timeline(race)[:5] == [(4, 2, 3), (12, 3, 4), (20, 3, 2), (28 + 3 * 2, 2, 3), (42, 3, 4)]


def test_without_a_least_length_amusd_never_waits() -> None:
    race = Race(Amusd(2, least=0), t=2, step=8, ranks=wrong_at(8), length=40)
    assert timeline(race)[:4] == [(0, 0, 1), (8, 3, 4), (16, 3, 4), (24, 0, 1)]


# PEARL (arXiv 2408.11850): rounds of max(gamma * t, T)


@pytest.mark.parametrize(("step", "period"), [(6, 8), (8, 8), (10, 10)])
def test_pearl_brings_gamma_tokens_a_round(step: int, period: int) -> None:
    """The first round verifies the first token (pre-verify), the others the last round's draft."""
    assert timeline(Race(Pearl(4, 2), t=2, step=step, length=41)) == [
        (0, 0, 1),
        *repeated(period, period, 3, 4, 10),
    ]


@pytest.mark.parametrize(
    ("position", "rounds"),  # rows and tokens
    [
        (6, [(0, 1), (3, 4), (3, 2), (0, 1), (3, 4)]),  # the second of three rows
        (
            4,
            [(0, 1), (3, 4), (0, 1), (3, 4), (3, 4)],
        ),  # the first drafted token of a round, decided ahead
        (0, [(0, 1), (0, 1), (3, 4), (3, 4), (3, 4)]),
    ],
)
def test_pearl_verifies_one_token_ahead_after_a_rejection(
    position: int, rounds: list[tuple[int, int]]
) -> None:
    race = Race(Pearl(4, 2), t=2, step=8, ranks=wrong_at(position), length=40)
    assert timeline(race)[:5] == [(8 * i, *of_round) for i, of_round in enumerate(rounds)]


def test_a_drafter_that_is_always_wrong_leaves_pearl_as_fast_as_plain_decoding() -> None:
    assert timeline(Race(Pearl(4, 2), 2, 8, lambda _: None, length=20)) == repeated(0, 8, 0, 1, 20)


# All


POLICIES: dict[str, Callable[[int, int], Scheduler]] = {  # of t and T
    "plain": lambda t, step: Plain(),
    "chain": lambda t, step: Sync(1, 1, 4, 4, t),
    "tree": lambda t, step: Sync(3, 2, 3, 8, t),
    "amusd": lambda t, step: Amusd(t),
    "eager": lambda t, step: Amusd(t, least=0),
    "pearl": lambda t, step: Pearl(gamma(step, t), t),
}
EACH = pytest.mark.parametrize("make", list(POLICIES.values()), ids=list(POLICIES))


@EACH
@settings(max_examples=30)
@given(t=st.integers(1, 5), step=st.integers(1, 30), wrong=st.sets(st.integers(0, 49)))
def test_the_text_is_written_and_no_faster_than_drafter_and_target_together(
    make: Callable[[int, int], Scheduler], t: int, step: int, wrong: set[int]
) -> None:
    race = Race(make(t, step), t, step, wrong_at(*wrong), length=50).run()
    assert sum(step.tokens for step in race.steps) == 50
    assert race.now / t + race.now / step >= 50


@EACH
def test_a_drafter_that_falls_silent_costs_speed_only(
    make: Callable[[int, int], Scheduler],
) -> None:
    race = Race(make(2, 8), t=2, step=8, length=60, silent=40).run()
    after = [step for step in race.steps if step.began > 60]
    assert {(step.rows, step.tokens) for step in after} == {(0, 1)}
    began = [step.began for step in after]
    assert max(np.diff(began)) <= 8 + PATIENCE_FACTOR * 8
