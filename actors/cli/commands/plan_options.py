"""Makes the deployment that the options of a command describe, or reads it from a file."""

from pathlib import Path

import typer

from actors.cli.commands.inlined import refuse_with_file
from actors.cli.commands.options import Device, Dtype
from runtime.config import Deployment, Policy, load_deployment
from runtime.deployment_builder import build_deployment
from runtime.model_paths import bundled_model, default_drafts

FILE_OPTIONS = ("target", "draft", "drafters", "dtype", "device", "schedule")


def make_plan(
    context: typer.Context,
    deployment: Path | None,
    target: str | None,
    drafts: list[str] | None,
    drafters: int,
    dtype: Dtype,
    device: Device,
    local: bool,
    speculation: bool,
    schedule: Policy = "living",
) -> Deployment:
    """Returns the deployment of a command that runs its own.

    Raises InvalidRequest if options are given that the file replaces.
    """
    if deployment is not None:
        refuse_with_file(context, str(deployment), *FILE_OPTIONS)
        return load_deployment(deployment)
    chosen = (tuple(drafts) if drafts else default_drafts(target)) if speculation else ()
    name = target or bundled_model("target")
    return build_deployment(name, chosen, drafters, dtype.value, device.value, local, schedule)
