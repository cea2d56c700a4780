"""`make soak` in small: what grows is found, answers are compared, and what is shown."""

import asyncio
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.chaos.faults import next_fault
from bench.soak.growth import (
    COUNT_GOAL,
    HOUR_S,
    QUANTITIES,
    Growth,
    Slope,
    Track,
    measure_growth,
    theil_sen,
    warm_up_s,
)
from bench.soak.process_stats import descendants, parse_status, read_parents, read_process
from bench.soak.requests import (
    ChoiceText,
    HttpAnswer,
    build_requests,
    parse_answer,
)
from bench.soak.run import TEMPLATE, with_template
from bench.soak.soak_plots import draw_soak
from bench.soak.soak_report import SoakReport
from bench.soak.traffic import Tally, answer_plainly, run_batches, run_client
from runtime.core.errors import Unavailable
from tests.support.gateway import MODEL, serving
from tests.support.pair import SHIPPED
from tests.system.test_chaos import FLEET

PERIOD_S = 5.0


def track(grow: dict[str, float], hours: float = 2.0, noise: float = 0.0, seed: int = 0) -> Track:
    """Samples of a process that grows by so much in an hour, in the units of QUANTITIES."""
    draw, found = random.Random(seed), Track("target-0", 7)
    for number in range(int(hours * HOUR_S / PERIOD_S)):
        at = number * PERIOD_S
        found.add(
            at,
            {
                name: 100.0 + grow.get(name, 0.0) * at / HOUR_S + noise * draw.gauss(0, 1)
                for name in QUANTITIES
            },
        )
    return found


def leaks(found: Track, **settings: float) -> set[str]:
    growths = measure_growth([found], warm_up_s(2 * HOUR_S), 1.0, **settings)
    return {growth.quantity for growth in growths if growth.leaks}


def test_the_slope_is_that_of_a_line_with_its_peaks_ignored() -> None:
    times = [number / 10 for number in range(1000)]
    values = [
        3.0 + 2.0 * at + (500.0 if number % 10 == 3 else 0.0) for number, at in enumerate(times)
    ]
    slope = theil_sen(times, values)
    assert slope.median == pytest.approx(2.0, abs=0.02)
    assert slope.low <= slope.median <= slope.high < 2.1
    noisy = theil_sen(times, [value + number % 7 for number, value in enumerate(values)])
    assert noisy.low < 2.0 < noisy.high


@pytest.mark.parametrize("seed", range(5))
def test_a_level_series_with_noise_does_not_leak(seed: int) -> None:
    assert leaks(track({}, noise=4.0, seed=seed)) == set()


@pytest.mark.parametrize("quantity", ["memory", "shared"])
def test_memory_that_grows_faster_than_the_goal_leaks(quantity: str) -> None:
    assert leaks(track({quantity: 1.5}, noise=0.3)) == {quantity}
    assert leaks(track({quantity: 0.5}, noise=0.3)) == set()


@pytest.mark.parametrize("quantity", ["files", "threads", "children"])
def test_what_each_fault_leaves_over_leaks(quantity: str) -> None:
    assert leaks(track({quantity: 60.0}, noise=3.0)) == {quantity}
    assert leaks(track({quantity: COUNT_GOAL / 2})) == set()


def test_what_a_warm_up_takes_is_no_leak() -> None:
    found = track({}, hours=2.0)
    found.values["memory"] = [100 + min(at, 600.0) for at in found.times]
    assert leaks(found) == set()


def test_a_short_life_and_rays_own_processes_are_not_judged() -> None:
    short = track({"memory": 100.0}, hours=0.5)
    assert leaks(short) == set(), "15 minutes after the warm-up"
    assert leaks(short, min_span_s=600.0) == {"memory"}
    assert leaks(replace(track({"memory": 100.0}), judged=False)) == set()
    assert measure_growth([track({}, hours=0.1)], warm_up_s(2 * HOUR_S), 1.0) == []


def test_a_sample_that_lacks_a_value_keeps_the_one_before() -> None:
    found = Track("gateway-0", 7)
    found.add(0.0, {"memory": 5.0, "sessions": 3.0})
    found.add(5.0, {"memory": 6.0})
    assert (found.values["memory"], found.values["sessions"]) == ([5.0, 6.0], [3.0, 3.0])


def test_what_this_process_holds() -> None:
    stats = read_process(os.getpid(), read_parents())
    assert stats is not None
    assert stats.memory > 1 << 20
    with Path(os.devnull).open() as opened:
        more = read_process(os.getpid(), {2: os.getpid(), 3: 2})
        assert more is not None
        assert opened
    assert more.files > stats.files - 5
    assert more.children == 2
    assert read_process(2**22 + 1, {}) is None
    assert sorted(descendants(1, {2: 1, 3: 2, 4: 9, 5: 3})) == [2, 3, 5]
    assert parse_status("Name:\tx\nThreads:\t7\nRssAnon:\t  12 kB\n") == {
        "Threads": 7,
        "RssAnon": 12,
    }


def test_spared_members_are_never_hit() -> None:
    draw = random.Random(0)
    found = {fault.name for _ in range(100) if (fault := next_fault(FLEET, set(), draw, {"t0"}))}
    assert found == {"t1", "d-0"}


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: x\r\n\r\n"


def choice(**fields: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "finish_reason": None} | fields]}).encode()


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"", HttpAnswer(0, (), "no answer")),
        (
            HEAD + choice(text="ab", finish_reason="stop", logprobs=None),
            HttpAnswer(200, (ChoiceText("ab", (), "stop"),), ""),
        ),
        (
            HEAD
            + b"1a\r\ndata: "
            + choice(index=1, delta={"content": "x"})
            + b"\n\n\r\ndata: "
            + choice(delta={"content": "y"}, finish_reason="length")
            + b"\n\n\r\ndata: "
            + choice(index=1, delta={}, finish_reason="stop")
            + b"\n\ndata: [DONE]\n\n",
            HttpAnswer(200, (ChoiceText("y", (), "length"), ChoiceText("x", (), "stop")), ""),
        ),
        (
            HEAD + b"data: " + choice(text="a") + b'\n\ndata: {"error":"late"}\n',
            HttpAnswer(200, (), "late"),
        ),
        (
            b'HTTP/1.1 503 Busy\r\n\r\n{"error":"overloaded"}',
            HttpAnswer(503, (), "overloaded"),
        ),
    ],
)
def test_an_answer_is_read_whole_and_streamed(data: bytes, answer: HttpAnswer) -> None:
    assert parse_answer(data) == answer


def test_every_kind_of_request_is_answered_and_compared(tmp_path: Path) -> None:
    """Against a toy target with a drafter: a wrong reference is seen in answers of every kind."""

    async def traffic(port: int) -> tuple[Tally, Tally]:
        cases = await answer_plainly(port, build_requests(MODEL, 1, 24))
        spoilt = [replace(case, expected=(ChoiceText("?", (), "stop"),)) for case in cases]
        found = []
        for known in (cases, spoilt):
            over, tally = asyncio.Event(), Tally()
            tasks = [run_client(port, known, random.Random(n), over, tally) for n in range(3)]
            tasks.append(run_batches(port, known, tmp_path, over, tally))
            running = asyncio.gather(*tasks)
            while known is cases and len(tally.answers) < 7:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            while known is spoilt and tally.wrong < len(cases):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            over.set()
            await running
            found.append(tally)
        return found[0], found[1]

    with serving() as gateway:
        right, wrong = asyncio.run(traffic(gateway.port()))
        gateway.eventually(gateway.free)
    kinds = {"completion", "chat", "choices", "logprobs", "grammar"}
    assert right.answers.keys() == kinds | {"batch", "left"}
    assert (right.wrong, right.lines) == (0, [])
    assert wrong.answers.keys() <= {"left"}
    assert any(line.startswith("batch") for line in wrong.lines)
    assert not list(tmp_path.glob("*.job/*"))


def test_a_model_that_refuses_a_kind_is_named() -> None:
    with serving(template=None) as gateway:
        asked = answer_plainly(gateway.port(), build_requests(MODEL, 1, 4))
        with pytest.raises(Unavailable, match="kind chat"):
            asyncio.run(asked)


def test_a_model_without_a_template_gets_one(tmp_path: Path) -> None:
    copy = with_template(SHIPPED, tmp_path / "copy")
    assert json.loads((copy / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    assert with_template(copy, tmp_path / "second") == copy


GOOD = SoakReport(
    seconds=7200.0,
    seed=1,
    period=60.0,
    faults={"target SIGKILL": 2},
    replaced=2,
    answers={"chat": 3},
    wrong=0,
    lines=(),
    left=(),
    warm_up=900.0,
    growths=(),
    tracks=(track({}),),
)


def report(*growths: Growth) -> SoakReport:
    return replace(GOOD, growths=growths)


LEVEL = Growth("target-0", 7, "memory", 6300.0, 400.0, 400.5, Slope(0.3, -0.1, 0.6), 1.0)
STEEP = replace(LEVEL, slope=Slope(5.0, 4.0, 6.0))


@pytest.mark.parametrize(
    "bad",
    [
        replace(report(LEVEL), wrong=1),
        replace(report(LEVEL), answers={}),
        replace(report(LEVEL), left=("target-0 1 sessions",)),
        report(STEEP),
    ],
)
def test_a_soak_passes_only_where_all_of_it_does(bad: SoakReport) -> None:
    assert report(LEVEL).passed
    assert not bad.passed


def test_what_is_shown(tmp_path: Path) -> None:
    found = replace(report(LEVEL, STEEP), lines=("chat, stream True: x",), wrong=1)
    page = found.markdown("soak.png")
    assert "| target-0 | memory, MiB | 400.0 | 400.5 | +5.00 | +4.00 to +6.00 | 1 | leaks |" in page
    assert "![growth](soak.png)" in page
    assert "    chat, stream True: x" in page
    data = json.loads(json.dumps(found.as_json()))
    assert (data["passed"], data["judged"], data["growths"][1]["leaks"]) == (False, True, True)
    assert len(data["tracks"][0]["memory"]) == len(data["tracks"][0]["times"]) == 720
    short = report(replace(LEVEL, goal=None))
    assert "not judged: the run is short" in short.markdown("soak.png")
    draw_soak(found, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
