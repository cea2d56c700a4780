"""The planner measures heads and model-free drafters and simulates their effect."""

import importlib
import sys
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest

from actors import cli
from actors.cli.commands.measure_guesses import NO_GUESS_LOGPROB, measure_drafter, measure_head
from runtime.config import ScheduleConfig
from runtime.core.draft_nodes import NO_NODES, DraftNodes, stack
from runtime.core.sampling_params import SamplingParams
from runtime.drafters.base import ExpandRequest
from runtime.drafters.ngram import NgramDrafter
from runtime.heads.eagle_head import EagleHead
from runtime.models.loader import load_model
from runtime.scoring.calibration import Calibrations
from runtime.sim import draft_samples, sweep
from runtime.sim.forecast import Setting, forecast
from runtime.sim.pair_profile import PairProfile
from runtime.sim.replayed_head import HeadProfile, head_step
from tests.support.eagles import drafter, greedy_texts, tiny, trained

T = 0.03
PERFECT = HeadProfile("perfect", 0.0, (((0, (-0.001,)), (0, (-0.001,))),))
WRONG = HeadProfile("wrong", 0.0, (((-1, (-0.5,)),),))
SILENT_HEAD = HeadProfile("silent", 0.0, ((),))


def tokens_per_second(head: HeadProfile | None, drafters: int = 0) -> float:
    pair = PairProfile(target={1: T}, draft={1: 0.002}, acceptance={1: 0.5, 4: 0.7})
    return forecast(
        pair, ScheduleConfig(), Setting(drafters=drafters, tokens=90, head=head)
    ).tokens_per_second


def test_two_places_that_are_always_right_make_three_tokens_a_step() -> None:
    assert tokens_per_second(PERFECT) == pytest.approx(3 / T, rel=0.05)


def test_what_it_costs_is_time_of_every_step() -> None:
    assert tokens_per_second(HeadProfile("dear", 0.01, PERFECT.steps)) == pytest.approx(
        3 / (T + 0.01), rel=0.05
    )


@pytest.mark.parametrize("head", [WRONG, SILENT_HEAD, None])
def test_nothing_right_is_plain_decoding(head: HeadProfile | None) -> None:
    assert tokens_per_second(head) == pytest.approx(1 / T, rel=0.02)


def test_beside_a_drafter_it_fills_what_that_has_not_guessed() -> None:
    assert tokens_per_second(PERFECT, drafters=1) > tokens_per_second(None, drafters=1)


def test_the_way_that_the_target_took_through_a_growth() -> None:
    """The target takes 7 of the root's children 7 and 5, then 8, then an unguessed token."""
    growth = DraftNodes(
        np.array([0, 0, 1, 1, 4]),
        np.array([7, 5, 9, 8, 1]),
        np.log([0.3, 0.6, 0.2, 0.5, 0.9]),
        roots=1,
    )
    found = head_step(growth, [7, 8, 2, 1])
    assert [rank for rank, _ in found] == [1, 0, -1]
    assert [np.exp(scores).tolist() for _, scores in found] == [
        pytest.approx([0.6, 0.3]),
        pytest.approx([0.5, 0.2]),
        pytest.approx([0.9]),
    ]
    assert head_step(growth, [7]) == head_step(growth, [7, 8])[:1]
    assert head_step(NO_NODES, [7, 8]) == ()


def test_how_often_its_best_guesses_are_right() -> None:
    figures = HeadProfile(
        "a", 0.0, (((0, (-0.1,)), (1, (-0.1, -2.0))), ((0, (-0.1,)), (0, (-0.1,))), ())
    )
    assert [figures.hit_rate(ahead) for ahead in (1, 2, 3)] == pytest.approx([2 / 3, 1 / 3, 0.0])
    known = Calibrations()
    figures.calibrate(known)
    assert (
        known.bucket(0.0).table("a-0").tries.sum(),
        known.bucket(0.0).table("a-0").hits.sum(),
    ) == (5, 4)


def test_a_drafter_without_a_model_is_asked_place_by_place() -> None:
    seconds, places = measure_drafter(
        NgramDrafter(), [((1, 2, 3, 1, 2), (3, 1, 9))], SamplingParams()
    )
    assert all(took > 0 for took in seconds.values())
    assert sorted(seconds) == [1, 4, 16]
    assert [place.rank for place in places] == [0, 0, None]
    assert measure_drafter(NgramDrafter(), [((1, 2), (3,))], SamplingParams())[1][0].scores == (
        NO_GUESS_LOGPROB,
    )


def test_what_reads_features_is_measured_with_the_targets() -> None:
    found = tiny(16)
    texts = greedy_texts(found, 6, 28)
    known, model = trained(found, texts), load_model(str(found.target))
    answers = [(text[:12], text[12:24]) for text in texts.tolist()[:2]]
    _, places = measure_drafter(drafter(known), answers, SamplingParams(), model)
    assert [place.rank for place in places].count(0) >= 20
    head = measure_head("eagle-head", EagleHead(drafter(known)), model, answers, SamplingParams())
    assert head.hit_rate(1) > 0.8


@pytest.mark.slow
def test_the_command_takes_all_kinds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "DRAFTERS", (1,))
    monkeypatch.setattr(sweep, "ROUND_TRIPS", (0.0,))
    monkeypatch.setattr(sweep, "SESSIONS", (1,))
    monkeypatch.setattr(
        sys.modules["actors.cli.commands.plan"], "Setting", partial(Setting, tokens=40)
    )
    monkeypatch.setattr(importlib.import_module("actors.cli.commands.measure"), "MAX_TOKENS", 12)
    drafts = [
        option
        for name in ("ngram", "layer-skip", "s3d", "token-recycling", "medusa", "hidden-transfer")
        for option in ("--draft", name)
    ]
    monkeypatch.setattr(
        sys, "argv", ["outrider", "plan", *drafts, "--schedule", "plain", "--schedule", "living"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    for name in (
        "ngram",
        "layer-skip",
        "s3d",
        "token-recycling",
        "medusa",
        "hidden-transfer",
        "heads on the target",
        "Head: ",
    ):
        assert name in said


class Chain:
    """A drafter that guesses three places in each pass: the first two right."""

    feature_spec = None

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes]:
        return [self.guess(len(request.text.tokens)) for request in requests]

    def guess(self, place: int) -> DraftNodes:
        def level(tokens: list[int], parent: int) -> DraftNodes:
            scores = np.asarray([-0.1, -3.0][: len(tokens)], np.float32)
            return DraftNodes(
                np.full(len(tokens), parent, np.int32), np.asarray(tokens, np.int32), scores
            )

        return stack([level([place, 99], 0), level([98, place + 1], 0), level([97], 1)], 1)

    def close(self, session: str) -> None:
        pass


def test_a_drafter_that_guesses_several_places_in_a_pass() -> None:
    """The second guess at the second place is right; the third place hangs on it and is unseen."""
    prompt, answer = tuple(range(4)), (4, 5, 6)
    _, places = measure_drafter(Chain(), [(prompt, answer)], SamplingParams())
    assert [place.rank for place in places] == [0, 0, 0]
    assert [[below.rank for below in place.below] for place in places] == [[1], [1], [None]]
    assert len(places[0].below[0].scores) == 2
    known = draft_samples.samples_of(
        PairProfile(target={1: 0.03}, draft={1: 0.002}, positions=places)
    )
    assert known.behind(0) == ((1, places[0].below[0].scores),)
    taught = known.calibrations("a", 2).bucket(0.0).table("a")
    assert taught.tries.sum() == 3 * 2 + 3 * 2  # each pass was judged at both of its places


def test_several_places_in_a_pass_are_worth_several_passes() -> None:
    """A pass takes as long as a step, so places behind a guess make the tree deep."""
    one = {"rank": 0, "scores": [-0.001]}
    pair = {"target": {1: 0.03}, "draft": {1: 0.03}, "rtt": 0.0}
    found = [
        forecast(
            PairProfile.model_validate({**pair, "positions": [{**one, "below": [one] * below}]}),
            ScheduleConfig(),
            Setting(tokens=150),
        )
        for below in (0, 3)
    ]
    assert found[1].tokens_per_second > 1.5 * found[0].tokens_per_second
    wrong = {"rank": None, "scores": [-0.001]}
    useless = PairProfile.model_validate({**pair, "positions": [{**one, "below": [wrong] * 3}]})
    assert (
        forecast(useless, ScheduleConfig(), Setting(tokens=150)).tokens_per_second
        < 1.1 * found[0].tokens_per_second
    )
