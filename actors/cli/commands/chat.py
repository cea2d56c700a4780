"""`outrider chat`: talks with a model at the terminal."""

import contextlib
import secrets
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from actors.cli.commands.generate import Switch
from actors.cli.commands.options import (
    Device,
    Dtype,
    InProcess,
    ModelDtype,
    NewCluster,
    check_utf8,
)
from actors.cli.commands.plan_options import make_plan
from actors.cli.views.generation_view import Progress, Stream
from actors.launch.serving import OpenService, Service, serving
from actors.rpc.loop_thread import SIGNAL_POLL_S, LoopThread
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.core.messages import Chunk, Request
from runtime.core.sampling_params import SamplingParams
from runtime.models.catalogue import CHAT_MODEL

DEFAULT_MAX_TOKENS = 512
PROMPT = "> "
CANCEL_TIMEOUT_S = 10.0


def chat(
    context: typer.Context,
    target: Annotated[
        str, typer.Option(help="model name, folder or .gguf file, with a chat template")
    ] = CHAT_MODEL,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="draft model, method or head (repeatable); default: the bundled draft "
            "for the bundled target, else ngram-head and token-recycling"
        ),
    ] = None,
    drafters: Annotated[int, typer.Option(help="drafters for each --draft")] = 1,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    temperature: Annotated[float, typer.Option(help="0: greedy")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="makes the answers reproducible; default: random")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"maximum tokens of an answer; default: {DEFAULT_MAX_TOKENS}, at most half of "
            "the context"
        ),
    ] = None,
    dtype: ModelDtype = Dtype.auto,
    device: Device = Device.auto,
    speculation: Annotated[Switch, typer.Option(help="off: target alone")] = Switch.on,
    deployment: Annotated[
        Path | None, typer.Option(help="YAML file with models and placement, in place of options")
    ] = None,
    address: NewCluster = None,
    in_process: InProcess = False,
) -> None:
    """Talk with a model. Ctrl-C ends an answer, Ctrl-D the chat.

    Standard input that is not a terminal gets an answer for each of its lines.
    """
    sampling = SamplingParams(
        temperature=temperature,
        seed=secrets.randbits(63) if seed is None else seed,
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
    )
    wanted = speculation is Switch.on
    plan = make_plan(
        context, deployment, target, draft, drafters, dtype, device, address is None, wanted
    )
    # torch and transformers are slow to import
    from actors.cli.conversation import Conversation, answer_room
    from actors.launch.prepare import check_models

    found = check_models(plan, local=address is None)
    if found.tokenizer.chat_template is None:
        raise InvalidRequest(
            f"{plan.target.model} has no chat template: choose an instruct model, "
            "or use outrider generate",
            "target",
        )
    room = answer_room(max_tokens, DEFAULT_MAX_TOKENS, found.context)
    history = Conversation(found.tokenizer, found.context, room)
    if system is not None:
        history.messages.append({"role": "system", "content": check_utf8(system, "system")})
    params = replace(sampling, max_tokens=room)
    with (
        Progress(quiet=False) as progress,
        serving(plan, address, in_process, progress.note) as opener,
        Talker(opener) as talker,
    ):
        progress.done()
        for warning in found.warnings:
            progress.console.print(f"note: {warning}", style="yellow", soft_wrap=True)
        for line in questions(sys.stdin.isatty()):
            try:
                prompt, dropped = history.ask(line)
            except InvalidRequest as error:
                progress.console.print(str(error), style="red", markup=False, soft_wrap=True)
                continue
            if dropped:
                progress.console.print(
                    f"the context is full: {dropped} of the oldest questions are forgotten",
                    style="yellow",
                    soft_wrap=True,
                )
            stream = Stream(progress, quiet=False)
            request = Request(uuid.uuid4().hex, prompt, params, speculation=wanted)
            last = talker.answer(request, stream.show)
            history.answered(stream.text)
            stream.one_line_summary(last)


def questions(terminal: bool) -> Iterator[str]:
    """Yields the lines that are not blank, until the end of the input."""
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() edits lines and keeps a history with it
    while True:
        try:
            line = check_utf8(input(PROMPT) if terminal else read_line(), "prompt")
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            continue
        except EOFError:
            if terminal:
                sys.stdout.write("\n")
            return
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"standard input is not {error.encoding} (byte {error.start}): convert it first, "
                "or set PYTHONIOENCODING to its encoding",
                "prompt",
            ) from error
        if line.strip():
            yield line.strip()


def read_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


@contextlib.contextmanager
def interrupt_event() -> Iterator[threading.Event]:
    """Yields an event that Ctrl-C sets, in place of an exception that could come anywhere.

    A process that ignores Ctrl-C goes on ignoring it. To be used on the main thread.
    """
    event = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        yield event
        return
    signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


class Talker:
    """Runs the service on a loop of its own, so that drafters rest while the user types."""

    def __init__(self, opener: OpenService) -> None:
        self._opener, self._loop = opener, LoopThread("chat")
        self._closing = contextlib.AsyncExitStack()
        self._service: Service | None = None

    def __enter__(self) -> "Talker":
        try:
            self._service = self._loop.run(self._closing.enter_async_context(self._opener()))
        except BaseException:
            self._loop.stop()
            raise
        return self

    def answer(self, request: Request, show: Callable[[Chunk], None]) -> Chunk | None:
        """Shows the chunks of an answer. Returns the last one, or None after Ctrl-C.

        Raises Unavailable if the target fails.
        """
        over = threading.Event()
        with interrupt_event() as interrupted:
            future = self._loop.submit(self._stream(request, show, over))
            while not wait([future], SIGNAL_POLL_S).done:
                if interrupted.is_set():
                    future.cancel()
                    over.wait(CANCEL_TIMEOUT_S)
                    return None
        last = future.result()
        if last.finish_reason == "error":
            raise Unavailable(f"the target failed: {last.error}")
        return last

    async def _stream(
        self, request: Request, show: Callable[[Chunk], None], over: threading.Event
    ) -> Chunk:
        assert self._service is not None
        try:
            async with contextlib.aclosing(self._service.generate(request)) as chunks:
                async for chunk in chunks:
                    show(chunk)
                    if chunk.finish_reason is not None:
                        return chunk
        finally:
            over.set()
        raise Unavailable("the target ended the stream without a finish reason: see its log")

    def __exit__(self, *_: object) -> None:
        try:
            self._loop.run(self._closing.aclose())
        finally:
            self._loop.stop()
