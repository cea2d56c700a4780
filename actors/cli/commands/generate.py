"""`outrider generate`: continues one prompt."""

import asyncio
import json
import secrets
import sys
import uuid
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from actors.cli.commands.options import (
    Device,
    Dtype,
    InProcess,
    ModelDtype,
    NewCluster,
    check_utf8,
)
from actors.cli.commands.plan_options import make_plan
from actors.cli.views.generation_view import Progress, Stream, generation_json
from actors.launch.serving import OpenService, serving
from actors.tracing.trace_reader import save_trace
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.core.messages import Chunk, Request
from runtime.core.sampling_params import SamplingParams
from runtime.telemetry.tracing import Recording


class Switch(StrEnum):
    on = "on"
    off = "off"


class Schedule(StrEnum):
    living = "living"
    plain = "plain"
    sync = "sync"
    amusd = "amusd"
    pearl = "pearl"


def generate(
    context: typer.Context,
    target: Annotated[
        str | None, typer.Option(help="model name, folder or .gguf file; default: the bundled one")
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="draft model, method or head (repeatable); default: the bundled draft "
            "for the bundled target, else ngram-head and token-recycling"
        ),
    ] = None,
    drafters: Annotated[int, typer.Option(help="drafters for each --draft")] = 1,
    prompt: Annotated[str | None, typer.Option(help="text to continue")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="file with the text to continue; - for standard input")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="maximum of new tokens")] = 128,
    min_tokens: Annotated[int, typer.Option(help="minimum of new tokens")] = 0,
    temperature: Annotated[float, typer.Option(help="0: greedy")] = 0.0,
    top_p: float = 1.0,
    top_k: Annotated[int, typer.Option(help="0: all")] = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(help="makes the output reproducible; default: random, and reported"),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="stop before this text (repeatable)")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="continue after the end-of-text token")
    ] = False,
    dtype: ModelDtype = Dtype.auto,
    device: Device = Device.auto,
    speculation: Annotated[Switch, typer.Option(help="off: target alone")] = Switch.on,
    schedule: Annotated[
        Schedule, typer.Option(help="scheduler of the target; all but living are for comparison")
    ] = Schedule.living,
    trace: Annotated[
        Path | None,
        typer.Option(help="write a trace file for `outrider trace` and ui.perfetto.dev"),
    ] = None,
    deployment: Annotated[
        Path | None,
        typer.Option(help="YAML file with models, schedule and placement, in place of options"),
    ] = None,
    address: NewCluster = None,
    in_process: InProcess = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print only a JSON object on standard output")
    ] = False,
) -> None:
    """Continue a prompt. At a terminal, tokens of drafters are green, the target's are white."""
    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=secrets.randbits(63) if seed is None else seed,
        stop=tuple(stop or ()),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
    )
    wanted = speculation is Switch.on
    plan = make_plan(
        context,
        deployment,
        target,
        draft,
        drafters,
        dtype,
        device,
        address is None,
        wanted,
        schedule.value,
    )
    from actors.launch.prepare import prepare  # torch and transformers are slow to import

    prepared = prepare(plan, prompt_text(prompt, prompt_file), sampling, local=address is None)
    request = Request(uuid.uuid4().hex, prepared.prompt, sampling, speculation=wanted)
    recordings: list[Recording] | None = [] if trace else None
    with (
        Progress(quiet=as_json) as progress,
        serving(plan, address, in_process, progress.note, recordings) as opener,
    ):
        stream = Stream(progress, quiet=as_json)
        last = asyncio.run(run_request(opener, request, stream))
    if trace is not None and recordings is not None:
        save_trace(trace, recordings)
    if last.finish_reason == "error":
        raise Unavailable(f"the target failed: {last.error}")
    if as_json:
        sys.stdout.write(json.dumps(generation_json(plan, request, stream, last)) + "\n")
    else:
        stream.summary(prepared.warnings, last)


async def run_request(opener: OpenService, request: Request, stream: Stream) -> Chunk:
    """Shows all chunks; returns the last."""
    async with opener() as service:
        async for chunk in service.generate(request):
            stream.show(chunk)
            if chunk.finish_reason is not None:
                return chunk
    raise Unavailable("the target ended the stream without a finish reason: see its log")


def prompt_text(prompt: str | None, prompt_file: str | None) -> str:
    """Returns the prompt.

    Raises InvalidRequest unless exactly one readable, non-empty one is given.
    """
    if (prompt is None) == (prompt_file is None):
        raise InvalidRequest(
            "give exactly one of --prompt TEXT and --prompt-file FILE (or - for standard input)",
            "prompt",
        )
    if prompt is not None:
        text = check_utf8(prompt, "prompt")
    else:
        try:
            raw = (
                sys.stdin.buffer.read()
                if prompt_file == "-"
                else Path(str(prompt_file)).read_bytes()
            )
            text = raw.decode("utf-8")
        except OSError as error:
            raise InvalidRequest(
                f"cannot read {prompt_file} ({error.strerror}): give a readable file", "prompt_file"
            ) from error
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"{prompt_file} is not UTF-8 (byte {error.start}): convert it first", "prompt_file"
            ) from error
    if not text:
        raise InvalidRequest("the prompt is empty: give at least one character", "prompt")
    return text
