"""The planner runs the runtime on a virtual clock and meets the formulas; and its command."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.config import ScheduleConfig
from runtime.core.node_keys import mix64, text_key
from runtime.core.sampling_params import SamplingParams
from runtime.core.tree import TokenTree
from runtime.drafters.base import ExpandRequest, Text
from runtime.models.base import PassInput, Rows, causal
from runtime.schedulers.fixed import Fixed
from runtime.schedulers.sync import Sync
from runtime.sim import draft_samples, sweep
from runtime.sim.forecast import Forecast, Setting, forecast, simulate
from runtime.sim.pair_profile import PairProfile
from runtime.sim.simulator import interpolate
from runtime.sim.synthetic_models import SyntheticDrafter, SyntheticTarget, next_token
from runtime.target.request_state import RequestState
from tests.support.command import outrider

T, SMALL_T = 0.03, 0.002
RATES = {1: 0.75, 2: 0.85, 4: 0.90, 8: 0.93}
PERFECT = [{"rank": 0, "scores": [-0.001]}]
QUICK = Setting(tokens=150)


def profile(**changed: Any) -> PairProfile:
    known = {
        "target": {1: T, 16: 0.034, 64: 0.05},
        "draft": {1: SMALL_T, 16: 0.0022},
        "acceptance": RATES,
        "rtt": 0.001,
    }
    return PairProfile.model_validate({**known, **changed})


def of(policy: str, setting: Setting = QUICK, **changed: Any) -> Forecast:
    return forecast(profile(**changed), ScheduleConfig.model_validate({"policy": policy}), setting)


# The clock


@pytest.mark.parametrize("drafters", [0, 1])
def test_plain_decoding_makes_a_token_a_step(drafters: int) -> None:
    assert of("plain", Setting(tokens=50, drafters=drafters)).tokens_per_second == pytest.approx(
        1 / T, rel=0.01
    )


def test_bookkeeping_is_time_too() -> None:
    assert of(
        "plain", Setting(tokens=50, drafters=0), step=0.01
    ).tokens_per_second == pytest.approx(1 / (T + 0.01), rel=0.01)


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("rtt", [0.0, 0.004])
def test_a_perfect_chain_in_turns_takes_k_passes_a_round_trip_and_a_step(
    k: int, rtt: float
) -> None:
    pair = profile(target={1: T}, draft={1: SMALL_T}, positions=PERFECT, rtt=rtt)
    found = simulate(pair, lambda: Sync(1, 1, k, k, SMALL_T), Setting(tokens=20 * (k + 1)))
    assert found.tokens_per_round == pytest.approx(k + 1)
    assert found.tokens_per_second == pytest.approx((k + 1) / (k * SMALL_T + rtt + T), rel=0.05)


def test_who_runs_ahead_of_a_target_that_never_waits_gives_it_what_a_step_leaves_time_for() -> None:
    """A step lasts 15 passes, 3 of them lost: tokens per second come from drafter or rows."""
    pair = profile(target={1: T}, draft={1: SMALL_T}, positions=PERFECT, rtt=0.0)
    found = simulate(pair, lambda: Fixed(4), Setting(tokens=200, width=1))
    assert found.tokens_per_second == pytest.approx(5 / T, rel=0.02)
    assert found.waiting == 0.0


def test_no_scheme_beats_both_devices_together() -> None:
    found = of(
        "living", Setting(tokens=300, width=1), positions=PERFECT, target={1: T}, draft={1: SMALL_T}
    )
    assert 0.7 / SMALL_T < found.tokens_per_second <= 1.02 * (1 / SMALL_T + 1 / T)


@pytest.mark.parametrize("policy", ["sync", "amusd", "living"])
def test_distance_costs(policy: str) -> None:
    rates = [of(policy, rtt=rtt).tokens_per_second for rtt in (0.0, 0.02, 0.08)]
    assert rates[1] < 1.02 * rates[0]
    assert rates[2] < 0.95 * rates[1]


def test_a_drafter_that_is_always_wrong_costs_little() -> None:
    found = of("living", acceptance={1: 0.0, 8: 0.0})
    assert found.tokens_per_second > 0.9 / T


def test_targets_share_the_sessions_and_the_drafter() -> None:
    alone = of("plain", Setting(sessions=4, tokens=80)).tokens_per_second
    assert of(
        "plain", Setting(sessions=8, targets=2, tokens=160)
    ).tokens_per_second == pytest.approx(2 * alone, rel=0.05)
    assert (
        of("living", Setting(sessions=4, targets=2)).tokens_per_second
        > of("plain", Setting(sessions=4, targets=2)).tokens_per_second
    )


def test_a_session_that_ends_makes_room_for_the_next() -> None:
    found = of("plain", Setting(length=8, tokens=80))
    assert found.tokens_per_second == pytest.approx(1 / T, rel=0.02)


def test_the_same_twice() -> None:
    assert of("living") == of("living")


def test_beyond_what_is_measured_times_go_on_as_before() -> None:
    seconds = interpolate({1: 1.0, 4: 2.0, 8: 4.0}, more=0.5)
    assert [seconds(n) for n in (1, 2, 8, 10)] == pytest.approx([1.5, 1.5 + 1 / 3, 4.5, 5.5])
    assert interpolate({1: 1.0})(100) == 1.0


# The pair


def test_the_target_reads_its_text_through_cache_positions_and_mask() -> None:
    model, text = SyntheticTarget(), [5, 6, 7]
    cache = model.new_cache()
    assert model.forward(cache, causal(np.asarray(text), 0)).tolist() == [
        text_key(text[: n + 1]) for n in range(3)
    ]
    # A root, its child 1, that one's child 2, and the root's child 3.
    visible = np.asarray([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]], dtype=np.bool_)
    rows = Rows(np.asarray([8, 1, 2, 3]), np.asarray([3, 4, 5, 4]), 3, visible)
    (names,) = model.forward_all([PassInput(cache, rows)])
    assert names.tolist() == [text_key([*text, *path]) for path in ([8], [8, 1], [8, 1, 2], [8, 3])]
    cache.keep(4, [6])
    assert cache.keys[-1] == text_key([*text, 8, 3])


@pytest.mark.parametrize("policy", ["plain", "sync", "amusd", "pearl", "living"])
def test_the_text_is_the_same_under_every_schedule(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[list[int]] = []
    make_chunk = RequestState.make_chunk

    def listen(live: RequestState, *told: Any) -> Any:
        chunk = make_chunk(live, *told)
        texts.append(list(live.session.tokens))
        return chunk

    monkeypatch.setattr(RequestState, "make_chunk", listen)
    of(policy, Setting(tokens=60))
    text, prompt = texts[-1], 4
    assert len(text) > 60
    assert text[prompt:] == [
        next_token(text_key(text[:place])) for place in range(prompt, len(text))
    ]


@pytest.mark.parametrize(
    "rates", [RATES, {1: 0.4, 2: 0.5, 4: 0.6, 8: 0.7}, {1: 1.0}, {1: 0.0, 2: 0.0}]
)
def test_examples_made_from_rates_have_these_rates(rates: dict[int, float]) -> None:
    examples = draft_samples.samples_of(profile(acceptance=rates))
    assert {k: examples.rate(k) for k in rates} == pytest.approx(rates, abs=0.03)


def test_what_is_said_of_easy_positions_is_higher() -> None:
    examples = draft_samples.samples_of(profile())
    said = {
        right: [
            scores[0]
            for rank, scores in zip(examples.ranks, examples.scores, strict=True)
            if (rank == 0) == right
        ]
        for right in (0, 1)
    }
    assert np.mean(said[1]) > np.mean(said[0]) + 0.5


@pytest.mark.parametrize("branches", [1, 2, 4])
def test_the_draft_finds_the_targets_choice_as_often_as_the_examples_say(branches: int) -> None:
    examples = draft_samples.samples_of(profile())
    guesser, found, text = SyntheticDrafter(examples), [], [1, 2, 3, 4]
    key = text_key(text)
    for _ in range(2000):
        tree = TokenTree(key, text[-1], 16, 16)
        (children,) = guesser.expand(
            [ExpandRequest(Text("s", text, 4, SamplingParams(), tree), [0], branches)]
        )
        right = next_token(key)
        assert len(set(children.tokens.tolist())) == branches
        found.append(right in children.tokens)
        text.append(right)
        key = mix64(key, right)
    assert np.mean(found) == pytest.approx(examples.rate(branches), abs=0.03)


# What is compared


def test_the_best_setting_of_a_schedule_is_the_one_that_is_chosen() -> None:
    def run_all(jobs: Any) -> list[Forecast]:
        return [Forecast(100.0 - abs(job.config.passes - 5), 1.0, 1.0, 0.0, 0.0) for job in jobs]

    found = sweep.best_settings(profile(), ["plain", "sync chain", "pearl"], Setting(), run_all)
    assert found["sync chain"].passes == 5
    assert found["pearl"].passes == 15
    assert found["plain"].policy == "plain"


def test_fewer_drafters_that_do_nearly_as_well_are_preferred() -> None:
    assert sweep.fewest_drafters({1: 90.0, 2: 98.0, 4: 100.0, 8: 99.0}) == 2


# The command


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, again, png = tmp_path / "pair.json", tmp_path / "again.json", tmp_path / "plan.png"
    file.write_text(profile(name="small").model_dump_json(by_alias=True))
    monkeypatch.setattr(sweep, "DRAFTERS", (1, 2))
    monkeypatch.setattr(sweep, "ROUND_TRIPS", (0.0, 0.05))
    monkeypatch.setattr(sweep, "SESSIONS", (1, 4))
    monkeypatch.setattr(
        sys.modules["actors.cli.commands.plan"], "Setting", partial(Setting, tokens=40)
    )
    options = ("--measured", file, "--schedule", "plain", "--schedule", "living")
    assert outrider(monkeypatch, "plan", *options, "--save", again, "--png", png, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rates = {
        forecast["schedule"]: forecast["tokens_per_second"]
        for forecast in found["forecasts"]
        if forecast["group"] == "schedules"
    }
    assert rates["plain"] == pytest.approx(1 / T, rel=0.01)
    assert rates["living"] > 1.5 * rates["plain"]
    assert {forecast["group"] for forecast in found["forecasts"]} == {
        "schedules",
        "drafters",
        "round trips",
        "load",
        "half as deep",
    }
    assert [sentence.split(":")[0] for sentence in found["recommended"]] == [
        "Draft",
        "Rows",
        "Drafters",
    ]
    assert PairProfile.model_validate_json(again.read_text()) == PairProfile.model_validate(
        found["measured"][0]
    )
    assert png.read_bytes().startswith(b"\x89PNG")
    assert outrider(monkeypatch, "plan", "--measured", file, "--schedule", "plain") == 0
    assert "33.3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "JSON"),
        ('{"target": {"1": 0.03}, "draft": {"1": 0.002}}', "acceptance"),
        ('{"target": {"2": 0.03}, "draft": {"1": 0.002}, "acceptance": {"1": 0.5}}', "target"),
        ('{"target": {"1": -0.03}, "draft": {"1": 0.002}, "acceptance": {"1": 0.5}}', "target"),
        ('{"target": {"1": 0.03}, "draft": {"1": 0.002}, "acceptance": {"1": 1.5}}', "acceptance"),
        (
            '{"target": {"1": 0.03}, "draft": {"1": 0.002}, "acceptance": {"1": 0.5, "2": 0.4}}',
            "does not fall",
        ),
        (
            '{"target": {"1": 0.03}, "draft": {"1": 0.002}, "acceptance": {"1": 0.5}, "colour": 1}',
            "colour",
        ),
        (
            '{"target": {"1": 0.03}, "draft": {"1": 0.002}, '
            '"positions": [{"rank": 0, "scores": [0.5]}]}',
            "positions",
        ),
    ],
)
def test_figures_that_cannot_be(
    content: str,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "pair.json"
    file.write_text(content)
    assert outrider(monkeypatch, "plan", "--measured", file) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--measured", "/nowhere/pair.json"], "/nowhere/pair.json"),
        (["--schedule", "fast"], "fast"),
        (["--sessions", "0"], "sessions 0"),
        (["--drafters", "65"], "drafters 65"),
        (["--targets", "0"], "targets 0"),
        (["--rtt", "-1"], "rtt -1"),
        (["--rtt", "nan"], "rtt nan"),
        (["--temperature", "-1"], "temperature -1"),
        (["--target", "/nowhere/model", "--measured", "/nowhere/pair.json"], "--measured"),
    ],
)
def test_options_that_cannot_be(
    arguments: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outrider(monkeypatch, "plan", *arguments) == 2
    assert named in capsys.readouterr().err
