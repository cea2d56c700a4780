"""One generation without I/O: what a draft can do to it, and what it cannot."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core import limits
from runtime.core.accepted_path import AcceptedPath
from runtime.core.messages import Commit, Draft, Request, Share
from runtime.core.node_keys import mix64, text_key
from runtime.core.sampling_params import SamplingParams
from runtime.scoring.calibration import TemperatureBucket
from runtime.target.session import Session
from tests.support.harness import score_of

PROMPT = (3, 1, 4)
ROOT = text_key(PROMPT)
V = 8

Node = tuple[tuple[int, ...], int]  # path of the parent, token


def session(
    max_tokens: int = 20, context: int = 100, committed: tuple[int, ...] = (), epoch: int = 0
) -> Session:
    request = Request(
        "s", PROMPT, SamplingParams(max_tokens=max_tokens), committed=committed, epoch=epoch
    )
    return Session(request, V, context, TemperatureBucket())


def draft(
    *nodes: Node,
    scores: list[float] | None = None,
    root: int = ROOT,
    epoch: int = 0,
    drafter: str = "d",
) -> Draft:
    parents = np.array([text_key(path, root) for path, _ in nodes], np.uint64)
    tokens = np.array([token for _, token in nodes], np.int32)
    return Draft(
        "s",
        epoch,
        drafter,
        parents,
        tokens,
        np.array([-0.5] * len(nodes) if scores is None else scores, np.float32),
    )


def paths(of: Session) -> set[tuple[int, ...]]:
    return {tuple(of.tree.tokens_to(node)) for node in range(1, len(of.tree))}


@given(
    st.lists(
        st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8
    ),
    st.lists(st.integers(0, 100), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_merging_needs_no_order_and_bears_repetition(
    leaves: list[tuple[int, ...]], cuts: list[int], random: object
) -> None:
    """Drafts of paths in any order, some repeated, make the same tree as one draft."""
    nodes = sorted({leaf[:n] for leaf in leaves for n in range(1, len(leaf) + 1)}, key=len)
    whole, parts = session(), session()
    added = whole.merge_drafts(draft(*((path[:-1], path[-1]) for path in nodes)))
    messages = [draft(*((leaf[:n], leaf[n]) for n in range(len(leaf)))) for leaf in leaves]
    messages += [messages[cut % len(messages)] for cut in cuts]
    random.shuffle(messages)  # type: ignore[attr-defined]
    assert sum(parts.merge_drafts(message) for message in messages) == added == len(nodes)
    assert paths(parts) == paths(whole) == set(nodes)
    assert parts.drafted == whole.drafted == added
    assert set(parts.ignored) == {"repeated"}
    assert whole.ignored == Counter()


def between(*scores: float) -> float:
    """Of the mean of these log odds."""
    odds = [math.log(math.exp(score) / (1.0 - math.exp(score))) for score in scores]
    return -math.log1p(math.exp(-sum(odds) / len(odds)))


def test_growth_is_kept_with_what_the_drafter_said_and_its_calibrated_score() -> None:
    of = session()
    of.bucket.table("a").observe(0, -0.5, False)
    assert of.merge_drafts(draft(((), 5), ((5,), 6), drafter="a")) == 2
    tree = of.tree
    assert tree.score[1] == score_of(of.bucket.table("a"), 0, -0.5) < -0.5
    assert of.merge_drafts(draft(((), 5), ((), 7), scores=[-0.125, -2.0], drafter="b")) == 1
    assert tree.raw_logprob.tolist() == [0.0, -0.5, -0.5, -2.0]
    assert tree.rank.tolist() == [0, 0, 0, 1]
    assert tree.drafter == ["", "a", "a", "b"]
    assert tree.score[3] == pytest.approx(score_of(of.bucket.table("b"), 1, -2.0))
    both = [score_of(of.bucket.table("a"), 0, -0.5), score_of(of.bucket.table("b"), 0, -0.125)]
    assert tree.score[1] == pytest.approx(
        between(*both)
    )  # of two that guess the same, neither is believed alone
    assert both[0] < tree.score[1] < both[1]
    assert of.merge_drafts(draft(((), 5), scores=[-3.0], drafter="c")) == 0
    assert tree.score[1] == pytest.approx(between(*both, score_of(of.bucket.table("c"), 0, -3.0)))
    assert tree.path[2] == tree.score[1] + tree.score[2]
    of.bucket.table("d").observe(0, -0.0625, False)
    assert of.merge_drafts(draft(((), 4), ((), 7), scores=[-0.0625, -0.0625], drafter="d")) == 1
    second = score_of(
        of.bucket.table("d"), 1, -0.0625
    )  # its second guess for that place, whoever guessed the first
    assert tree.score[3] == pytest.approx(between(score_of(of.bucket.table("b"), 1, -2.0), second))


@pytest.mark.parametrize(
    ("message", "why", "count"),
    [
        (draft(((), 5), epoch=1), "stale", 1),
        (draft(((7,), 5)), "stale", 1),
        (draft(((), 5), root=ROOT ^ 1), "stale", 1),
        (draft(((), V)), "invalid", 1),
        (draft(((), -1)), "invalid", 1),
        (draft(((), 5), scores=[0.01]), "invalid", 1),
        (draft(((), 5), scores=[math.nan]), "invalid", 1),
        (draft(((), 5), scores=[math.inf]), "invalid", 1),
        (draft(*[((), 5)] * (limits.DRAFT_NODES + 1)), "oversize", limits.DRAFT_NODES + 1),
        (draft(), "", 0),
    ],
)
def test_what_makes_no_sense_changes_nothing_and_is_counted(
    message: Draft, why: str, count: int
) -> None:
    of = session()
    assert of.merge_drafts(message) == 0
    assert paths(of) == set()
    assert +of.ignored == Counter({why: count} if count else {})
    assert of.merge_drafts(draft(((), 5))) == 1


def test_an_impossible_guess_is_worth_little_but_breaks_nothing() -> None:
    of = session()
    assert of.merge_drafts(draft(((), 5), scores=[-math.inf])) == 1
    assert of.marginal_gains()[0].tolist() == [pytest.approx(1e-6)]


def test_the_mirror_is_bounded_in_nodes_and_depth() -> None:
    of = Session(
        Request("s", PROMPT, SamplingParams(max_tokens=10**6)), 10**6, 10**7, TemperatureBucket()
    )
    deep = (1,) * (limits.TREE_DEPTH + 5)
    assert of.merge_drafts(draft(*((deep[:n], 1) for n in range(len(deep))))) == limits.TREE_DEPTH
    assert of.ignored == Counter({"full": 1, "stale": 4})
    for start in range(2, limits.TREE_NODES + limits.DRAFT_NODES, limits.DRAFT_NODES):
        of.merge_drafts(draft(*(((), start + n) for n in range(limits.DRAFT_NODES))))
    assert len(of.tree) == limits.TREE_NODES + 1
    assert of.drafted == limits.TREE_NODES


def test_rows_are_the_best_nodes_whose_tokens_could_be_delivered() -> None:
    of = session(max_tokens=3)
    of.merge_drafts(
        draft(((), 5), ((5,), 6), ((5, 6), 7), ((), 2), scores=[-0.1, -0.1, -0.1, -3.0])
    )
    gains, leaves, depth = of.marginal_gains()
    assert gains.tolist() == pytest.approx([math.exp(-0.1), math.exp(-0.2), math.exp(-3.0)])
    assert leaves.tolist() == pytest.approx(
        [math.exp(-3.0)]
    )  # the deepest node is beyond the end, and so no leaf to speak of
    assert depth == 2
    assert of.select(1) == [1]
    assert of.select(2) == [1, 2]
    assert of.select(9) == [1, 2, 4]
    assert of.paths(of.select(9)) == [[], [5], [5, 6], [2]]


@pytest.mark.parametrize(
    ("max_tokens", "context", "deepest"), [(1, 100, 0), (2, 100, 1), (50, 6, 2), (50, 4, 0)]
)
def test_nothing_is_verified_beyond_the_end(max_tokens: int, context: int, deepest: int) -> None:
    of = session(max_tokens, context)
    of.merge_drafts(draft(((), 5), ((5,), 5), ((5, 5), 5)))
    assert len(of.marginal_gains()[0]) == len(of.select(9)) == deepest


def test_what_a_tree_is_worth() -> None:
    of = session()
    gains, leaves, depth = of.marginal_gains()
    assert (gains.tolist(), leaves.tolist(), depth) == ([], [1.0], 0)
    of.merge_drafts(draft(((), 5), ((), 6), ((5,), 7), scores=[-0.5, -1.0, -0.25]))
    gains, leaves, depth = of.marginal_gains()
    assert gains.tolist() == pytest.approx([math.exp(-0.5), math.exp(-0.75), math.exp(-1.0)])
    assert leaves.tolist() == pytest.approx([math.exp(-0.75), math.exp(-1.0)])
    assert depth == 2


def test_a_verdict_moves_the_root_and_says_so() -> None:
    of = session(epoch=4)
    of.merge_drafts(draft(((), 5), ((5,), 6), ((5, 6), 2), ((), 7), epoch=4))
    commit, hit = of.apply(AcceptedPath((1, 2), 2))
    assert (commit, hit) == (Commit("s", 4, 3, (5, 6, 2), text_key([3, 1, 4, 5, 6, 2])), True)
    assert of.tokens == [3, 1, 4, 5, 6, 2]
    assert paths(of) == set()
    commit, hit = of.apply(AcceptedPath((), 1))
    assert (commit, hit) == (Commit("s", 4, 6, (1,), mix64(text_key([3, 1, 4, 5, 6, 2]), 1)), False)


def test_growth_below_the_new_root_survives_and_late_growth_still_fits() -> None:
    of = session()
    of.merge_drafts(draft(((), 5), ((5,), 6), ((), 7)))
    of.apply(AcceptedPath((), 5))
    assert paths(of) == {(6,)}
    assert of.merge_drafts(draft(((), 7), ((5,), 4), ((5, 6), 3), ((7,), 1))) == 2
    assert paths(of) == {(6,), (4,), (6, 3)}
    assert of.ignored == Counter({"late": 1, "stale": 1})


def test_calibration_learns_from_verdicts() -> None:
    of = session()
    of.merge_drafts(draft(((), 5), ((), 6)))
    of.apply(AcceptedPath((), 6))
    assert score_of(of.bucket.table("d"), 0, -0.5) < -0.5 < score_of(of.bucket.table("d"), 1, -0.5)


def test_who_joins_late_learns_the_whole_text() -> None:
    of = session(committed=(1, 5), epoch=2)
    of.apply(AcceptedPath((), 7))
    opened = of.open(Share("s", 1, 3))
    assert (opened.session, opened.epoch, opened.tokens, opened.prompt) == (
        "s",
        2,
        (3, 1, 4, 1, 5, 7),
        3,
    )
    assert opened.share == Share("s", 1, 3)
    assert of.end == 3 + 20


def test_a_text_that_is_guessed_better_than_scored_is_worth_more_and_the_other_way_round() -> None:
    easy, hard = session(max_tokens=400, context=1000), session(max_tokens=400, context=1000)
    for of, accuracy in ((easy, True), (hard, False)):
        assert of.confidence_scale == 1.0
        for _ in range(200):
            of.bucket = TemperatureBucket()  # scores as the drafter says them
            of.merge_drafts(draft(((), 5), ((), 6), scores=[-0.5, -2.0], root=of.tree.key[0]))
            of.apply(AcceptedPath((), 5 if accuracy else 6))
        of.bucket = TemperatureBucket()
        of.merge_drafts(draft(((), 5), ((5,), 6), scores=[-0.5, -0.5], root=of.tree.key[0]))
    assert easy.confidence_scale < 1.0 < hard.confidence_scale
    assert easy.marginal_gains()[0][1] > math.exp(-1.0) > hard.marginal_gains()[0][1]
    assert easy.select(1) == hard.select(1) == [1]


def test_without_guesses_nothing_is_known_of_a_text() -> None:
    of = session()
    for _ in range(9):
        of.apply(AcceptedPath((), 1))
    assert of.confidence_scale == 1.0


def test_where_first_guesses_are_right_more_often_others_are_worth_less() -> None:
    session = Session(
        Request("s", (1, 2), SamplingParams(max_tokens=20)), 64, 100, TemperatureBucket()
    )
    for token, score in ((5, math.log(0.8)), (6, math.log(0.15))):
        session.tree.add(0, token, score)
    session.tree.add(2, 7, math.log(0.8))  # below the second
    neutral = session.values()
    np.testing.assert_allclose(np.exp(neutral), [1.0, 0.8, 0.15, 0.12])
    session.accuracy = 0.95  # of those that were scored 0.8
    first, second, below = np.exp(session.values())[1:]
    assert first > 0.9
    assert second == pytest.approx(0.15 * (1 - 0.95) / (1 - 0.8))
    assert below == pytest.approx(second * first)
    session.accuracy = 0.5
    harder = np.exp(session.values())
    assert harder[1] < 0.8
    assert harder[2] == pytest.approx(0.15), "no node is worth more than its parent"


@pytest.mark.parametrize(
    ("asked", "most"), [(None, limits.STEP_ROWS), (3, 3), (1000, limits.STEP_ROWS)]
)
def test_a_step_has_no_more_rows_than_its_request_and_the_limit_allow(
    asked: int | None, most: int
) -> None:
    request = Request("s", PROMPT, SamplingParams(max_tokens=20), max_rows=asked)
    of = Session(request, 1000, 100, TemperatureBucket())
    of.merge_drafts(draft(*(((), token) for token in range(100))))
    assert len(of.select(1000)) == len(of.marginal_gains()[0]) == most
    assert of.select(2) == [1, 2]


def test_nodes_without_effect_add_up_over_all_drafts() -> None:
    of = session()
    for _ in range(3):
        of.merge_drafts(draft(((), 5), ((7,), 5)))
        of.merge_drafts(draft(((), 5), ((), 6), epoch=1))
    assert of.ignored == Counter({"repeated": 2, "stale": 3 + 6})


def test_guesses_below_a_text_that_was_passed_long_ago_are_stale() -> None:
    """A session remembers no more of its former roots than the deepest tree has tokens."""
    of = session(max_tokens=400, context=1000)
    for _ in range(limits.TREE_DEPTH + 1):
        of.apply(AcceptedPath((), 1))
    of.merge_drafts(draft(((1,), 5), ((), 5)))
    assert of.ignored == Counter({"late": 1, "stale": 1})
    assert len(of.passed_keys) == limits.TREE_DEPTH
