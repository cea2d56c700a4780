"""Outrider as an application of Ray Serve, for KubeRay's RayService: it deploys and watches; no request goes through it.

Its replica is healthy while some target takes sessions. So KubeRay brings a deployment up again that was lost, and moves clients to
the new cluster of an upgrade when that one is ready.
"""

import subprocess
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from actors.controller import client
from runtime.core.errors import Unavailable


class Arguments(BaseModel):
    """`deployment`: the file that `outrider serve` takes, on the node of the replica."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    deployment: Path


class DeploymentWatcher:
    def __init__(self, deployment: str) -> None:
        """Returns when the deployment is ready. Raises Unavailable with what `outrider serve` says where it does not become so."""
        done = subprocess.run(
            ["outrider", "serve", deployment, "--address", "auto"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Unavailable(done.stderr.strip())

    def check_health(self) -> None:
        """Answers Ray Serve. Raises Unavailable while no target takes sessions."""
        fleet = client.ask_controller("fleet")
        if not any(target.state == "ready" for target in fleet.targets):
            raise Unavailable("no target takes sessions now: see `outrider status`")

    async def __call__(self, _: Any) -> str:
        return "requests go to the gateway\n"


def build(arguments: Arguments) -> Any:
    """The application, from the `args` of a serveConfigV2."""
    from ray import serve  # nothing else needs it

    options = {
        "num_cpus": 0,
        "resources": {"node:__internal_head__": 0.001},
    }  # where the deployment file lies
    return serve.deployment(DeploymentWatcher, num_replicas=1, ray_actor_options=options).bind(
        str(arguments.deployment)
    )
