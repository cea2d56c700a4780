"""`outrider serve`: a deployment that goes on when the command is over; again, with another file, it changes to that one."""

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from actors.cli.commands.inlined import refuse_with_file
from actors.cli.commands.options import Address, Device, Dtype, Json
from actors.cli.views.generation_view import Progress
from actors.controller import client
from actors.controller.fleet_view import Fleet
from actors.launch import local_ray
from actors.launch.cluster import chosen_address, join_cluster
from actors.ray_session import NAMESPACE
from actors.tracing.recording import check_writable, record_until
from runtime import config
from runtime.config import Deployment, GatewayConfig
from runtime.core.sampling_params import check_int
from runtime.deployment_builder import build_deployment
from runtime.model_paths import bundled_model

HEAD_NODE = {
    "node:__internal_head__": 0.001
}  # where nothing but the loss of the cluster itself takes it along
FILE_OPTIONS = (
    "target",
    "draft",
    "drafters",
    "dtype",
    "device",
    "host",
    "port",
    "api_key_file",
    "insecure",
)
MAX_CONCURRENT_CALLS = (
    32  # of the controller at one time: gateways, commands, and those that wait for something
)


def serve(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(help="deployment file; `outrider config --example` prints one")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="model name or folder; default: the one that ships")
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(help="draft model or method (repeatable); default: the one that ships"),
    ] = None,
    drafters: Annotated[int, typer.Option(help="actors for each --draft")] = 1,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: float32 on CPU, the checkpoint's own on CUDA")
    ] = Dtype.auto,
    device: Device = Device.auto,
    host: Annotated[str, typer.Option(help="address that the gateway listens on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="of the gateway; 0: any")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="file of `NAME:KEY[:MODEL,...]` lines; default: nobody is asked for a key"
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="allow a public address without keys or TLS")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="record what happens when, until Ctrl-C: for `outrider trace` and ui.perfetto.dev"
        ),
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Start what is not there yet, change what is; return when all of it is ready. `outrider down` ends it."""
    if trace is not None:
        check_writable(trace)
    chosen = chosen_address(address)
    fresh = chosen is None and local_ray.find() is None
    if file is not None:
        refuse_with_file(context, str(file), *FILE_OPTIONS)
        plan = config.load_deployment(file)
    else:
        check_int("port", port, 0, 65535)
        gateway = GatewayConfig(
            host=host,
            port=port,
            api_keys=api_key_file and api_key_file.resolve(),
            insecure=insecure,
        )
        drafts = tuple(draft or (bundled_model("draft"),))
        pair = build_deployment(
            target or bundled_model("target"),
            drafts,
            drafters,
            dtype.value,
            device.value,
            chosen is None,
        )
        plan = pair.model_copy(update={"gateway": gateway})
    with Progress(quiet=as_json) as progress, exit_on_signals(), ExitStack() as undoing:
        warnings = check_plan(plan, chosen is None, progress)
        progress.note("joining Ray" if chosen or not fresh else "starting Ray")
        if fresh:
            undoing.callback(end_local)
        with (
            join_cluster(address, start=True),
            exit_on_signals(),
        ):  # again: Ray's own answer to SIGTERM, from here on, is to abort
            progress.note(f"loading {plan.target.model} and {len(plan.drafters())} drafters")
            fleet = deploy(plan)
        undoing.pop_all()
    if as_json:
        sys.stdout.write(
            json.dumps({"model": fleet.served_model, "gateways": list(fleet.gateways)}) + "\n"
        )
        sys.stdout.flush()
    else:
        show_fleet(plan, fleet, warnings)
    if trace is not None:
        Console(stderr=True, highlight=False).print(
            f"recording; Ctrl-C ends that and writes {trace}, the service goes on"
        )
        with exit_on_signals(), join_cluster(address):
            record_until(trace, threading.Event().wait)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end this command as Ctrl-C does, and what it has begun is undone."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as `nohup` wants it
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_local() -> None:
    if (started := local_ray.find()) is not None:
        local_ray.end(started)


def check_plan(plan: Deployment, local: bool, progress: Progress) -> tuple[str, ...]:
    """What can be said before anything is started; of the models, where they are on this machine. Returns what should be known of them."""
    progress.note("looking at the deployment")
    from actors.gateway.server import check_exposure
    from actors.launch.prepare import (
        check_models,
    )  # torch and transformers: `--help` and a wrong flag need neither

    check_exposure(plan.gateway)
    return check_models(plan).warnings if local else ()


def deploy(plan: Deployment) -> Fleet:
    """By the controller of this cluster; by a new one where there is none, which ends with all it has started if that fails."""
    import ray
    from ray.exceptions import RayTaskError

    from actors.controller.controller import Controller

    if client.find_controller() is None:
        kind = ray.remote(Controller).options(
            name=client.NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
            max_concurrency=MAX_CONCURRENT_CALLS,
            resources=HEAD_NODE,
        )
        handle: Any = kind.remote(plan, served=True)
        try:
            found: Fleet = ray.get(handle.start.remote())
        except RayTaskError:
            ray.get(handle.stop.remote())
            ray.kill(handle)
            raise
        return found
    changed: Fleet = client.ask_controller("apply", plan, timeout_s=None)
    return changed


def show_fleet(plan: Deployment, fleet: Fleet, warnings: tuple[str, ...]) -> None:
    console, errors = (
        Console(highlight=False, soft_wrap=True),
        Console(stderr=True, highlight=False),
    )
    for warning in warnings:
        errors.print(f"note: {warning}", style="yellow")
    for url in fleet.gateways:
        console.print(f"{fleet.served_model} is served at {url}/v1")
    if fleet.gateways:
        console.print(curl_command(fleet.gateways[0], fleet.served_model, plan.gateway))


def curl_command(url: str, model: str, gateway: GatewayConfig) -> str:
    """A first request, to be copied."""
    words = ["curl", f"{url}/v1/completions", "-H 'Content-Type: application/json'"]
    words += ['-H "Authorization: Bearer $KEY"'] if gateway.api_keys else []
    words += [f"--cacert {gateway.tls.ca}"] if gateway.tls else []
    body = json.dumps({"model": model, "prompt": "def main(", "max_tokens": 64}).replace(
        "'", "'\\''"
    )
    return " ".join([*words, f"-d '{body}'"])
