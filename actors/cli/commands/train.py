"""`outrider train METHOD`: something that guesses ahead of a target, trained on texts and on what the target itself writes."""

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from actors.cli.commands.options import Device
from actors.launch.serving import serving
from runtime.core.errors import InvalidRequest
from runtime.core.sampling_params import check_int, check_range
from runtime.deployment_builder import build_deployment
from runtime.model_paths import bundled_model, cache_folder
from training.loss_kind import LossKind

if TYPE_CHECKING:
    from runtime.core.messages import Request
    from training.acceptance import HeldOutAcceptance
    from training.loop import StepCallback
    from training.outputs import TargetText
    from training.progress import ProgressBar
    from training.run import TrainingData, TrainingJob
    from training.shapes import DraftShape
    from training.teacher import Teacher
    from training.text import Document

MAX_STEPS, MAX_BATCH, MAX_OWN_TOKENS, MAX_LAYERS = 10_000_000, 4096, 10_000_000_000, 256

train = typer.Typer(
    help="Train what guesses ahead of a target. Interrupted and started again by the same command, it goes on where it was; "
    "the folder is there once it is whole, a Hugging Face folder of safetensors with a card.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

Target = Annotated[
    str | None, typer.Option(help="model name or folder; default: the one that ships")
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        help="files or folders of UTF-8 text (repeatable); default: Python's standard library"
    ),
]
Out = Annotated[
    Path, typer.Option(help="the folder to be made; unfinished work is in FOLDER.partial beside it")
]
Steps = Annotated[int, typer.Option(help="of the optimizer")]
Batch = Annotated[int, typer.Option(help="texts in each step")]
Context = Annotated[int, typer.Option(help="tokens of a text")]
Own = Annotated[
    int,
    typer.Option(
        help="so many tokens are written by the target itself first, and are half of each batch; 0: none"
    ),
]
Seed = Annotated[
    int, typer.Option(help="same seed, same result on the same CPU and number of threads")
]


@train.command()
def medusa(
    out: Out,
    target: Target = None,
    data: Data = None,
    heads: Annotated[int, typer.Option(help="places ahead")] = 4,
    blocks: Annotated[int, typer.Option(help="residual blocks of each head")] = 1,
    steps: Steps = 600,
    batch: Batch = 8,
    context: Context = 256,
    own: Own = 200_000,
    seed: Seed = 0,
    device: Device = Device.auto,
) -> None:
    """Heads on the target's last hidden state, one for each place ahead (arXiv 2401.10774). Small, and quick to train."""
    check_int("heads", heads, 1, 16)
    check_int("blocks", blocks, 1, 8)
    order = make_order(
        "medusa", target, out, {"heads": heads, "blocks": blocks}, steps, batch, context, own, seed
    )
    with prepare_training(order, data, device) as (material, work, tell):
        from runtime.heads.medusa import Medusa
        from training.medusa import make_forward
        from training.run import train_head

        made = Medusa(material.teacher.hidden_size, heads, blocks)
        print_report(order, train_head(order, material, made, make_forward(made), work, tell))


@train.command("hidden-transfer")
def hidden_transfer(
    out: Out,
    target: Target = None,
    data: Data = None,
    positions: Annotated[int, typer.Option(help="places ahead")] = 3,
    layers: Annotated[
        list[int] | None,
        typer.Option(help="where each enters (repeatable, rising); default: a third of the way up"),
    ] = None,
    steps: Steps = 400,
    batch: Batch = 4,
    context: Context = 256,
    own: Own = 200_000,
    seed: Seed = 0,
    device: Device = Device.auto,
) -> None:
    """Linear maps to pseudo hidden states, which pass the target's upper layers (arXiv 2404.12022). Dearer to train, guesses better."""
    check_int("positions", positions, 1, 16)
    chosen = entry_layers(target or bundled_model("target"), layers, positions)
    order = make_order(
        "hidden-transfer", target, out, {"layers": chosen}, steps, batch, context, own, seed
    )
    from training.hidden_transfer import check_target, make_forward

    with prepare_training(order, data, device, lambda teacher: check_target(teacher, context)) as (
        material,
        work,
        tell,
    ):
        from runtime.heads.hidden_transfer import HiddenTransfer
        from training.run import train_head

        made = HiddenTransfer(material.teacher.hidden_size, chosen)
        print_report(
            order,
            train_head(order, material, made, make_forward(made, material.teacher), work, tell),
        )


@train.command()
def s3d(
    out: Out,
    target: Target = None,
    data: Data = None,
    skip: Annotated[
        str | None,
        typer.Option(help="layers to leave out, such as 3-7 or 2,4-6; default: the middle ones"),
    ] = None,
    masks: Annotated[int, typer.Option(help="places ahead of the next that a pass guesses")] = 3,
    rank: Annotated[int, typer.Option(help="of the adapter on the layers that stay")] = 16,
    steps: Steps = 600,
    batch: Batch = 4,
    context: Context = 256,
    own: Own = 200_000,
    seed: Seed = 0,
    device: Device = Device.auto,
) -> None:
    """A drafter out of some of the target's own layers, which guesses several places in a pass (arXiv 2405.20314)."""
    check_int("masks", masks, 1, 16)
    check_int("rank", rank, 1, 1024)
    layers = kept_layers(depth_of(target or bundled_model("target")), skip)
    order = make_order(
        "s3d",
        target,
        out,
        {"layers": layers, "masks": masks, "rank": rank},
        steps,
        batch,
        context,
        own,
        seed,
    )
    from training import s3d as method
    from training.hidden_transfer import check_target

    with prepare_training(order, data, device, lambda teacher: check_target(teacher, context)) as (
        material,
        work,
        tell,
    ):
        from training.heads import DRAFT_OFFSET
        from training.run import train_head

        made = method.new_s3d(material.teacher, layers, masks, rank, seed)
        forward, settings = (
            method.make_forward(made, material.teacher, layers),
            method.s3d_settings(steps, seed),
        )
        print_report(
            order, train_head(order, material, made, forward, work, tell, DRAFT_OFFSET, settings)
        )


@train.command()
def draft(
    out: Out,
    target: Target = None,
    data: Data = None,
    latency: Annotated[
        float | None,
        typer.Option(help="milliseconds that a pass of 4 rows may take here: proposes the shape"),
    ] = None,
    shape: Annotated[str | None, typer.Option(help="HIDDENxLAYERS, such as 128x2")] = None,
    start: Annotated[
        str | None, typer.Option(help="a draft model to go on from: name or folder")
    ] = None,
    loss: Annotated[
        LossKind,
        typer.Option(
            help="towards the target's distribution (kl for temperature 0, tvd++ for above), or the next token alone"
        ),
    ] = LossKind.tvd_plus_plus,
    steps: Steps = 900,
    batch: Batch = 16,
    context: Context = 256,
    own: Own = 500_000,
    seed: Seed = 0,
    device: Device = Device.auto,
) -> None:
    """A draft model, small enough for a budget of time, aligned with its target (arXiv 2402.01528, 2403.00858)."""
    if sum(choice is not None for choice in (latency, shape, start)) != 1:
        raise InvalidRequest(
            "give exactly one of --latency, --shape and --start: how large the draft model is to be",
            "latency",
        )
    if latency is not None:
        check_range("latency", latency, 0.0, 1e5, above=True)
    given = parse_shape(shape) if shape is not None else None
    settings = {
        "loss": loss.value,
        "latency": latency,
        "shape": shape,
        "start": start and f"{start} ({short_fingerprint(start)})",
    }
    order = make_order("draft", target, out, settings, steps, batch, context, own, seed)
    if start is not None:
        check_vocabulary(order.target, start)
    with prepare_training(order, data, device) as (material, work, tell):
        from training import draft as method
        from training.run import train_draft
        from training.shapes import DraftShape, make_measure

        teacher = material.teacher
        curve: dict[DraftShape, dict[int, float]] = {}
        if latency is not None:
            measure = make_measure(teacher.model.vocabulary, teacher.model.device)
            given, curve = method.settle_shape(
                work, latency / 1e3, teacher.model.vocabulary, measure
            )
        module = (
            method.new_draft(given, teacher, seed)
            if given
            else method.load_start(str(start), teacher.model.device)
        )
        print_report(order, train_draft(order, material, module, loss, curve, work, tell))


def parse_shape(shape: str) -> "DraftShape":
    """Raises InvalidRequest for what is no shape."""
    from training.shapes import HIDDEN_STEP, MAX_HIDDEN, DraftShape

    found = re.fullmatch(r"(\d{1,5})x(\d{1,3})", shape)
    if (
        not found
        or int(found[1]) % HIDDEN_STEP
        or not HIDDEN_STEP <= int(found[1]) <= MAX_HIDDEN
        or not 1 <= int(found[2]) <= MAX_LAYERS
    ):
        what = f"a multiple of {HIDDEN_STEP} up to {MAX_HIDDEN}, and 1 to {MAX_LAYERS} layers"
        raise InvalidRequest(
            f"shape {shape[:32]!r} is not allowed: give HIDDENxLAYERS, {what}, such as 128x2",
            "shape",
        )
    return DraftShape(int(found[1]), int(found[2]))


def short_fingerprint(model: str) -> str:
    """Of its files, so that other ones are another training."""
    from training.teacher import fingerprint

    return fingerprint(model)[:12]


def check_vocabulary(target: str, start: str) -> None:
    """Raises PairMismatch, and ModelRefused as of loading."""
    from actors.launch.prepare import context_length
    from runtime.models.loader import load_tokenizer
    from runtime.models.vocab_check import check_pair

    check_pair(
        load_tokenizer(target),
        load_tokenizer(start),
        (target, start),
        (context_length(target), context_length(start)),
    )


def depth_of(target: str) -> int:
    """Its layers. Raises ModelRefused."""
    from runtime.models.loader import find_folder, read_config

    depth: int = (
        read_config(find_folder(target), target).get_text_config(decoder=True).num_hidden_layers
    )
    return depth


def kept_layers(depth: int, skip: str | None) -> list[int]:
    """The layers that are left. Raises InvalidRequest for numbers that are none, and for all of them."""
    from training.s3d import default_skipped

    left_out = set(default_skipped(depth))
    if skip is not None:
        pieces = re.fullmatch(r"(\d{1,4}(-\d{1,4})?,)*", f"{skip},") and [
            piece.partition("-") for piece in skip.split(",")
        ]
        left_out = {
            layer
            for first, _, last in pieces or ()
            for layer in range(int(first), int(last or first) + 1)
        }
    layers = [layer for layer in range(depth) if layer not in left_out]
    if not layers or not left_out <= set(range(depth)) or (skip is not None and not left_out):
        raise InvalidRequest(
            f"skip {str(skip)[:32]!r} is not allowed: give some of layers 0 to {depth - 1}, such as 2-4 or 1,3",
            "skip",
        )
    return layers


def entry_layers(target: str, layers: list[int] | None, positions: int) -> list[int]:
    """Layers at which pseudo states enter. Raises InvalidRequest for layers that the target has not."""
    from training.hidden_transfer import default_layers

    depth = depth_of(target)
    chosen = layers or default_layers(depth, positions)
    if chosen != sorted(chosen) or not 1 <= chosen[0] <= chosen[-1] < depth:
        raise InvalidRequest(
            f"layers {', '.join(map(str, chosen))} are not allowed: give rising numbers from 1 to {depth - 1}",
            "layers",
        )
    return chosen


def make_order(
    method: str,
    target: str | None,
    out: Path,
    settings: dict[str, Any],
    steps: int,
    batch: int,
    context: int,
    own: int,
    seed: int,
) -> "TrainingJob":
    from training.run import TrainingJob

    check_int("steps", steps, 1, MAX_STEPS)
    check_int("batch", batch, 1, MAX_BATCH)
    check_int("own", own, 0, MAX_OWN_TOKENS)
    check_int("seed", seed, 0, 2**31 - 1)
    return TrainingJob(
        method,
        target or bundled_model("target"),
        out.absolute(),
        settings,
        steps,
        batch,
        context,
        own,
        seed,
    )


@contextmanager
def prepare_training(
    order: "TrainingJob",
    data: list[Path] | None,
    device: Device,
    check: "Callable[[Teacher], None]" = lambda teacher: None,
) -> Iterator[tuple["TrainingData", Path, "StepCallback"]]:
    """What to learn from, the folder to work in, and who is told of each step. All that can be refused is, before anything is written.

    `check` raises where the method cannot use the target.
    """
    import torch

    from actors.launch.prepare import context_length
    from training import folder, outputs, text
    from training.progress import ProgressBar
    from training.run import TrainingData, check_context
    from training.teacher import fingerprint, load_teacher

    threads = torch.get_num_threads()
    folder.check_out_is_free(order.out)
    context = check_context(order.context, context_length(order.target))
    texts = read_documents(data)
    with ProgressBar() as bar:
        bar.note("loading the target")
        teacher = load_teacher(order.target, device.value)
        check(teacher)
        corpus = text.build_corpus(
            texts, teacher.tokenizer.backend_tokenizer, teacher.tokenizer.eos_token_id, 2 * context
        )
        target = fingerprint(order.target)
        learn, hold = (
            outputs.training_requests(corpus, order.own, context, order.seed),
            outputs.held_out_requests(corpus, context, order.seed),
        )
        with folder.open_work(order.out, order.recipe(target, corpus.digest)) as work:
            own, held_out = (
                target_texts(order.target, device, asked, outputs.folder_name(target, asked), bar)
                for asked in (learn, hold)
            )
            torch.set_num_threads(threads)  # the runtime has set its own
            yield (
                TrainingData(teacher, corpus, outputs.rows_of(own), held_out),
                work,
                bar.steps(order.steps),
            )


def read_documents(data: list[Path] | None) -> "list[Document]":
    from training import text

    if data is not None:
        return text.read_documents(data)
    from training import stdlib_corpus

    names = sorted(
        [*stdlib_corpus.library_files(held_out=False), *stdlib_corpus.library_files(held_out=True)]
    )
    return [text.Document(name, stdlib_corpus.read_source(name)) for name in names]


def target_texts(
    target: str, device: Device, requests: "Sequence[Request]", name: str, bar: "ProgressBar"
) -> "list[TargetText]":
    """The answers of the runtime to `requests`: from the cache, as far as they are there."""
    from training import outputs

    folder = cache_folder() / "outputs" / name
    if left := outputs.count_missing(folder, requests):
        plan = build_deployment(target, (), 0, "auto", device.value, local=True)
        tell = bar.counts("the target writes texts to learn from", left)

        async def ask() -> None:
            with serving(plan, None, in_process=True, note=lambda what: None) as opener:
                async with opener() as service:
                    await outputs.write_answers(service.generate, requests, folder, tell)

        asyncio.run(ask())
    return outputs.read_answers(folder, requests)


def print_report(order: "TrainingJob", measured: "list[HeldOutAcceptance]") -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{order.out} is ready: its card has the figures")
    for at in measured:
        rates = "  ".join(f"{rates[1]:.2f}" for rates in at.rates)
        console.print(
            f"temperature {at.temperature:g}: right at each place ahead {rates}; {at.chain:.2f} tokens per step with one guess for each"
        )
