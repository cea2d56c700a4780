"""A draft engine hands features to its method in order, and waits for them without being busy."""

from collections.abc import Sequence

import numpy as np
import pytest

from runtime.core import limits
from runtime.core.draft_nodes import DraftNodes
from runtime.core.features import FeatureRows, FeatureSpec
from runtime.core.messages import Features, Reply, Resync
from runtime.draft.commands import EventReceived
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.base import ExpandRequest
from tests.support.draft_engine import PROMPT, TEXT, V, commit, opened
from tests.support.harness import Known

WIDTH = 4  # of two layers


class Needing(Known):
    """Has no answer before it has the features of all tokens but the last."""

    def __init__(self) -> None:
        super().__init__(TEXT, V)
        self.asked: list[tuple[int, int, int]] = []  # tokens, start and end of the features

    @property
    def feature_spec(self) -> FeatureSpec:  # type: ignore[override]
        return FeatureSpec((0, 3))

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes | None]:  # type: ignore[override]
        return [self.look(request) for request in requests]

    def look(self, request: ExpandRequest) -> DraftNodes | None:
        text, found = request.text, request.text.features
        start, end = (0, 0) if found is None else (found.start, found.end)
        self.asked.append((len(text.tokens), start, end))
        if found is not None:
            assert (found.rows == np.arange(start, end)[:, None]).all()
        return self.guess(text, request.leaves) if end == len(text.tokens) - 1 else None


class Bench:
    def __init__(self, drafter: Known | None = None) -> None:
        self.drafter = Needing()
        self.sent: list[Reply] = []
        self.engine = DraftEngine(drafter or self.drafter, "d", 1)

    def hear(self, *events: object) -> None:
        for event in events:
            self.engine.inbox.put(EventReceived(0, event, self.sent.append))  # type: ignore[arg-type]
        assert self.engine.receive(block=False)


def features(start: int, end: int, epoch: int = 0, width: int = WIDTH) -> Features:
    """Rows that show their position."""
    rows = np.repeat(np.arange(start, end).astype(np.uint16)[:, None], width, axis=1)
    return Features("s", epoch, FeatureRows(start, rows))


def test_a_method_without_an_answer_is_asked_again_when_features_arrive() -> None:
    bench = Bench()
    bench.hear(opened())
    assert bench.engine.step()
    assert not bench.engine.step(), "nothing has arrived: the thread sleeps"
    bench.hear(features(0, 2))
    assert bench.engine.step()
    assert not bench.engine.step()
    bench.hear(features(2, 4))
    assert bench.engine.step()
    assert bench.engine.step()
    assert bench.drafter.asked == [(5, 0, 0), (5, 0, 2), (5, 0, 4), (5, 0, 4)]
    assert bench.engine.nodes > 0


def test_a_method_that_is_still_reading_is_asked_at_once() -> None:
    """All features are there, so None means that it has not read them yet."""
    bench = Bench()
    bench.hear(opened(), features(0, 4))
    bench.drafter.guess = lambda text, leaves: None  # type: ignore[assignment,method-assign,return-value]
    assert all(bench.engine.step() for _ in range(3))


def test_features_of_the_next_commit_are_shown_after_it() -> None:
    bench = Bench()
    bench.hear(opened(), features(0, 4), features(4, 7))
    bench.engine.step()
    bench.hear(commit(5, 3))
    bench.engine.step()
    assert bench.drafter.asked == [(5, 0, 4), (8, 0, 7)]


def test_repeated_rows_change_nothing() -> None:
    bench = Bench()
    bench.hear(opened(), features(0, 3), features(1, 4), features(0, 2))
    bench.engine.step()
    assert bench.drafter.asked == [(5, 0, 4)]
    assert bench.engine.counters == {}


def test_features_may_begin_later_than_the_text() -> None:
    bench = Bench()
    bench.hear(opened(), features(2, 4))
    bench.engine.step()
    assert bench.drafter.asked == [(5, 2, 4)]


def test_a_gap_is_asked_for_once() -> None:
    bench = Bench()
    bench.hear(opened(), features(0, 2), features(3, 4), features(4, 5))
    assert bench.sent == [Resync("s", "d")]
    assert bench.engine.counters == {"resync": 1, "stale features": 1}
    assert not bench.engine.step()
    bench.hear(opened(epoch=0), features(0, 4))
    assert bench.engine.step()
    assert bench.drafter.asked == [(5, 0, 4)]


def test_features_of_an_earlier_epoch_are_dropped() -> None:
    bench = Bench()
    bench.hear(opened(), features(0, 4), opened(epoch=2), features(0, 4, epoch=0))
    bench.engine.step()
    assert bench.drafter.asked == [(5, 0, 0)]
    assert bench.engine.counters == {"stale features": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        features(0, 4, width=3),  # no multiple of two layers
        features(0, 4, width=8),  # after rows of 4
        features(0, len(PROMPT) + limits.TREE_DEPTH + 1),
        features(2**31, 2**31 + 1),
    ],
)
def test_features_of_a_wrong_size_are_refused(wrong: Features) -> None:
    bench = Bench()
    bench.hear(opened(), features(0, 1), wrong)
    bench.engine.step()
    assert bench.drafter.asked == [(5, 0, 1)]
    assert bench.engine.counters == {"refused features": 1}
    assert bench.sent == []


def test_a_method_that_asked_for_none_gets_none() -> None:
    bench = Bench(Known(TEXT, V))
    bench.hear(opened(), features(0, 4))
    assert bench.engine.states["0/s"].features is None
    assert bench.engine.counters == {"refused features": 1}
    assert bench.engine.step()


def test_features_of_an_unknown_session_are_counted() -> None:
    bench = Bench()
    bench.hear(features(0, 4))
    assert bench.engine.counters == {"unknown session": 1}
