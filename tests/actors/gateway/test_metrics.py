"""The metrics count what their table says. Run as a program, this file writes the table."""

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from actors.fleet.fleet_state import DrafterState, Fleet, PoolState, TargetState
from actors.gateway.concurrency_limiter import ConcurrencyLimiter
from actors.gateway.metrics import GatewayMetrics
from runtime.config import LimitsConfig
from runtime.core.messages import Chunk, Request, Stats
from runtime.telemetry.reports import DrafterReport, GuessReport, TargetReport
from tests.support.gateway import MODEL, Running, Scripted, serving
from tests.support.paths import ROOT

TABLE = ROOT / "deploy" / "METRICS.md"

HEAD = """# Metrics

Each gateway answers `GET /metrics` in Prometheus's text format. If API keys are configured,
Prometheus needs one (`authorization` in its scrape configuration). Metrics hold no content of
requests, no keys and no addresses.

Metrics with the label `model_name` count the requests of one gateway: add them up over gateways.
They have vLLM's names with another prefix, and vLLM's meaning. All other metrics describe the
fleet, as targets and drafters report themselves. Every gateway reports the same figures for the
fleet, so take those of one gateway (`max by (target)`, not `sum`). This table is written by
`.venv/bin/python -m tests.actors.gateway.test_metrics`.

| name | type | labels | meaning |
|---|---|---|---|
"""


def fleet() -> Fleet:
    guesses = {
        "small-0": GuessReport(
            proposed=70, accepted=30, late=5, stale=6, lead=2.5, round_trip=0.25, resting=True
        )
    }
    report = TargetReport(
        live=2,
        waiting=1,
        kv_used=100,
        kv_slots=1000,
        steps=40,
        rounds=60,
        accepted=30,
        accepted_at=(20, 10),
        finished={"stop": 3, "length": 4},
        fallbacks={"no-drafter": 2},
        lost_links={"small-0": 1},
        guesses=guesses,
    )
    return Fleet(
        "model",
        MODEL,
        "0",
        (
            TargetState("target-0", "a:1", 1, "ready", 3, report, "n", 2),
            TargetState("target-1", "", 0, "starting", 0, None, ""),
        ),
        (
            DrafterState(
                "small-0",
                "small",
                "a:2",
                0,
                "draining",
                4,
                DrafterReport(2, 30, 90, 1.5, {"stale": 8}),
                "n",
            ),
        ),
        (PoolState("small", "m", 2, 1, 0, 4, True),),
        (),
        7,
    )


def families() -> list[Metric]:
    """All that there are, with a sample for each combination of labels."""
    meter = asyncio.run(measured())
    return [*meter.registry.collect()]


async def measured() -> GatewayMetrics:
    meter = GatewayMetrics(MODEL, ConcurrencyLimiter(LimitsConfig()), fleet)
    meter.answered("/v1/completions", 200)
    meter.ended("stop")
    meter.accepted_at.labels(MODEL, "0")
    meter.by_drafter.labels(MODEL, "small-0")
    return meter


def table() -> str:
    lines = []
    for family in sorted(families(), key=lambda family: family.name):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = (
            [label for label in family.samples[0].labels if label != "le"] if family.samples else []
        )
        lines.append(
            f"| `{name}` | {family.type} | {', '.join(f'`{label}`' for label in labels)} "
            f"| {family.documentation} |\n"
        )
    return HEAD + "".join(lines)


def test_the_table_is_that_of_the_code() -> None:
    assert TABLE.read_text() == table(), (
        "write it anew: .venv/bin/python -m tests.actors.gateway.test_metrics"
    )


def test_every_figure_of_the_reports_is_there() -> None:
    """A figure that is added to a report and not to the metrics is noticed here."""
    names = " ".join(family.name for family in families())
    for report, other in (
        (
            TargetReport,
            {
                "waited": "wait",
                "computed": "compute",
                "prefilled": "prefill",
                "accepted_at": "per_pos",
                "guesses": "drafter",
            },
        ),
        (GuessReport, {}),
        (DrafterReport, {"computed": "compute", "counters": "ignored"}),
    ):
        for field in report.__dataclass_fields__:
            assert other.get(field, field) in names, f"{report.__name__}.{field}"


def samples(text: str) -> dict[str, float]:
    """By name and labels, in Prometheus's own notation."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name.removeprefix('outrider:')}{{{labels}}}"] = sample.value
    return found


STATS = Stats(5, 6, 3, 9, 8, 3, 2, (1, 1, 1), {"small-0": 2, "lookup": 1})


async def speak(request: Request) -> AsyncGenerator[Chunk, None]:
    yield Chunk(("a", "b"), (5, 6), ("", "small-0"))
    yield Chunk(("c",), (7,), ("",))
    yield Chunk(("d", "e", "f"), (8, 9, 10), ("small-0", "lookup", ""), "length", STATS)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with serving(Scripted(speak), fleet=fleet) as running:
        yield running


def test_what_is_counted(gateway: Running) -> None:
    with gateway.http() as client:
        body: dict[str, Any] = {"model": MODEL, "prompt": [1, 2, 3, 4, 5], "n": 2}
        for stream in (False, True):
            assert (
                client.post("/v1/completions", json={**body, "stream": stream}).status_code == 200
            )
        assert client.post("/v1/completions", json={**body, "n": 129}).status_code == 400
        found = samples(client.get("/metrics").text)
    own = {
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "prompt_tokens_total": 10,
        "generation_tokens_total": 24,
        "spec_decode_num_draft_tokens_total": 32,
        "spec_decode_num_accepted_tokens_total": 12,
        "time_to_first_token_seconds_count": 2,
        "e2e_request_latency_seconds_count": 2,
        "inter_token_latency_seconds_count": 8,
        "time_per_output_token_seconds_count": 4,
    }
    assert {name: found[f'{name}{{model_name="toy"}}'] for name in own} == own
    assert found['request_success_total{finished_reason="length",model_name="toy"}'] == 4
    assert (
        found['spec_decode_num_accepted_tokens_per_pos_total{model_name="toy",position="0"}'] == 8
    )
    assert (
        found['spec_decode_num_accepted_tokens_per_pos_total{model_name="toy",position="1"}'] == 4
    )
    assert found['accepted_tokens_total{drafter="small-0",model_name="toy"}'] == 8
    assert found['http_responses_total{code="200",model_name="toy",route="/v1/completions"}'] == 2
    assert found['http_responses_total{code="400",model_name="toy",route="/v1/completions"}'] == 1


def test_what_the_fleet_says(gateway: Running) -> None:
    with gateway.http() as client:
        found = samples(client.get("/metrics").text)
    expected = {
        'target_live_sessions{target="target-0"}': 2,
        'target_kv_used_slots{target="target-0"}': 100,
        'target_accepted_tokens_per_pos_total{position="1",target="target-0"}': 10,
        'target_sessions_finished_total{finished_reason="length",target="target-0"}': 4,
        'target_fallbacks_total{cause="no-drafter",target="target-0"}': 2,
        'target_lost_links_total{drafter="small-0",target="target-0"}': 1,
        'target_restarts_total{target="target-0"}': 2,
        'target_ready{target="target-0"}': 1,
        'target_ready{target="target-1"}': 0,
        'drafter_proposed_tokens_total{drafter="small-0",pool="small",target="target-0"}': 70,
        'drafter_lead_tokens{drafter="small-0",pool="small",target="target-0"}': 2.5,
        'drafter_resting{drafter="small-0",pool="small",target="target-0"}': 1,
        'drafter_ignored_messages_total{drafter="small-0",pool="small",reason="stale"}': 8,
        'drafter_nodes_total{drafter="small-0",pool="small"}': 90,
        'drafter_restarts_total{drafter="small-0",pool="small"}': 4,
        'drafter_ready{drafter="small-0",pool="small"}': 0,
        'pool_drafters_wanted{pool="small"}': 2,
        "lives_lost_total{}": 7,
    }
    assert {name: found[name] for name in expected} == expected


def test_names_are_those_that_prometheus_takes() -> None:
    for family in families():
        assert re.fullmatch(r"outrider:[a-z][a-z0-9_]*", family.name)
        assert family.documentation


def test_before_the_fleet_is_known_there_is_nothing_of_it() -> None:
    with serving(Scripted(speak)) as gateway, gateway.http() as client:
        assert not [
            name
            for name in samples(client.get("/metrics").text)
            if name.startswith(("target_", "drafter_", "pool_"))
        ]


if __name__ == "__main__":
    TABLE.write_text(table())
