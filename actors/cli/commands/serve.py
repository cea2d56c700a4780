"""`outrider serve`: starts a deployment that outlives the command, or changes the running one."""

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
from actors.cli.commands.options import Address, Device, Dtype, Json, ModelDtype
from actors.cli.views.generation_view import Progress
from actors.fleet import client
from actors.fleet.fleet_state import Fleet
from actors.fleet.ray_session import NAMESPACE
from actors.launch import local_ray
from actors.launch.cluster import chosen_address, join_cluster
from actors.tracing.recording import check_writable, record_until
from runtime import config
from runtime.config import Deployment, GatewayConfig
from runtime.core.sampling_params import check_int
from runtime.deployment_builder import build_deployment
from runtime.model_paths import bundled_model, default_drafts

HEAD_NODE = {"node:__internal_head__": 0.001}  # the controller lives as long as the cluster
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
MAX_CONCURRENT_CALLS = 32  # of the controller: gateways, commands, and calls that wait


def serve(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(help="deployment file; see `outrider config --example`")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="model name, folder or .gguf file; default: the bundled one")
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="draft model or method (repeatable); default: the bundled draft "
            "for the bundled target, else ngram-head and token-recycling"
        ),
    ] = None,
    drafters: Annotated[int, typer.Option(help="drafters for each --draft")] = 1,
    dtype: ModelDtype = Dtype.auto,
    device: Device = Device.auto,
    host: Annotated[str, typer.Option(help="listening address of the gateway")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port of the gateway; 0: any free port")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="file of `NAME:KEY[:MODEL,...]` lines; default: no API keys"),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="allow a public address without keys or TLS")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="record a trace until Ctrl-C, for `outrider trace` and ui.perfetto.dev"),
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Start a deployment, or change the running one to this; return when it is ready.

    `outrider down` ends it.
    """
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
        drafts = tuple(draft or default_drafts(target))
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
        warnings = check_plan(plan, chosen is None, fresh, progress)
        progress.note("joining Ray" if chosen or not fresh else "starting Ray")
        if fresh:
            undoing.callback(end_local)
        # Again, since Ray installs a handler that aborts on SIGTERM.
        with join_cluster(address, start=True), exit_on_signals():
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
            f"recording; Ctrl-C writes {trace}, and the deployment keeps running"
        )
        with exit_on_signals(), join_cluster(address):
            record_until(trace, threading.Event().wait)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP exit inside the block, so that cleanup runs as after Ctrl-C."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_local() -> None:
    if (started := local_ray.find()) is not None:
        local_ray.end(started)


def check_plan(plan: Deployment, local: bool, fresh: bool, progress: Progress) -> tuple[str, ...]:
    """Validates the deployment before anything is started.

    If it is local, that includes models and the gateway's files; if it is fresh too, also the
    gateway's address. Returns warnings about the models.
    """
    progress.note("checking the deployment")
    from actors.gateway.server import check_exposure, check_gateway
    from actors.launch.prepare import check_models  # torch and transformers are slow to import

    if not local:
        check_exposure(plan.gateway)
        return ()
    check_gateway(plan.gateway, starts=fresh)
    return check_models(plan).warnings


def deploy(plan: Deployment) -> Fleet:
    """Applies the deployment with the controller of this cluster, or with a new one.

    A new controller ends, with all that it has started, if that fails.
    """
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
    """Returns a command line for a first request."""
    words = ["curl", f"{url}/v1/completions", "-H 'Content-Type: application/json'"]
    words += ['-H "Authorization: Bearer $KEY"'] if gateway.api_keys else []
    words += [f"--cacert {gateway.tls.ca}"] if gateway.tls else []
    body = json.dumps({"model": model, "prompt": "def main(", "max_tokens": 64}).replace(
        "'", "'\\''"
    )
    return " ".join([*words, f"-d '{body}'"])
