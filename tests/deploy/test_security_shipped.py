"""The shipped files of deploy/ are closed, and this test notices each kind of hole."""

import copy
import ipaddress
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.rpc.tls import ROLES, read_credentials
from runtime.config import Deployment, TlsConfig
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
ENV = "~/outrider/deploy/ray/env"
TOKEN = "~/.ray/auth_token"
GATEWAY = 8443  # the one port for the world
OPERATORS = (8265, 8000)  # that KubeRay's operator asks, where it brings the deployment up

File = list[dict[str, Any]]  # documents of a YAML file


def load(file: Path) -> File:
    return [document for document in yaml.safe_load_all(file.read_text("utf-8")) if document]


def is_loopback(host: object) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


# A file for `ray up`


def ray_doors(file: File) -> Iterator[str]:
    (cluster,) = file
    if TOKEN not in cluster.get("file_mounts", {}):
        yield "the token is not sent to the nodes"
    if not any("deploy/ray/node" in command for command in cluster.get("setup_commands", [])):
        yield "keys stay readable for others: the nodes are not set up by deploy/ray/node"
    for kind in ("head", "worker"):
        commands = [
            command
            for command in cluster.get(f"{kind}_start_ray_commands", [])
            if "ray start" in command
        ]
        if not commands:
            yield f"the {kind} is not started here"
        for command in commands:
            settings, _, start = command.partition("ray start")
            if f". {ENV} &&" not in settings:
                yield f"the {kind} starts without token and TLS"
            if re.search(r"RAY_(AUTH_MODE|USE_TLS)=", settings):
                yield f"the {kind} overrides token or TLS"
            dashboard = re.search(r"--dashboard-host[= ](\S+)", start)
            if kind == "head" and not (dashboard and is_loopback(dashboard[1])):
                yield "the dashboard is not on loopback"
    for rule in cluster["provider"].get("security_group", {}).get("IpPermissions", []):
        if (
            (rule["FromPort"], rule["ToPort"]) != (GATEWAY, GATEWAY)
            or "0.0.0.0/0" in str(rule)
            or "::/0" in str(rule)
        ):
            yield "a port beside the gateway's is open, or all the world may come"


# Manifests of Kubernetes


def manifest_doors(file: File) -> Iterator[str]:
    policies = [document["spec"] for document in file if document["kind"] == "NetworkPolicy"]
    if not any("Ingress" in policy["policyTypes"] for policy in policies):
        yield "no policy keeps others from the pods"
    for rule in (rule for policy in policies for rule in policy["ingress"] if "from" not in rule):
        ports = [port["port"] for port in rule.get("ports", [])]
        if ports != [GATEWAY]:
            yield f"{f'ports {ports}' if ports else 'all ports'} are open to all pods"
    for document in file:
        match document:
            case {"kind": "RayCluster", "spec": spec} | {
                "kind": "RayService",
                "spec": {"rayClusterConfig": spec},
            }:
                yield from cluster_doors(spec, policies)
            case {"kind": "Service", "spec": {"type": kind}} if kind != "ClusterIP":
                yield f"a service of type {kind} opens it to the world unasked"
            case {"kind": "Secret"}:
                yield "a secret is in the file"


def cluster_doors(spec: dict[str, Any], policies: list[dict[str, Any]]) -> Iterator[str]:
    if spec.get("authOptions", {}).get("mode") != "token" or not spec["authOptions"].get(
        "secretName"
    ):
        yield "Ray asks for no token"
    groups = [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]
    pods = [group["template"]["spec"] for group in groups]
    for container in (
        *(one for pod in pods for one in pod["containers"]),
        spec.get("autoscalerOptions", {"env": []}),
    ):
        settings = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
        if settings.get("RAY_USE_TLS") != "1":
            yield "Ray talks in the clear"
        if settings.get("RAY_AUTH_MODE", "token") != "token":
            yield "Ray asks for no token"
    for pod in pods:
        asked = pod.get("securityContext", {})
        if (
            pod.get("hostNetwork")
            or not asked.get("runAsNonRoot")
            or any(one["securityContext"]["allowPrivilegeEscalation"] for one in pod["containers"])
        ):
            yield "a pod has more rights than it needs"
    shown = spec["headGroupSpec"]["rayStartParams"].get("dashboard-host")
    known = [
        rule
        for policy in policies
        for rule in policy["ingress"]
        if any(port["port"] in OPERATORS for port in rule.get("ports", []))
        and all("namespaceSelector" in peer for peer in rule.get("from", [{}]))
    ]
    if not is_loopback(shown) and not known:
        yield "the dashboard is neither on loopback nor for the operator alone"


# Deployments


def deployment_doors(file: File) -> Iterator[str]:
    plan = Deployment.model_validate(file[0])
    if plan.gateway.insecure:
        yield "the gateway is told to be insecure"
    if not is_loopback(plan.gateway.host):
        if plan.gateway.api_keys is None or plan.gateway.tls is None:
            yield "a public gateway without keys and TLS"
        if plan.security.tls is None:
            yield "actors of several nodes talk in the clear"


SHIPPED: list[tuple[str, Callable[[File], Iterator[str]]]] = [
    ("ray", ray_doors),
    ("kubernetes", manifest_doors),
    ("examples", deployment_doors),
]
FILES = [
    (path, doors) for folder, doors in SHIPPED for path in sorted((DEPLOY / folder).glob("*.yaml"))
]


def test_every_cluster_file_is_looked_at() -> None:
    looked_at = {path for path, _ in FILES}
    every = {
        path for path in DEPLOY.rglob("*.y*ml") if path.parent.name not in ("prometheus", "grafana")
    }
    assert every == looked_at
    assert {path.parent.name for path in looked_at} == {folder for folder, _ in SHIPPED}


@pytest.mark.parametrize(
    ("path", "doors"),
    FILES,
    ids=lambda value: f"{value.parent.name}/{value.stem}" if isinstance(value, Path) else "",
)
def test_a_shipped_file_is_closed(path: Path, doors: Callable[[File], Iterator[str]]) -> None:
    assert list(doors(load(path))) == []


Spoil = Callable[[Any], object]


def start(cluster: dict[str, Any], old: str, new: str) -> None:
    cluster["head_start_ray_commands"] = [
        command.replace(old, new) for command in cluster["head_start_ray_commands"]
    ]


def of_head(cluster: dict[str, Any]) -> Any:
    return cluster["spec"]["headGroupSpec"]


@pytest.mark.parametrize(
    ("file", "spoil", "door"),
    [
        ("ray/aws", lambda file: file[0]["file_mounts"].pop(TOKEN), "token is not sent"),
        ("ray/aws", lambda file: file[0].update(setup_commands=["make"]), "readable for others"),
        ("ray/aws", lambda file: start(file[0], f". {ENV} &&", ""), "without token and TLS"),
        (
            "ray/aws",
            lambda file: start(file[0], "ray start", "RAY_AUTH_MODE=disabled ray start"),
            "overrides token",
        ),
        (
            "ray/aws",
            lambda file: start(file[0], "--dashboard-host=127.0.0.1", ""),
            "dashboard is not on loopback",
        ),
        (
            "ray/aws",
            lambda file: start(file[0], "=127.0.0.1", "=0.0.0.0"),
            "dashboard is not on loopback",
        ),
        (
            "ray/aws",
            lambda file: file[0]["provider"]["security_group"]["IpPermissions"][0].update(
                ToPort=9000
            ),
            "beside the gateway's",
        ),
        ("kubernetes/cluster", lambda file: file.pop(), "no policy"),
        ("kubernetes/cluster", lambda file: file[-1]["spec"]["ingress"].append({}), "all ports"),
        (
            "kubernetes/cluster",
            lambda file: file[-1]["spec"]["ingress"].append({"ports": [{"port": 6379}]}),
            "6379",
        ),
        ("kubernetes/cluster", lambda file: file[0]["spec"].pop("authOptions"), "no token"),
        (
            "kubernetes/cluster",
            lambda file: of_head(file[0])["template"]["spec"]["containers"][0].pop("env"),
            "in the clear",
        ),
        (
            "kubernetes/cluster",
            lambda file: of_head(file[0])["rayStartParams"].update({"dashboard-host": "0.0.0.0"}),
            "dashboard",
        ),
        (
            "kubernetes/cluster",
            lambda file: of_head(file[0])["template"]["spec"].update(hostNetwork=True),
            "more rights",
        ),
        (
            "kubernetes/cluster",
            lambda file: file[1]["spec"].update(type="LoadBalancer"),
            "LoadBalancer",
        ),
        ("kubernetes/service", lambda file: file[1]["spec"]["ingress"].pop(), "dashboard"),
        ("examples/cloud", lambda file: file[0]["gateway"].pop("tls"), "without keys and TLS"),
        ("examples/cloud", lambda file: file[0]["gateway"].pop("api_keys"), "without keys and TLS"),
        ("examples/cloud", lambda file: file[0]["gateway"].update(insecure=True), "insecure"),
        ("examples/cloud", lambda file: file[0].pop("security"), "in the clear"),
    ],
)
def test_an_open_door_would_be_noticed(file: str, spoil: Spoil, door: str) -> None:
    folder = file.partition("/")[0]
    spoiled = copy.deepcopy(load(DEPLOY / f"{file}.yaml"))
    spoil(spoiled)
    assert any(door in found for found in dict(SHIPPED)[folder](spoiled))


# What they lean on


def test_the_settings_of_a_node_are_token_and_tls(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    said = subprocess.run(
        ["bash", "-c", f". {DEPLOY}/ray/env && env"],
        env=home,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    settings = dict(line.split("=", 1) for line in said.splitlines() if line.startswith("RAY_"))
    assert settings["RAY_AUTH_MODE"] == "token"
    assert settings["RAY_USE_TLS"] == "1"
    assert {"RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY"} <= set(settings)


def test_a_node_makes_its_keys_unreadable_for_others_before_anything_else() -> None:
    lines = (DEPLOY / "ray" / "node").read_text("utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("make "))
    assert {"chmod 600 ~/.ray/auth_token", "chmod -R go= ~/.outrider"} <= set(lines[:first])


def test_the_keys_that_are_made_are_private_and_stay(tmp_path: Path) -> None:
    if not (DEPLOY.parent / ".venv" / "bin" / "outrider").exists():
        pytest.skip("deploy/ray/keys calls the command of .venv: make install")
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    made: list[dict[Path, bytes]] = []
    for _ in range(2):
        subprocess.run(
            [DEPLOY / "ray" / "keys", "llm.example"],
            env=home,
            check=True,
            capture_output=True,
            cwd=tmp_path,
        )
        made.append(
            {
                path: path.read_bytes()
                for path in tmp_path.rglob("*")
                if path.is_file() and ".cache" not in path.parts
            }
        )
    assert made[0] == made[1]
    assert len(made[0][tmp_path / ".ray" / "auth_token"]) >= 32
    assert {
        stat.S_IMODE(path.stat().st_mode) & 0o077
        for path in (*made[0], tmp_path / ".outrider", tmp_path / ".outrider" / "certs")
    } == {0}
    certs = tmp_path / ".outrider" / "certs"
    for role in ROLES:
        read_credentials(
            TlsConfig(ca=certs / "ca.pem", cert=certs / "{role}.pem", key=certs / "{role}-key.pem"),
            role,
        )


@pytest.mark.parametrize(
    "path", sorted(path for path in DEPLOY.rglob("*") if path.is_file()), ids=lambda path: path.name
)
def test_no_file_of_deploy_switches_something_off(path: Path) -> None:
    text = path.read_text("utf-8")
    assert (
        re.findall(
            r"RAY_AUTH_MODE=(?!token)\S*|RAY_USE_TLS=0|--insecure|insecure: true|verify=False"
            r"|BEGIN [A-Z ]*PRIVATE",
            text,
        )
        == []
    )


def test_the_image_runs_as_nobody_of_importance() -> None:
    lines = (DEPLOY / "Dockerfile").read_text("utf-8").splitlines()
    assert [line.split()[1] for line in lines if line.startswith("USER ")] == ["outrider"]


def test_prometheus_asks_by_tls_and_with_a_key_from_a_file() -> None:
    (job,) = load(DEPLOY / "prometheus" / "prometheus.yml")[0]["scrape_configs"]
    assert job["scheme"] == "https"
    assert set(job["authorization"]) == {"type", "credentials_file"}
    assert "insecure_skip_verify" not in job["tls_config"]
