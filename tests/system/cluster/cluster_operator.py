"""Runs an operator's commands on the hosts of the trial and prints checks."""

import contextlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from runtime.model_paths import bundled_model
from tests.support.paths import ROOT
from tests.system.cluster.hosts import Hosts

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
PATIENCE_S = 600.0  # for any step; only a failure takes that long

DEPLOYMENT = f"""
target:
  model: {bundled_model("target")}
  dtype: float32
  kv_tokens: 8192
  replicas: 2
  placement: {{resources: {{target: 1}}, threads: 1}}
pools:
  - name: draft
    model: {bundled_model("draft")}
    dtype: float32
    max: 4
    placement: {{resources: {{drafter: 1}}, num_cpus: 0.5, threads: 1}}
gateway:
  host: {HEAD}
  port: 8443
  nodes: [{HEAD}]
  api_keys: {KEYS}/api-keys
  tls: {{ca: {KEYS}/certs/ca.pem, cert: {KEYS}/certs/https.pem, key: {KEYS}/certs/https-key.pem}}
security:
  tls:
    ca: {KEYS}/certs/ca.pem
    cert: "{KEYS}/certs/{{role}}.pem"
    key: "{KEYS}/certs/{{role}}-key.pem"
"""

# Succeeds when the gateway takes requests.
READY = f"""
import pathlib, ssl, urllib.request
trusted = ssl.create_default_context(cafile=pathlib.Path("{KEYS}/certs/ca.pem"))
urllib.request.urlopen("https://{HEAD}:8443/ready", timeout=5, context=trusted)
"""

# Prints how many bytes Ray's server sends to a client without a certificate, then to a node.
KNOCK = f"""
import contextlib, os, socket, ssl
for certificate in ((), (os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])):
    shown = ssl.create_default_context(cafile=os.environ["RAY_TLS_CA_CERT"])
    shown.set_alpn_protocols(["h2"])
    if certificate:
        shown.load_cert_chain(*certificate)
    said = b""
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        plain = socket.create_connection(("{HEAD}", 6379), 30)
        with shown.wrap_socket(plain, server_hostname="{HEAD}") as secured:
            said = secured.recv(100)
    print(len(said))
"""


class Failed(Exception):
    """Raised by a failed check; names it and what was seen."""


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def check(what: str) -> Iterator[list[str]]:
    """Prints a line when done, with what the block put into the list. Raises Failed."""
    begin, more = time.monotonic(), list[str]()
    try:
        yield more
    except (subprocess.SubprocessError, TimeoutError, AssertionError) as error:
        seen = getattr(error, "output", None) or ""
        raise Failed(f"after {time.monotonic() - begin:.1f} s: {what}\n{error}\n{seen}") from error
    say(f"{time.monotonic() - begin:6.1f} s  {'; '.join([what, *more])}")


@dataclass(frozen=True, slots=True)
class Operator:
    """Runs commands as a person at the client would."""

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
        """Counts the series that each query finds; empty before Prometheus answers."""
        said = self.made.run(
            "client",
            f"cd {ROOT} && {BIN}/python -m tests.system.cluster.queries http://127.0.0.1:9090"
            " 2>/dev/null || echo '{}'",
        )
        answers: dict[str, int] = json.loads(said.splitlines()[-1])
        return answers

    def all_joined(self) -> bool:
        lines = {line.strip() for line in self.made.run("head", "ray status 2>&1").splitlines()}
        return {"0.0/2.0 target", "0.0/4.0 drafter"} <= lines

    def logs(self) -> str:
        """Returns the ends of the logs on every host that still answers."""
        names = (
            "{gcs_server.out,raylet.out,raylet.err,dashboard_agent.log,"
            "monitor.log,monitor.err,worker*.err}"
        )
        # Stack frames and counters are left out: they would hide the lines before them.
        one = "grep -vE '^/|total|state-dump|num_|^ *$' $log | tail -n 25 | cut -c 1-300"
        tail = (
            f"cd /tmp/ray/session_latest/logs && for log in {names}; "
            f'do [ ! -s $log ] || {{ echo "==> $log"; {one}; }}; done'
        )
        found = [f"--- {host}\n{self._try(host, tail)}" for host in ADDRESSES if host != "client"]
        return "\n".join(found)

    def _try(self, host: str, command: str) -> str:
        try:
            return self.made.run(host, command, 10)
        except subprocess.SubprocessError as error:
            return str(error)


def cluster_file() -> str:
    """Fills in the shipped cluster file as its first lines say."""
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
