"""A share for those who bring something."""

from runtime.merit import REST, TRIAL, Merit


def after(merit: Merit, commits: int, guessed: list[str]) -> list[int]:
    """The commits, counted from 1, at which shares changed."""
    return [n for n in range(1, commits + 1) if merit.observe(["a", "b"], guessed)]


def test_who_brings_nothing_rests_and_is_tried_again() -> None:
    merit = Merit()
    assert after(merit, TRIAL - 1, ["a", "", "a"]) == []
    assert merit.sharers(["a", "b"]) == ["a", "b"]
    assert after(merit, 1, ["a", ""]) == [1]
    assert merit.sharers(["a", "b"]) == ["a"]
    assert after(merit, REST, ["a", ""]) == [REST]
    assert merit.sharers(["a", "b"]) == ["a", "b"]
    assert after(merit, TRIAL, ["a", ""]) == [TRIAL]
    assert merit.sharers(["a", "b"]) == ["a"]


def test_one_token_in_a_hundred_commits_is_worth_a_share() -> None:
    merit = Merit()
    for _ in range(5):
        after(merit, TRIAL - 1, ["a", ""])
        assert after(merit, 1, ["b", ""]) == []
    assert merit.sharers(["a", "b"]) == ["a", "b"]


def test_all_may_rest_and_a_newcomer_does_not_inherit_that() -> None:
    merit = Merit()
    assert after(merit, TRIAL, [""]) == [TRIAL]
    assert merit.sharers(["a", "b"]) == []
    merit.forget("b")
    assert merit.sharers(["a", "b"]) == ["b"]
    merit.forget("never seen")
