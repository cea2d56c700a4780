"""`make test-cluster` runs the on-premise cluster file on hosts made out of this machine.

`ray up` starts a head, two target hosts and a drafter host, and `outrider serve` a fleet. The
`openai` package sends requests without pause while drafters are scaled, one host is cut off,
another leaves and is stopped, a third is powered down, and the gateway is killed. A batch goes
through `ray job submit`. At the end everything is taken down. Every answer is compared with plain
decoding. The program prints each check with the seconds it took, and ends with code 1 at the first
that fails. Each step is a function: from a Python prompt, within `hosts`, one `bring_up` serves
many trials. With the argument `short` it takes three minutes: it brings the cluster up, serves,
sends requests, cuts a host off and takes everything down.
"""

import contextlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tests.support.paths import ROOT
from tests.system.cluster.cluster_operator import (
    ADDRESSES,
    BIN,
    DEPLOYMENT,
    HEAD,
    KEYS,
    KNOCK,
    PATIENCE_S,
    READY,
    Failed,
    Operator,
    check,
    cluster_file,
    say,
)
from tests.system.cluster.hosts import await_, hosts, missing
from tests.system.cluster.queries import rules, shown
from tests.system.cluster.reference import cases
from tests.system.cluster.status_stream import Looks
from tests.system.cluster.traffic import Traffic

STREAMS = 3
TOKENS = 160
RARE = ("target_fallbacks_total",)  # has no series before it happens


def main() -> int:
    if sys.argv[1:] not in ([], ["short"]):
        say(f"{' '.join(sys.argv[1:])}: give `short`, or nothing for the whole")
        return 2
    life, tokens = (short_life, TOKENS // 2) if sys.argv[1:] else (whole_life, TOKENS)
    why = missing()
    if why:
        say(f"skipped: this {why}")
        return 0
    begin = time.monotonic()
    try:
        with check("plain decoding of what will be asked"):
            known = cases(tokens)
        with hosts(ADDRESSES) as made:
            try:
                life(Operator(made), known)
            except Failed:
                say(Operator(made).logs())
                raise
    except Failed as failed:
        say(f"FAILED {failed}")
        return 1
    say(f"all passed in {time.monotonic() - begin:.0f} s")
    return 0


def whole_life(operator: Operator, known: list[dict[str, Any]]) -> None:
    bring_up(operator)
    serve(operator, known)
    with asking(operator) as (traffic, looks):
        watched = watch(operator)
        scale(operator, traffic, looks)
        if watched:
            ask_prometheus(operator)
        submit(operator, known)
        for change in (cut_off, mend, leave, stop, power_off):
            change(operator, traffic, looks)
    lose_gateway(operator)
    take_down(operator, ("target-a", "target-b"))


def short_life(operator: Operator, known: list[dict[str, Any]]) -> None:
    bring_up(operator)
    serve(operator, known)
    with asking(operator) as (traffic, looks):
        cut_off(operator, traffic, looks)
    take_down(operator, ("target-b",))


@contextlib.contextmanager
def asking(operator: Operator) -> Iterator[tuple[Traffic, Looks]]:
    """Sends requests without pause and follows the status until the block ends."""
    with contextlib.ExitStack() as stack:
        traffic = ask(operator)
        stack.callback(traffic.stop)
        looks = Looks(operator.made.command("head", "outrider top --address auto --json"))
        stack.callback(looks.stop)
        yield traffic, looks
        with check("the client ends") as more:
            more.append(traffic.end())


def bring_up(operator: Operator) -> None:
    with check("deploy/ray/keys"):
        operator.client(f"deploy/ray/keys {HEAD}")
    with check("ray up deploy/ray/on-premise.yaml"):
        operator.put("~/cluster.yaml", cluster_file())
        operator.client("ray up -y ~/cluster.yaml 2>&1")
    with check("the three other hosts join: two targets, room for four drafters"):
        await_(operator.all_joined, "both resources", PATIENCE_S)
    with check("ray exec runs on the head"):
        assert "head" in operator.on_head("hostname").split()
    with check("without the token Ray refuses"):
        operator.on_head(
            "! RAY_AUTH_MODE=disabled timeout 30 ray job list --address http://127.0.0.1:8265"
        )
    with check("without a certificate Ray refuses"):
        without, shown = map(
            int, operator.made.run("head", f"python -c {shlex.quote(KNOCK)}").split()
        )
        assert without == 0 < shown, f"{without} bytes without, {shown} with"
    with check("the dashboard is on loopback alone"):
        operator.on_head(
            "python -c 'import socket; socket.create_connection((\"127.0.0.1\", 8265), 5)'"
        )
        operator.client(f"! timeout 5 bash -c 'exec 3<>/dev/tcp/{HEAD}/8265' 2>&1")


def serve(operator: Operator, known: list[dict[str, Any]]) -> None:
    with check("outrider serve"):
        operator.put("~/deployment.yaml", DEPLOYMENT)
        operator.put("~/cases.json", json.dumps(known))
        operator.client("ray rsync-up ~/cluster.yaml ~/deployment.yaml ~/deployment.yaml 2>&1")
        operator.on_head("outrider serve ~/deployment.yaml --address auto")
    with check("outrider status: two targets and a drafter are ready"):
        fleet = operator.fleet()
        assert [actor["state"] for actor in (*fleet["targets"], *fleet["drafters"])] == [
            "ready"
        ] * 3, fleet


def ask(operator: Operator) -> Traffic:
    with check(f"the openai package asks, {STREAMS} at a time, over HTTPS with a key") as more:
        arguments = (
            f"~/cases.json https://{HEAD}:8443/v1 {KEYS}/api-keys {KEYS}/certs/ca.pem {STREAMS}"
        )
        traffic = Traffic(
            operator.made.command(
                "client", f"cd {ROOT} && {BIN}/python -m tests.system.cluster.traffic {arguments}"
            )
        )
        more.append(traffic.more(6))
    return traffic


def watch(operator: Operator) -> bool:
    """Starts a Prometheus on the client if this machine has one; it ends with its host."""
    if shutil.which("prometheus") is None:
        say("    -    no Prometheus here: apt-get install prometheus")
        return False
    with check("Prometheus scrapes the gateway by the configuration that ships"):
        text = (
            (ROOT / "deploy" / "prometheus" / "prometheus.yml")
            .read_text("utf-8")
            .replace("GATEWAY", f"{HEAD}:8443")
        )
        operator.made.run(
            "client",
            "mkdir -p /etc/prometheus; "
            f"cut -d: -f2 {KEYS}/api-keys | tr -d '\\n' >/etc/prometheus/outrider-key",
        )
        operator.made.run("client", f"cp {KEYS}/certs/ca.pem /etc/prometheus/outrider-ca.pem")
        operator.made.run("client", f"cp {ROOT}/deploy/prometheus/rules.yml /etc/prometheus/")
        operator.put("/etc/prometheus/prometheus.yml", text)
        options = (
            "--config.file=/etc/prometheus/prometheus.yml --storage.tsdb.path=/tmp/prometheus "
            "--web.listen-address=127.0.0.1:9090"
        )
        operator.made.run(
            "client", f"setsid prometheus {options} >/tmp/prometheus.log 2>&1 </dev/null &"
        )
        await_(
            lambda: (
                operator.queries().get('up{job="outrider"} == 0') == 0
                and any(operator.queries().values())
            ),
            "a scrape",
            PATIENCE_S,
        )
    return True


def ask_prometheus(operator: Operator) -> None:
    with check("each query of the dashboard finds data") as more:
        answered = operator.queries()
        without = [query for query in shown() if not answered[query]]
        assert all(any(name in query for name in RARE) for query in without), (
            f"no data for {without}"
        )
        more.append(f"{len(shown()) - len(without)} of {len(shown())}")
        alerts = [rule["alert"] for rule in rules() if answered[rule["expr"]]]
        more.append(f"alerts that would be on: {', '.join(alerts) or 'none'}")


def scale(operator: Operator, traffic: Traffic, looks: Looks) -> None:
    for count in (3, 0, 2):
        with check(f"outrider scale draft={count}") as more:
            operator.outrider(f"scale draft={count} --address auto")
            looks.await_("drafters", count)
            more.append(traffic.more(6))


def submit(operator: Operator, known: list[dict[str, Any]]) -> None:
    with check("a batch through ray job submit") as more:
        model = {"model": operator.fleet()["served_model"]}
        bodies = [
            {
                name: value
                for name, value in (case["request"] | model).items()
                if name != "extra_body"
            }
            for case in known
        ]
        items = [
            {
                "custom_id": str(i),
                "method": "POST",
                "url": "/v1/completions",
                "body": body | {"ignore_eos": True},
            }
            for i, body in enumerate(bodies)
        ]
        operator.put("~/batch.jsonl", "\n".join(json.dumps(item) for item in items))
        operator.client("ray rsync-up ~/cluster.yaml ~/batch.jsonl ~/batch.jsonl 2>&1")
        job = "outrider submit ~/batch.jsonl -o ~/answers.jsonl --address auto"
        operator.on_head(
            f"ray job submit --address http://127.0.0.1:8265 -- bash -c {shlex.quote(job)}"
        )
        operator.client("ray rsync-down ~/cluster.yaml ~/answers.jsonl ~/answers.jsonl 2>&1")
        lines = [
            json.loads(line)
            for line in operator.made.run("client", "cat ~/answers.jsonl").splitlines()
        ]
        assert all(line["response"]["status_code"] == 200 for line in lines), lines
        texts = {
            line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in lines
        }
        assert len(lines) == len(known), f"{len(lines)} answers to {len(known)} items"
        assert texts == {str(i): case["text"] for i, case in enumerate(known)}, (
            "an item differs from plain decoding"
        )
        more.append(f"{len(lines)} items, each once and as plain decoding")


def cut_off(operator: Operator, traffic: Traffic, looks: Looks) -> None:
    with check("a target host is cut off") as more:
        operator.made.cut("target-a")
        more.append(missed(looks, "targets", 1))
        more.append(traffic.more(9))


def mend(operator: Operator, traffic: Traffic, looks: Looks) -> None:
    with check("its cable is back, and so is its target") as more:
        operator.made.mend("target-a")
        looks.await_("targets", 2)
        more.append(traffic.more(6))


def leave(operator: Operator, traffic: Traffic, looks: Looks) -> None:
    with check("a target host leaves when it is told to: deploy/ray/leave") as more:
        operator.made.run("target-b", "outrider/deploy/ray/leave 120")
        log = operator.outrider("logs controller --lines 1000 --address auto")
        assert "is drained: its node leaves" in log, log[-2000:]
        more.append(traffic.more(6))
    with check("the head starts Ray there again, and the second target") as more:
        looks.await_("targets", 2)
        more.append(traffic.more(6))


def stop(operator: Operator, traffic: Traffic, looks: Looks) -> None:
    with check("`ray stop` on a target host: SIGTERM to all that Ray has started") as more:
        operator.made.run("target-b", "ray stop")
        more.append(missed(looks, "targets", 1))
        more.append(traffic.more(9))


def power_off(operator: Operator, traffic: Traffic, looks: Looks) -> None:
    with check("the drafters' host is powered down") as more:
        operator.made.power_off("drafters")
        more.append(missed(looks, "drafters", 0))
        more.append(traffic.more(9))


def missed(looks: Looks, what: str, left: int) -> str:
    """Waits until the controller reports `left` of them; returns how long that took."""
    begin = time.monotonic()
    looks.await_(what, left)
    return f"seen after {time.monotonic() - begin:.1f} s"


def lose_gateway(operator: Operator) -> None:
    with check("the gateway is killed, and is back at its address"):
        operator.made.run("head", "pkill -KILL -f '^ray::[G]ateway'")
        operator.client(f"until python -c {shlex.quote(READY)} 2>/dev/null; do sleep 0.1; done")
    traffic = ask(operator)
    try:
        with check("the client ends") as more:
            more.append(traffic.end())
    finally:
        traffic.stop()


def take_down(operator: Operator, reached: Sequence[str]) -> None:
    """Takes everything down; `reached` are the target hosts that can be reached."""
    with check("outrider down, ray down"):
        operator.on_head("outrider down --address auto")
        operator.client("ray down -y ~/cluster.yaml 2>&1")
    with check("no Ray is left, after `ray stop` on the hosts that it leaves running"):
        for host in reached:
            operator.made.run(host, "ray stop")
        for host in ("head", *reached):
            operator.made.run(host, "! pgrep -f '[r]aylet/raylet|[g]cs_server'")


if __name__ == "__main__":
    sys.exit(main())
