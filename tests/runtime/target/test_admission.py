"""First come, first served, and never more than there is memory for."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.messages import Request
from runtime.core.sampling_params import SamplingParams
from runtime.target.admission import Admission, slots_needed
from runtime.target.commands import AddRequest
from tests.support.harness import lettering

CONTEXT = 1000


def admit(name: str, tokens: int) -> AddRequest:
    request = Request(name, (1,), SamplingParams(max_tokens=tokens))
    return AddRequest(request, lettering()(request), lambda chunk: None)


def test_the_longest_text_and_a_step_are_reserved() -> None:
    assert slots_needed(admit("s", 20).request, CONTEXT) == 21 + limits.STEP_ROWS
    assert slots_needed(admit("s", 5000).request, CONTEXT) == CONTEXT + limits.STEP_ROWS


def test_the_first_that_waits_is_not_overtaken() -> None:
    admission = Admission(3 * (10 + limits.STEP_ROWS))
    for name, tokens in (("a", 9), ("b", 100), ("c", 9)):
        admission.waiting.append(admit(name, tokens))
    first = admission.next(0, CONTEXT)
    assert first is not None
    assert first[0].request.session == "a"
    assert admission.next(1, CONTEXT) is None  # b does not fit beside a
    assert [waiting.request.session for waiting in admission.waiting] == ["b", "c"]
    admission.release(first[1])
    second = admission.next(0, CONTEXT)
    assert second is not None
    assert second[0].request.session == "b"


def test_only_so_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SESSIONS", 2)
    admission = Admission(10**6)
    admission.waiting.append(admit("a", 9))
    assert admission.next(2, CONTEXT) is None
    assert admission.next(1, CONTEXT) is not None
    assert admission.next(1, CONTEXT) is None


def test_what_would_never_fit_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        InvalidRequest,
        match="need 265 slots of KV memory, the target has 200: lower max_tokens, or raise",
    ):
        Admission(200).check(admit("s", 200).request, CONTEXT)
    Admission(265).check(admit("s", 200).request, CONTEXT)


def test_a_waiting_request_can_be_withdrawn() -> None:
    admission = Admission(1000)
    admission.waiting.extend([admit("a", 9), admit("b", 9)])
    found = admission.withdraw("a")
    assert found is not None
    assert found.request.session == "a"
    assert admission.withdraw("a") is None
    assert len(admission.waiting) == 1


@given(st.lists(st.one_of(st.integers(1, 300), st.none()), max_size=60))
def test_reservations_never_exceed_the_budget_and_all_are_served(steps: list[int | None]) -> None:
    """A number: somebody asks for so many tokens. None: the oldest session ends."""
    admission, live, served = Admission(400), list[tuple[Any, int]](), 0
    asked = sum(step is not None for step in steps)
    for step in [*steps, *[None] * len(steps)]:
        if step is not None:
            admission.waiting.append(admit("s", step))
        elif live:
            admission.release(live.pop(0)[1])
        while (found := admission.next(len(live), CONTEXT)) is not None:
            live.append(found)
            served += 1
        assert admission.reserved == sum(slots for _, slots in live) <= 400
    assert served == asked


def test_features_of_a_text_take_memory_too_and_are_rounded_up() -> None:
    request = admit("s", 20).request
    assert slots_needed(request, CONTEXT, 0.5) == 21 + limits.STEP_ROWS + 11
    admission = Admission(21 + limits.STEP_ROWS)
    admission.check(request, CONTEXT)
    admission.feature_slots = 0.01
    with pytest.raises(InvalidRequest) as refused:
        admission.check(request, CONTEXT)
    assert refused.value.param == "max_tokens"
    assert f"need {22 + limits.STEP_ROWS} slots" in str(refused.value)


def test_a_request_that_features_made_too_large_begins_when_it_is_alone() -> None:
    """It was let in before a drafter asked for them, and must not wait for ever."""
    admission = Admission(100 + limits.STEP_ROWS)
    admission.waiting.extend([admit("small", 9), admit("large", 90)])
    admission.feature_slots = 1.0
    small = admission.next(0, CONTEXT)
    assert small is not None
    assert small[1] == admission.reserved == 20 + limits.STEP_ROWS
    assert admission.next(1, CONTEXT) is None
    admission.release(small[1])
    assert admission.reserved == 0
    large = admission.next(0, CONTEXT)
    assert large is not None
    assert large[0].request.session == "large"
    assert large[1] == admission.reserved == 182 + limits.STEP_ROWS > admission.budget
    assert admission.next(0, CONTEXT) is None


def test_only_the_request_of_that_name_is_withdrawn() -> None:
    admission = Admission(1000)
    admission.waiting.extend([admit("a", 9), admit("b", 9), admit("c", 9)])
    found = admission.withdraw("b")
    assert found is not None
    assert found.request.session == "b"
    assert [waiting.request.session for waiting in admission.waiting] == ["a", "c"]


def test_what_just_fits_beside_others_begins() -> None:
    each = 10 + limits.STEP_ROWS
    for budget, begins in ((2 * each, True), (2 * each - 1, False)):
        admission = Admission(budget)
        admission.waiting.extend([admit("a", 9), admit("b", 9)])
        assert admission.next(0, CONTEXT) is not None
        assert (admission.next(1, CONTEXT) is not None) == begins
