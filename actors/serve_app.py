"""Outrider as a Ray Serve application, for KubeRay's RayService.

The application deploys and watches; requests do not pass through it. Its replica is healthy while
at least one target accepts sessions. KubeRay therefore restarts a lost deployment, and an upgrade
moves clients to the new cluster once it is ready.
"""

import subprocess
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from actors.fleet import client
from runtime.core.errors import Unavailable


class Arguments(BaseModel):
    """Arguments of the application. `deployment` is a file for `outrider serve` on the replica's
    node.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    deployment: Path


class DeploymentWatcher:
    def __init__(self, deployment: str) -> None:
        """Starts the deployment and returns when it is ready.

        Raises Unavailable with the error of `outrider serve` if the start fails.
        """
        done = subprocess.run(
            ["outrider", "serve", deployment, "--address", "auto"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Unavailable(done.stderr.strip())

    def check_health(self) -> None:
        """Answers Ray Serve's health check. Raises Unavailable while no target accepts sessions."""
        fleet = client.ask_controller("fleet")
        if not any(target.state == "ready" for target in fleet.targets):
            raise Unavailable("no target accepts sessions now: see `outrider status`")

    async def __call__(self, _: Any) -> str:
        return "requests go to the gateway\n"


def build(arguments: Arguments) -> Any:
    """Returns the application for the `args` of a serveConfigV2."""
    from ray import serve  # imported here, since only this function needs it

    options = {
        "num_cpus": 0,
        "resources": {"node:__internal_head__": 0.001},
    }  # the head node has the deployment file
    return serve.deployment(DeploymentWatcher, num_replicas=1, ray_actor_options=options).bind(
        str(arguments.deployment)
    )
