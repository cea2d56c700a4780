"""Alert rules and dashboard query only metrics that the gateway serves."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from actors.gateway.concurrency_limiter import ConcurrencyLimiter
from actors.gateway.metrics import GatewayMetrics
from runtime.config import LimitsConfig
from tests.support.deploy_files import DEPLOY
from tests.system.cluster.queries import alerts, panels, rules, shown


def served() -> set[str]:
    """Returns the names of all series that a gateway serves."""
    meter = GatewayMetrics("model", ConcurrencyLimiter(LimitsConfig()), lambda: None)
    names = set()
    for family in meter.registry.collect():
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(
            family.type, ("",)
        )
        names |= {family.name + ending for ending in endings}
    return names


def test_rules_and_dashboard_query_only_existing_metrics() -> None:
    asked = {
        name
        for expression in [*shown(), *alerts()]
        for name in re.findall(r"outrider:\w+", expression)
    }
    assert len(asked) > 25
    assert asked - served() == set()


def test_each_rule_names_an_action_and_no_panels_overlap() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules())
    assert [
        rule["alert"] for rule in rules() if set(rule["annotations"]) != {"summary", "action"}
    ] == []
    assert len({panel["id"] for panel in panels()}) == len(panels())
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels())
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)), "two panels lie over each other"
    assert max(x for x, _ in cells) == 23


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus"
)
@pytest.mark.parametrize(("accepted", "fires"), [(90, False), (1, True)])
def test_the_collapse_alert_does_not_fire_for_a_healthy_tree(
    accepted: int, fires: bool, tmp_path: Path
) -> None:
    """A target runs 10 rounds a second; its drafter sends a tree of 30 nodes for each.

    `accepted` tokens are accepted in 10 seconds.
    """
    names = 'drafter="a-0", pool="a"'
    series = [
        {
            "series": f'outrider:{name}{{instance="{gateway}", target="t", {labels}}}',
            "values": f"0+{step}x120",
        }
        for gateway in ("g0", "g1")  # each tells of the whole fleet
        for name, labels, step in (
            ("target_rounds_total", "", 100),
            ("drafter_proposed_tokens_total", names, 3000),
            ("drafter_accepted_tokens_total", names, accepted),
        )
    ]
    alert = {"exp_labels": {"severity": "ticket", "pool": "a"}, "exp_annotations": {}}
    expected = (
        [alert | {"exp_annotations": annotations("OutriderAcceptanceCollapsed", "a")}]
        if fires
        else []
    )
    asked = [
        {"eval_time": "15m", "alertname": "OutriderAcceptanceCollapsed", "exp_alerts": expected}
    ]
    trial = {
        "rule_files": ["rules.yml"],
        "tests": [{"interval": "10s", "input_series": series, "alert_rule_test": asked}],
    }
    shutil.copy(DEPLOY / "prometheus" / "rules.yml", tmp_path)
    (tmp_path / "trial.yml").write_text(yaml.safe_dump(trial), "utf-8")
    done = subprocess.run(
        ["promtool", "test", "rules", "trial.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def annotations(alert: str, pool: str) -> dict[str, str]:
    found: dict[str, str] = next(rule["annotations"] for rule in rules() if rule["alert"] == alert)
    return {name: text.replace("{{ $labels.pool }}", pool) for name, text in found.items()}


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus"
)
def test_promtool_accepts_rules_configuration_and_queries(tmp_path: Path) -> None:
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8")
    for number, file in enumerate(re.findall(r"_file: (\S+?)[,}]", text)):
        (tmp_path / str(number)).touch()
        text = text.replace(file, str(number))
    (tmp_path / "prometheus.yml").write_text(text.replace("GATEWAY", "192.0.2.1:8443"), "utf-8")
    shutil.copy(DEPLOY / "prometheus" / "rules.yml", tmp_path)
    asked = [
        {"record": f"q{i}", "expr": expression}
        for i, expression in enumerate([*shown(), *alerts()])
    ]
    (tmp_path / "queries.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "all", "rules": asked}]}), "utf-8"
    )
    for what, file in (("config", "prometheus.yml"), ("rules", "queries.yml")):
        done = subprocess.run(
            ["promtool", "check", what, file],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
