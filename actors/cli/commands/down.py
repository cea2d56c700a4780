"""`outrider down`: ends the deployment of `outrider serve`."""

import json
import sys

from actors.cli.commands.options import Address, Json
from actors.cli.views.generation_view import Progress
from actors.fleet import client
from actors.launch import local_ray
from actors.launch.cluster import chosen_address, join_cluster
from runtime.core.errors import OutriderError


def down(address: Address = None, as_json: Json = False) -> None:
    """End the deployment, and the local Ray if `outrider serve` has started one.

    Running requests are aborted.
    """
    with Progress(quiet=as_json) as progress:
        progress.note("ending targets, drafters and gateways")
        try:
            with join_cluster(address) as local:
                end_deployment()
        except OutriderError:
            if chosen_address(address) or (local := local_ray.find()) is None:
                raise
        if local is not None:  # even if it does not answer, or has no deployment
            progress.note("ending Ray")
            local_ray.end(local)
    if as_json:
        sys.stdout.write(json.dumps({"ended": True, "local_ray": local is not None}) + "\n")


def end_deployment() -> None:
    import ray

    controller = client.find_controller()
    client.ask_controller("stop")
    ray.kill(controller)
