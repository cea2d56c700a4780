"""`make test-cluster`: the on-premise cluster file for real, on hosts made out of this machine.

`ray up` on a head, two target hosts and a drafter host; `outrider serve`; the `openai` package asks without pause while drafters are
scaled, a host is cut off, another leaves and then is stopped, a third is powered down, the gateway is killed; a batch goes through
`ray job submit`; everything goes down again. Every answer is compared with plain decoding. Prints each check with the seconds it took;
ends with code 1 at the first that fails. Each step is a function: from a Python prompt, within `hosts`, one `bring_up` serves many trials.
With the argument `short` it does a part of that in three minutes: up, served, asked, a host cut off, down again.
"""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.model_paths import bundled_model
from tests.support.paths import ROOT
from tests.system.cluster.hosts import Hosts, await_, hosts, missing
from tests.system.cluster.queries import rules, shown
from tests.system.cluster.reference import cases
from tests.system.cluster.status_stream import Looks
from tests.system.cluster.traffic import Traffic

NET = "10.77.5"
HEAD, TARGETS, DRAFTERS = f"{NET}.10", (f"{NET}.11", f"{NET}.12"), f"{NET}.13"
ADDRESSES = {
    "client": f"{NET}.5",
    "head": HEAD,
    "target-a": TARGETS[0],
    "target-b": TARGETS[1],
    "drafters": DRAFTERS,
}
BIN = ROOT / ".venv" / "bin"
KEYS = "/root/.outrider"
STREAMS = 3
TOKENS = 160
PATIENCE_S = 600.0  # for anything; a busy machine is slow, and only a failure waits so long
RARE = ("target_fallbacks_total",)  # has no series before it happens

DEPLOYMENT = f"""
target: {{model: {bundled_model("target")}, dtype: float32, kv_tokens: 8192, replicas: 2, placement: {{resources: {{target: 1}}, threads: 1}}}}
pools:
  - {{name: draft, model: {bundled_model("draft")}, dtype: float32, max: 4, placement: {{resources: {{drafter: 1}}, num_cpus: 0.5, threads: 1}}}}
gateway:
  host: {HEAD}
  port: 8443
  nodes: [{HEAD}]
  api_keys: {KEYS}/api-keys
  tls: {{ca: {KEYS}/certs/ca.pem, cert: {KEYS}/certs/https.pem, key: {KEYS}/certs/https-key.pem}}
security:
  tls: {{ca: {KEYS}/certs/ca.pem, cert: "{KEYS}/certs/{{role}}.pem", key: "{KEYS}/certs/{{role}}-key.pem"}}
"""

# Whether the gateway takes requests.
READY = f"""
import pathlib, ssl, urllib.request
trusted = ssl.create_default_context(cafile=pathlib.Path("{KEYS}/certs/ca.pem"))
urllib.request.urlopen("https://{HEAD}:8443/ready", timeout=5, context=trusted)
"""

# The first bytes that Ray's server says to who shows no certificate, and to who shows that of a node.
KNOCK = f"""
import contextlib, os, socket, ssl
for certificate in ((), (os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])):
    shown = ssl.create_default_context(cafile=os.environ["RAY_TLS_CA_CERT"])
    shown.set_alpn_protocols(["h2"])
    if certificate:
        shown.load_cert_chain(*certificate)
    said = b""
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        with shown.wrap_socket(socket.create_connection(("{HEAD}", 6379), 30), server_hostname="{HEAD}") as secured:
            said = secured.recv(100)
    print(len(said))
"""


class Failed(Exception):
    """A check that failed: which, and what was seen."""


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def check(what: str) -> Iterator[list[str]]:
    """A line when it is done, with what was put into the list. Raises Failed."""
    begin, more = time.monotonic(), list[str]()
    try:
        yield more
    except (subprocess.SubprocessError, TimeoutError, AssertionError) as error:
        seen = getattr(error, "output", None) or ""
        raise Failed(f"after {time.monotonic() - begin:.1f} s: {what}\n{error}\n{seen}") from error
    say(f"{time.monotonic() - begin:6.1f} s  {'; '.join([what, *more])}")


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


@dataclass(frozen=True, slots=True)
class Operator:
    """What a person does at the client, and sees."""

    made: Hosts

    def client(self, command: str, patience: float = PATIENCE_S) -> str:
        return self.made.run("client", f"cd {ROOT} && PATH={BIN}:$PATH && {command}", patience)

    def put(self, path: str, content: str) -> None:
        self.made.run("client", f"cat >{path} <<'END'\n{content}\nEND")

    def on_head(self, command: str, patience: float = PATIENCE_S) -> str:
        return self.client(f"ray exec ~/cluster.yaml {shlex.quote(command)} 2>&1", patience)

    def outrider(self, command: str, patience: float = PATIENCE_S) -> str:
        return self.made.run("head", f"outrider {command}", patience)

    def fleet(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(
            self.outrider("status --address auto --json").splitlines()[-1]
        )
        return status

    def queries(self) -> dict[str, int]:
        """Series found by each query of dashboard and rules; none before Prometheus answers."""
        said = self.made.run(
            "client",
            f"cd {ROOT} && {BIN}/python -m tests.system.cluster.queries http://127.0.0.1:9090 2>/dev/null || echo '{{}}'",
        )
        answers: dict[str, int] = json.loads(said.splitlines()[-1])
        return answers

    def all_joined(self) -> bool:
        lines = {line.strip() for line in self.made.run("head", "ray status 2>&1").splitlines()}
        return {"0.0/2.0 target", "0.0/4.0 drafter"} <= lines

    def logs(self) -> str:
        """Ends of the logs on the head, and of the drafters' and targets' hosts that are still there."""
        names = "{gcs_server.out,raylet.out,raylet.err,dashboard_agent.log,monitor.log,monitor.err,worker*.err}"
        # Without the frames of a stack and the counters that would hide what was said before them.
        one = "grep -vE '^/|total|state-dump|num_|^ *$' $log | tail -n 25 | cut -c 1-300"
        tail = f'cd /tmp/ray/session_latest/logs && for log in {names}; do [ ! -s $log ] || {{ echo "==> $log"; {one}; }}; done'
        found = [f"--- {host}\n{self._try(host, tail)}" for host in ADDRESSES if host != "client"]
        return "\n".join(found)

    def _try(self, host: str, command: str) -> str:
        try:
            return self.made.run(host, command, 10)
        except subprocess.SubprocessError as error:
            return str(error)


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
    """A client asks without pause, and somebody looks on, until the end."""
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
    """Start a Prometheus on the client, if there is one on this machine; it ends with its host."""
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
            f"mkdir -p /etc/prometheus; cut -d: -f2 {KEYS}/api-keys | tr -d '\\n' >/etc/prometheus/outrider-key",
        )
        operator.made.run("client", f"cp {KEYS}/certs/ca.pem /etc/prometheus/outrider-ca.pem")
        operator.made.run("client", f"cp {ROOT}/deploy/prometheus/rules.yml /etc/prometheus/")
        operator.put("/etc/prometheus/prometheus.yml", text)
        options = "--config.file=/etc/prometheus/prometheus.yml --storage.tsdb.path=/tmp/prometheus --web.listen-address=127.0.0.1:9090"
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
        more.append(
            f"alerts that would be on: {', '.join(rule['alert'] for rule in rules() if answered[rule['expr']]) or 'none'}"
        )


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
    """Wait until no more are there, as the controller sees it."""
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
    """`reached`: targets' hosts that can be reached."""
    with check("outrider down, ray down"):
        operator.on_head("outrider down --address auto")
        operator.client("ray down -y ~/cluster.yaml 2>&1")
    with check("no Ray is left, after `ray stop` on the hosts that it leaves running"):
        for host in reached:
            operator.made.run(host, "ray stop")
        for host in ("head", *reached):
            operator.made.run(host, "! pgrep -f '[r]aylet/raylet|[g]cs_server'")


def cluster_file() -> str:
    """The one that ships, filled in as its first lines say."""
    text = (ROOT / "deploy" / "ray" / "on-premise.yaml").read_text("utf-8")
    text = (
        text.replace("HEAD_ADDRESS", HEAD)
        .replace("DRAFTER_ADDRESS", DRAFTERS)
        .replace("ssh_user: USER", "ssh_user: root")
    )
    return re.sub(
        r"( *)(.*)TARGET_ADDRESS(.*)",
        lambda line: "\n".join(f"{line[1]}{line[2]}{one}{line[3]}" for one in TARGETS),
        text,
    )


if __name__ == "__main__":
    sys.exit(main())
