"""All queries of the dashboard and the rules.

`python -m tests.system.cluster.queries URL` prints how many series each finds in a Prometheus.
"""

import json
import sys
import urllib.parse
import urllib.request
from typing import Any

import yaml

from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        (DEPLOY / "grafana" / "outrider.json").read_text("utf-8")
    )["panels"]
    return found


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def shown() -> list[str]:
    """What the dashboard asks for, over a minute where Grafana would fill in a time."""
    return [
        target["expr"].replace("$__rate_interval", "1m")
        for panel in panels()
        for target in panel.get("targets", ())
    ]


def alerts() -> list[str]:
    return [rule["expr"] for rule in rules()]


def found(url: str, expression: str) -> int:
    """Returns the series in the answer; those without a number do not count. Raises HTTPError."""
    with urllib.request.urlopen(
        f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}", timeout=10
    ) as answer:
        series = json.load(answer)["data"]["result"]
    return sum(one["value"][1] != "NaN" for one in series)


if __name__ == "__main__":
    sys.stdout.write(
        json.dumps(
            {expression: found(sys.argv[1], expression) for expression in [*shown(), *alerts()]}
        )
        + "\n"
    )
