"""The engine counts, rests and disables its heads."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest

from runtime.core.draft_nodes import DraftNodes
from runtime.core.errors import InvalidRequest
from runtime.core.node_keys import text_key
from runtime.core.sampler_reference import reference_sample
from runtime.core.tree import TokenTree
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.base import Text
from runtime.heads.base import VerifiedStep
from runtime.models.base import Branch, OutputSpec
from runtime.schedulers.base import Plan, SessionView
from runtime.schedulers.fixed import Fixed
from runtime.scoring.drafter_utility import REST_COMMITS, TRIAL_COMMITS
from runtime.target.commands import SetScheduler
from runtime.target.engine import Engine
from runtime.target.head_runner import make_draft, rows_by_end_probability
from runtime.target.session import Session
from runtime.target.verifier import Verifier
from tests.support.harness import NOBODY, Known, Lockstep, Mute, asking, continued
from tests.support.heads import PROMPT, TEXT, TOY, headed


class Oracle:
    """Is a head that knows the next `depth` tokens."""

    output_spec: ClassVar[OutputSpec] = OutputSpec()

    def __init__(self, text: Sequence[int], depth: int) -> None:
        self.text, self.depth = list(text), depth

    def propose(self, seen: Sequence[VerifiedStep]) -> list[DraftNodes]:
        return [self.grow(one.text) for one in seen]

    def grow(self, text: Text) -> DraftNodes:
        assert list(text.tokens) == self.text[: len(text.tokens)]
        coming = np.asarray(self.text[len(text.tokens) :][: self.depth])
        return DraftNodes(np.arange(len(coming)), coming, np.full(len(coming), -0.1), roots=1)

    def close(self, session: str) -> None:
        pass


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_perfect_head_saves_d_of_d_plus_one_steps(depth: int) -> None:
    """The first step is an exception: the head has seen nothing before it."""
    engine = headed(TOY, Oracle(TEXT, depth), chooser=reference_sample)
    (found,) = Lockstep(engine).run(asking(PROMPT, max_tokens=8 * (depth + 1) + 1))
    assert found.tokens == tuple(TEXT[len(PROMPT) : len(PROMPT) + 8 * (depth + 1) + 1])
    assert (found.stats.rounds, found.stats.accepted) == (9, 8 * depth)
    assert found.stats.by_drafter == {"h-0": 8 * depth}
    assert found.drafters == ("", *(("h-0",) * depth + ("",)) * 8)
    report = engine.report()
    assert report.guesses["h-0"].accepted == 8 * depth
    assert report.fallbacks == {"empty tree": 1}
    assert report.drafted == report.accepted + report.rejected + report.expired


def test_acceptance_is_counted_for_each() -> None:
    """In each round the drafter guesses one token; the head guesses it too and one more."""
    engine = headed(TOY, Oracle(TEXT, 2), chooser=reference_sample)
    (found,) = Lockstep(engine, DraftEngine(Known(TEXT, 24), "d", 1), passes=1).run(
        asking(PROMPT, max_tokens=38)
    )
    assert found.tokens == tuple(TEXT[len(PROMPT) : len(PROMPT) + 38])
    assert found.stats.by_drafter == {"d": 13, "h-0": 12}
    assert (found.stats.rounds, found.stats.ignored["repeated"]) == (13, 12)


class Waits(Fixed):
    """Waits once for a drafter before each step and records the gains meanwhile."""

    seen: ClassVar[list[tuple[float, int]]] = []

    def plan(self, views: Sequence[SessionView]) -> Plan:
        self.seen.append((views[0].waited, len(views[0].gains)))
        return super().plan(views) if views[0].waited else Plan((0,), 1.0)


def test_head_guesses_do_not_count_while_waiting_for_a_drafter() -> None:
    engine = headed(TOY, Oracle(TEXT, 2), chooser=reference_sample)
    engine.scheduler = Waits(8)
    (found,) = Lockstep(engine).run(asking(PROMPT, max_tokens=7))
    assert found.stats.rounds == 3
    assert {gains for waited, gains in Waits.seen if not waited} == {0}
    assert [gains for waited, gains in Waits.seen if waited] == [0, 0, 2, 0, 2]


def test_a_head_never_sees_a_session_without_speculation() -> None:
    engine = headed(TOY, Oracle(TEXT, 2), chooser=reference_sample)
    (found,) = Lockstep(engine).run(asking(PROMPT, speculation=False))
    assert found.stats.drafted == 0
    assert engine.metrics.guesses == {}


class Failing(Oracle):
    def propose(self, seen: Sequence[VerifiedStep]) -> list[DraftNodes]:
        raise RuntimeError("out of memory")


class Circular(Oracle):
    def grow(self, text: Text) -> DraftNodes:
        return DraftNodes(np.array([1]), np.array([3]), np.array([-0.1]), roots=1)


class Lopsided(Oracle):
    def grow(self, text: Text) -> DraftNodes:
        return DraftNodes(np.array([0]), np.array([3]), np.array([-0.1, -0.2]), roots=1)


class Blind(Oracle):
    """Wants to look at what the model does not show."""

    output_spec = OutputSpec(hidden=True)


class Clinging(Oracle):
    """Takes no leave."""

    def close(self, session: str) -> None:
        raise ValueError(session)


@pytest.mark.parametrize("kind", [Failing, Circular, Lopsided, Blind, Clinging])
def test_a_head_that_fails_is_disabled(
    kind: type[Oracle], caplog: pytest.LogCaptureFixture
) -> None:
    engine = headed(TOY, kind(TEXT, 2), Oracle(TEXT, 2), chooser=reference_sample)
    (found,) = Lockstep(engine).run(asking(PROMPT))
    assert found.tokens == tuple(TEXT[len(PROMPT) : len(PROMPT) + 24])
    assert list(engine.heads.selected) == list(engine.drafter_manager.heads) == ["h-1"]
    assert engine.metrics.fallbacks["head lost"] == 1
    assert "head h-0 is disabled" in caplog.text


class Wrong(Oracle):
    """Guesses what is never written, and nonsense that must be ignored."""

    def grow(self, text: Text) -> DraftNodes:
        right = self.text[len(text.tokens)]
        return DraftNodes(
            np.array([0, 0, 0, 0]),
            np.array([(right + 1) % 24, -1, 24, right]),
            np.array([-0.1, -0.1, -0.1, 0.1]),
            roots=1,
        )


def test_an_unproductive_head_rests_and_costs_nothing() -> None:
    engine, text = (
        headed(TOY, Wrong(continued(TOY, PROMPT, 700), 1), chooser=reference_sample),
        continued(TOY, PROMPT, 400),
    )
    (found,) = Lockstep(engine).run(asking(PROMPT, max_tokens=200))
    assert found.tokens == tuple(text[len(PROMPT) : len(PROMPT) + 200])
    assert found.stats.accepted == 0
    assert found.stats.ignored["invalid"] == 3 * (
        TRIAL_COMMITS - 1
    )  # it is judged after the last commit of its trial, and not asked again
    assert engine.metrics.guesses["h-0"].proposed == TRIAL_COMMITS - 1 < REST_COMMITS
    assert engine.drafter_manager.utility.active(engine.heads.selected) == []
    assert engine.report().guesses["h-0"].resting


@pytest.mark.parametrize("slow", [0, 1])
def test_each_head_pays_for_its_own_time(slow: int) -> None:
    """Both guess right as long as the other does; one takes the time of a thousand tokens."""

    class Slow(Oracle):
        def propose(self, seen: Sequence[VerifiedStep]) -> list[DraftNodes]:
            for _ in range(100_000):
                engine.clock()
            return super().propose(seen)

    text = continued(TOY, PROMPT, 4 * TRIAL_COMMITS)
    heads = [Oracle(text, 1), Oracle(text, 2)]
    heads[slow] = Slow(text, 1 + slow)
    engine = headed(TOY, *heads, chooser=reference_sample)
    found = Lockstep(engine)
    found.admit(asking(PROMPT, max_tokens=4 * TRIAL_COMMITS))
    for _ in range(10):
        found.round()
    spent = engine.drafter_manager.utility.spent
    assert spent[f"h-{slow}"] > 900_000.0
    assert 0.0 < spent[f"h-{1 - slow}"] < 100.0


class Branched(Oracle):
    output_spec = OutputSpec(branches=(Branch(1, lambda states: states),))


@pytest.mark.parametrize("known", [0, 1])
def test_a_head_rests_when_a_drafter_guesses_the_same(known: int) -> None:
    """It knows two tokens of each step; so does the drafter, or it knows nothing."""
    text = continued(TOY, PROMPT, 4 * TRIAL_COMMITS)
    engine = headed(TOY, Oracle(text, 2), chooser=reference_sample)
    found = Lockstep(engine, DraftEngine(Known(text, 24) if known else Mute(), "d", 1), passes=2)
    found.admit(asking(PROMPT, max_tokens=4 * TRIAL_COMMITS))
    for _ in range(TRIAL_COMMITS):
        found.round()
    assert engine.requests.running
    assert ("h-0" in engine.drafter_manager.utility.resting) == bool(known)


def test_heads_become_active_and_inactive() -> None:
    engine = headed(TOY, Oracle(TEXT, 1), Oracle(TEXT, 3), chooser=reference_sample)
    for names, brought in (
        (frozenset({"h-0"}), {"h-0"}),
        (frozenset(), set()),
        (None, {"h-0", "h-1"}),
        (frozenset({"h-1"}), {"h-1"}),
    ):
        engine.handle(SetScheduler(Fixed(8), names))
        (found,) = Lockstep(engine).run(asking(PROMPT))
        assert found.tokens == tuple(TEXT[len(PROMPT) : len(PROMPT) + 24])
        assert set(found.stats.by_drafter) == brought


def test_two_heads_with_branches_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="two heads need branch rows"):
        headed(TOY, Branched(TEXT, 1), Branched(TEXT, 1))


def test_where_the_way_likely_ends() -> None:
    """Root 1 - 0.9 = 0.1; its child 0.9 - 0.45 - 0.27 = 0.18; their children 0.45, 0.27."""
    tree = TokenTree(text_key([1]), 1, 10, 10)
    tree.add(0, 5, float(np.log(0.9)))
    tree.add(1, 6, float(np.log(0.5)))
    tree.add(1, 7, float(np.log(0.3)))
    assert rows_by_end_probability(tree, [1, 2, 3]) == [2, 3, 1, 0]
    assert rows_by_end_probability(tree, []) == [0]


def test_draft_nodes_name_their_parents() -> None:
    session = Session(
        asking(PROMPT),
        24,
        100,
        Engine(
            TOY, Verifier(reference_sample, NOBODY), Fixed(1), lambda: 0.0
        ).requests.calibrations.bucket(0.0),
    )
    draft = make_draft(
        session,
        DraftNodes(np.array([0, 1, 0]), np.array([5, 6, 7]), np.array([-0.1, -0.2, -0.3]), roots=1),
        "h-0",
    )
    assert draft.parents.tolist() == [text_key(PROMPT), text_key([*PROMPT, 5]), text_key(PROMPT)]
    assert session.merge_drafts(draft) == 3
