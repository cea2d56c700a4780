"""The files of deploy/, against what reads them."""

import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from runtime.config import Deployment, methods

ROOT = Path(__file__).parents[1]
HEAD, WORKERS = "192.0.2.1", ["192.0.2.2", "192.0.2.3"]


def cluster() -> dict[str, Any]:
    """cluster.yaml as a reader of deploy/README.md fills it in."""
    text = (ROOT / "deploy" / "cluster.yaml").read_text("utf-8").replace("HEAD_ADDRESS", HEAD).replace("USER", "me")
    for worker in WORKERS:
        text = text.replace("WORKER_ADDRESS", worker, 1)
    config: dict[str, Any] = yaml.safe_load(text)
    return config


def test_ray_takes_the_cluster_file() -> None:
    prepared = prepare_config(cluster())
    validate_config(prepared)
    assert prepared["provider"]["head_ip"] == HEAD
    assert prepared["max_workers"] == len(WORKERS)
    assert prepared["worker_start_ray_commands"] == cluster()["worker_start_ray_commands"]


def test_ray_would_notice_a_wrong_key() -> None:
    with pytest.raises(jsonschema.ValidationError, match="setup_command"):
        validate_config(prepare_config(cluster() | {"setup_command": []}))


def test_what_the_cluster_file_sends_is_there() -> None:
    sent = [source for source in cluster()["file_mounts"].values() if not source.startswith("~")]
    assert sent
    assert [source for source in sent if not (ROOT / source / "Makefile").exists()] == []


@pytest.mark.parametrize("commands", ["setup_commands", "head_start_ray_commands", "worker_start_ray_commands"])
def test_its_commands_are_shell(commands: str) -> None:
    for command in cluster()[commands]:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command


def test_the_image_copies_what_is_there_and_all_packages() -> None:
    lines = re.findall(r"^COPY (.+)$", (ROOT / "deploy" / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    copied = {source for line in lines for source in line.split()[:-1]}
    assert {name for name in copied if not (ROOT / name).exists()} == set()
    assert copied >= {"pyproject.toml", "constraints.txt", "runtime", "actors", "protos", "models", "bench"}


def test_the_deployment_in_the_readme_is_one() -> None:
    text = (ROOT / "deploy" / "README.md").read_text("utf-8")
    example = text[text.index("    target:\n") : text.index("A host offers")]
    deployment = Deployment.model_validate(yaml.safe_load(example))
    assert deployment.target.placement.resources == {"target": 1}
    assert {drafter.method for drafter in deployment.drafters} <= set(methods())
