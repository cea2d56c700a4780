"""A share for those who bring something."""

import numpy as np

from runtime.core.node_keys import text_key
from runtime.core.tree import TokenTree
from runtime.scoring.drafter_utility import REST_COMMITS, TRIAL_COMMITS, DrafterUtility
from runtime.target.drafter_manager import DrafterManager
from runtime.telemetry.metrics import TargetMetrics


def after(utility: DrafterUtility, commits: int, guessed: list[str]) -> list[int]:
    """The commits, counted from 1, at which shares changed."""
    return [n for n in range(1, commits + 1) if utility.observe(["a", "b"], guessed)]


def test_who_brings_nothing_rests_and_is_tried_again() -> None:
    utility = DrafterUtility()
    assert after(utility, TRIAL_COMMITS - 1, ["a", "", "a"]) == []
    assert utility.active(["a", "b"]) == ["a", "b"]
    assert after(utility, 1, ["a", ""]) == [1]
    assert utility.active(["a", "b"]) == ["a"]
    assert after(utility, REST_COMMITS, ["a", ""]) == [REST_COMMITS]
    assert utility.active(["a", "b"]) == ["a", "b"]
    assert after(utility, TRIAL_COMMITS, ["a", ""]) == [TRIAL_COMMITS]
    assert utility.active(["a", "b"]) == ["a"]


def test_one_token_in_a_hundred_commits_is_worth_a_share() -> None:
    utility = DrafterUtility()
    for _ in range(5):
        after(utility, TRIAL_COMMITS - 1, ["a", ""])
        assert after(utility, 1, ["b", ""]) == []
    assert utility.active(["a", "b"]) == ["a", "b"]


def test_all_may_rest_and_a_newcomer_does_not_inherit_that() -> None:
    utility = DrafterUtility()
    assert after(utility, TRIAL_COMMITS, [""]) == [TRIAL_COMMITS]
    assert utility.active(["a", "b"]) == []
    utility.forget("b")
    assert utility.active(["a", "b"]) == ["b"]
    utility.forget("never seen")


def test_one_that_comes_back_under_its_name_has_a_trial_of_its_own() -> None:
    """It inherits neither the commits nor the tokens nor the costs of the one before."""
    utility = DrafterUtility()
    after(utility, TRIAL_COMMITS - 1, ["a", ""])
    utility.forget("a")
    assert after(utility, TRIAL_COMMITS - 1, [""]) == [1]  # the end of b's trial
    assert utility.active(["a"]) == ["a"]
    assert after(utility, 1, [""]) == [1]
    assert utility.active(["a"]) == []
    utility.charge({"a"}, 1e9)
    utility.forget("a")
    for _ in range(TRIAL_COMMITS):
        utility.observe(["a"], ["a", ""], rate=1.0)
    assert utility.active(["a"]) == ["a"]


def test_a_head_must_bring_more_than_its_time_is_worth() -> None:
    """It is right of one token in each step, which takes as long as two others."""
    for price, rests in ((0.5, False), (2.0, True)):
        utility = DrafterUtility()
        for _ in range(TRIAL_COMMITS):
            utility.charge(["h-0"], price)
            utility.observe(["h-0"], ["h-0", ""], rate=1.0)
        assert (utility.resting == {"h-0"}) is rests


def test_what_a_drafter_has_guessed_as_well_is_not_owed_to_a_head() -> None:
    """Has 5 by both, the head first; 6 by the head; 7 by the drafter; 8 by both, drafter first."""
    tree = TokenTree(text_key([1]), 1, 10, 10)
    for name, tokens in (("h-0", [5, 6]), ("d-0", [5, 7, 8]), ("h-0", [8]), ("h-1", [6])):
        parents, raw_logprob = (
            np.full(len(tokens), tree.key[0], dtype=np.uint64),
            np.full(len(tokens), -1.0),
        )
        tree.merge(
            parents, np.array(tokens), raw_logprob, name, lambda ranks, raw_logprob: raw_logprob
        )
    nodes = [tree.descend([token]) or 0 for token in (5, 6, 7, 8)]
    assert DrafterManager(TargetMetrics(), DrafterUtility(), ["h-0", "h-1"]).credited_to(
        tree, nodes
    ) == [
        "d-0",
        "h-0",
        "d-0",
        "d-0",
    ]
