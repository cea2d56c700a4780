"""The files of deploy/ are valid for the programs that read them.

Ray's own validator checks the cluster files. `bash -n` checks the shell scripts, and those that
make keys are run. The schemas of tests/support/kubernetes.py check the manifests.
"""

import json
import re
import shutil
import ssl
import stat
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from actors.gateway.api_keys import is_open
from actors.serve_app import Arguments
from runtime import config
from runtime.config import Deployment
from runtime.method_registry import drafting_methods
from tests.support.deploy_files import CLUSTERS, DEPLOY, EXAMPLES, MANIFESTS, SCRIPTS, by_name, read
from tests.support.kubernetes import schema_of
from tests.support.paths import ROOT
from tests.system.cluster.cluster_operator import DEPLOYMENT, cluster_file

SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USE_TLS": "1",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


# Cluster files


@by_name(CLUSTERS)
def test_ray_takes_the_cluster_file_and_would_notice_a_wrong_key(file: Path) -> None:
    prepared = prepare_config(read(file))
    validate_config(prepared)
    assert prepared["worker_start_ray_commands"] == read(file)["worker_start_ray_commands"]
    with pytest.raises(jsonschema.ValidationError, match="setup_command"):
        validate_config(prepare_config(read(file) | {"setup_command": []}))


def test_the_filled_in_on_premise_file_is_valid() -> None:
    prepared = prepare_config(yaml.safe_load(cluster_file()))
    validate_config(prepared)
    assert prepared["max_workers"] == 3
    assert not re.search(r"[A-Z]+_ADDRESS|\bUSER\b", re.sub(r"#.*", "", cluster_file()))


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_targets_and_drafters_run_on_separate_node_types(name: str) -> None:
    kinds = read(DEPLOY / "ray" / f"{name}.yaml")["available_node_types"]
    assert {kind for kind, content in kinds.items() if "GPU" not in content["resources"]} == {
        "head"
    }
    for kind in ("target", "drafter"):
        assert kinds[kind]["resources"][kind] == 1
        assert kinds[kind]["min_workers"] < kinds[kind]["max_workers"]
    machine = "InstanceType" if name == "aws" else "machineType"
    assert len({content["node_config"][machine] for content in kinds.values()}) == 3


@by_name(CLUSTERS)
def test_no_cluster_file_is_open(file: Path) -> None:
    content = read(file)
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = content[commands][-1]
        assert start.startswith(". ~/outrider/deploy/ray/env && "), "the settings come first"
        assert not set(re.findall(r"RAY_\w+(?==)", start)) & set(SETTINGS), (
            "and nothing undoes them"
        )
    assert "--dashboard-host=127.0.0.1" in content["head_start_ray_commands"][-1]
    assert {"~/.ray/auth_token", "~/.outrider/ray-ca", "~/.outrider/certs"} <= set(
        content["file_mounts"]
    )
    assert content["setup_commands"] == ["~/outrider/deploy/ray/node"]


def test_the_settings_of_the_nodes() -> None:
    shell = 'set -a; HOME=/h; . deploy/ray/env; for name in "$@"; do echo "${!name}"; done'
    names = [*SETTINGS, "RAY_TLS_SERVER_KEY", "PATH"]
    done = subprocess.run(
        ["bash", "-c", shell, "-", *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = dict(zip(names, done.stdout.splitlines(), strict=True))
    assert found.items() >= SETTINGS.items()
    assert found["RAY_TLS_SERVER_KEY"] == "/h/.outrider/node/node-key.pem"
    assert found["PATH"].startswith("/h/outrider/.venv/bin:")


@by_name(CLUSTERS)
def test_its_commands_are_shell(file: Path) -> None:
    lists = [value for key, value in read(file).items() if key.endswith("_commands")]
    for command in [command for commands in lists for command in commands]:
        done = subprocess.run(
            ["bash", "-n", "-c", command], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), command


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_are_shell_that_stops_at_a_fault(name: str) -> None:
    script = DEPLOY / "ray" / name
    assert script.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in script.read_text("utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(("starts_at", "tries", "code"), [(1, 1, 0), (3, 3, 0), (1000, 20, 1)])
def test_ray_is_started_again_until_it_is_there(
    starts_at: int, tries: int, code: int, tmp_path: Path
) -> None:
    ray = (
        f'echo "$@" >>"{tmp_path}/calls"\n'
        f'[ "$1" = stop ] || [ "$(grep -c ^start "{tmp_path}/calls")" -ge {starts_at} ]\n'
    )
    for name, body in (("ray", ray), ("sleep", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}", "utf-8")
        (tmp_path / name).chmod(0o755)
    command = [str(DEPLOY / "ray" / "again"), "ray", "start", "--resources={}"]
    done = subprocess.run(
        command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, check=False
    )
    assert done.returncode == code
    calls = (tmp_path / "calls").read_text("utf-8").splitlines()
    assert calls == (["start --resources={}", "stop"] * tries)[: None if code else -1], (
        "what a failed start has left is ended"
    )


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_keys_are_made_once_for_their_owner_alone_and_nodes_get_certificates_by_them(
    tmp_path: Path,
) -> None:
    def keys() -> dict[str, bytes]:
        environment = {"HOME": str(tmp_path), "PATH": "/usr/local/bin:/usr/bin:/bin"}
        subprocess.run([DEPLOY / "ray" / "keys", "192.0.2.1"], env=environment, check=True)
        return {
            str(file.relative_to(tmp_path)): file.read_bytes()
            for file in tmp_path.rglob("*")
            if file.is_file()
        }

    first = keys()
    made = (
        ".ray/auth_token",
        ".outrider/api-keys",
        ".outrider/ray-ca/ca-key.pem",
        ".outrider/certs/https-key.pem",
    )
    assert set(made) <= set(first)
    assert [name for name in made if (tmp_path / name).stat().st_mode & 0o077] == []
    assert keys() == first

    ca, out = tmp_path / ".outrider" / "ray-ca", tmp_path / "node"
    subprocess.run([DEPLOY / "ray" / "certify", ca, out, "*.example.svc"], check=True)
    subprocess.run(
        ["openssl", "verify", "-CAfile", ca / "ca.pem", out / "node.pem"],
        capture_output=True,
        check=True,
    )
    context = ssl.create_default_context(cafile=ca / "ca.pem")
    context.load_cert_chain(out / "node.pem", out / "node-key.pem")
    said = subprocess.run(
        ["openssl", "x509", "-noout", "-text", "-in", out / "node.pem"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "127.0.0.1" in said
    assert "DNS:*.example.svc" in said
    assert "CA:FALSE" in said
    assert (out / "node-key.pem").stat().st_mode & 0o077 == 0


# Deployment files


@by_name(EXAMPLES)
def test_the_examples_are_valid_and_not_open(file: Path) -> None:
    deployment = config.load_deployment(file)
    assert {pool.method for pool in deployment.pools} <= set(drafting_methods())
    if deployment.gateway.host != "127.0.0.1":
        assert deployment.gateway.api_keys
        assert deployment.gateway.tls
        assert deployment.security.tls
        assert not deployment.gateway.insecure
        assert deployment.target.placement.resources == {"target": 1}
        assert deployment.pools[0].placement.resources == {"drafter": 1}


def test_the_deployment_of_the_cluster_trial_is_valid() -> None:
    assert Deployment.model_validate(yaml.safe_load(DEPLOYMENT)).target.replicas == 2


# Kubernetes


def ray_cluster(name: str) -> dict[str, Any]:
    first = next(
        iter(yaml.safe_load_all((DEPLOY / "kubernetes" / f"{name}.yaml").read_text("utf-8")))
    )
    found: dict[str, Any] = first["spec"].get("rayClusterConfig", first["spec"])
    return found


@by_name(MANIFESTS)
def test_the_manifests_have_known_fields_alone(file: Path) -> None:
    for document in yaml.safe_load_all(file.read_text("utf-8")):
        jsonschema.validate(document, schema_of(document["apiVersion"], document["kind"]))


@by_name(MANIFESTS)
def test_the_pods_are_closed_placed_and_complete(file: Path) -> None:
    spec = ray_cluster(file.stem)
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"target", "drafter"}
    for name, group in groups.items():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {name: 1}
        assert group["template"]["spec"]["nodeSelector"] == {"outrider/role": name}
    for pod in (group["template"]["spec"] for group in (spec["headGroupSpec"], *groups.values())):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"] + pod["initContainers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        settings = {setting["name"]: setting["value"] for setting in pod["containers"][0]["env"]}
        assert (
            settings.items()
            >= {name: value for name, value in SETTINGS.items() if name != "RAY_AUTH_MODE"}.items()
        )
        assert pod["initContainers"][0]["command"][0] == "/srv/outrider/deploy/ray/certify"


@by_name(MANIFESTS)
def test_the_gateway_finds_its_keys_and_takes_them_for_closed(file: Path) -> None:
    deployment = config.load_deployment(DEPLOY / "examples" / "kubernetes.yaml")
    pod = ray_cluster(file.stem)["headGroupSpec"]["template"]["spec"]
    (laid,) = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "api-keys"]
    (mount,) = [
        mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "api-keys"
    ]
    assert deployment.gateway.api_keys == Path(mount["mountPath"]) / "api-keys", (
        "the name of the key within the secret"
    )
    assert "subPath" not in mount, "or a new key would not be seen"
    user = pod["securityContext"]
    assert user["fsGroup"] == user["runAsUser"] != 0, "the files are root's, and of this group"
    assert not is_open(laid["defaultMode"], owner=0, reader=user["runAsUser"])


def test_the_service_is_the_cluster_but_for_what_the_operator_asks() -> None:
    cluster, service = ray_cluster("cluster"), ray_cluster("service")
    mine, theirs = (
        spec["headGroupSpec"]["template"]["spec"]["containers"][0] for spec in (cluster, service)
    )
    assert mine.pop("readinessProbe")["httpGet"]["path"] == "/ready"
    assert {port["name"] for port in theirs.pop("ports")} - {
        port["name"] for port in mine.pop("ports")
    } == {"dashboard", "serve"}
    hosts = [
        spec["headGroupSpec"]["rayStartParams"].pop("dashboard-host") for spec in (cluster, service)
    ]
    assert hosts == ["127.0.0.1", "0.0.0.0"]
    assert cluster == service


def test_the_application_of_the_service_is_there_and_takes_its_arguments() -> None:
    document = next(
        iter(yaml.safe_load_all((DEPLOY / "kubernetes" / "service.yaml").read_text("utf-8")))
    )
    application = yaml.safe_load(document["spec"]["serveConfigV2"])["applications"][0]
    assert application["import_path"] == "actors.serve_app:build"
    Arguments.model_validate(application["args"])


# The image


def test_the_image_copies_what_is_there_and_all_packages() -> None:
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    copied = {
        source
        for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert {name for name in copied if not (ROOT / name).exists()} == set()
    assert copied >= {
        "pyproject.toml",
        "constraints.txt",
        "runtime",
        "actors",
        "protos",
        "models",
        "training",
        "bench",
        "experiments",
    }
    sent = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
        if line.startswith("!")
    }
    assert sent == copied
    assert text.index("\nUSER outrider") < text.index("\nENTRYPOINT")
