"""`outrider train METHOD`: trains draft models, drafters and heads for a target."""

from typing import Annotated

import typer

from actors.cli.commands.options import Device
from actors.cli.commands.train_arguments import (
    check_vocabulary,
    depth_of,
    entry_layers,
    kept_layers,
    parse_shape,
    short_fingerprint,
    tapped_layers,
)
from actors.cli.commands.train_options import (
    Batch,
    Context,
    Data,
    DraftVocabulary,
    FusedLayers,
    Intermediate,
    MoreData,
    Out,
    Own,
    OwnConversations,
    Prompts,
    Seed,
    Steps,
    Target,
)
from actors.cli.commands.train_setup import (
    make_order,
    prepare_eagle,
    prepare_training,
    print_report,
)
from runtime.core.errors import InvalidRequest
from runtime.core.sampling_params import check_int, check_range
from runtime.model_paths import bundled_model
from training.loss_kind import LossKind

train = typer.Typer(
    help="Train a draft model, drafter or head for a target. After an interruption, the command "
    "resumes the training. The result is a Hugging Face folder of safetensors with a model card; "
    "it appears once it is complete.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


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
    """Train heads on the target's last hidden state, one for each place ahead (arXiv 2401.10774).

    They are small and quick to train.
    """
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
        typer.Option(
            help="entry layer of each place (repeatable, rising); default: a third of the way up"
        ),
    ] = None,
    steps: Steps = 400,
    batch: Batch = 4,
    context: Context = 256,
    own: Own = 200_000,
    seed: Seed = 0,
    device: Device = Device.auto,
) -> None:
    """Train maps to pseudo hidden states for the target's upper layers (arXiv 2404.12022).

    Training costs more than for medusa, and the guesses are better.
    """
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
        typer.Option(help="layers to skip, such as 3-7 or 2,4-6; default: the middle ones"),
    ] = None,
    masks: Annotated[int, typer.Option(help="places after the next one that a pass guesses")] = 3,
    rank: Annotated[int, typer.Option(help="rank of the adapter on the kept layers")] = 16,
    steps: Steps = 600,
    batch: Batch = 4,
    context: Context = 256,
    own: Own = 200_000,
    seed: Seed = 0,
    device: Device = Device.auto,
) -> None:
    """Train a drafter from the target's layers that guesses several places (arXiv 2405.20314)."""
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
def eagle(
    out: Out,
    target: Target = None,
    data: MoreData = None,
    prompts: Prompts = None,
    layers: FusedLayers = None,
    intermediate: Intermediate = 1024,
    vocabulary: DraftVocabulary = 8192,
    unroll: Annotated[
        int, typer.Option(help="steps that the layer is trained on with its own states")
    ] = 4,
    steps: Steps = 2000,
    batch: Batch = 8,
    context: Context = 512,
    own: OwnConversations = 500_000,
    seed: Seed = 0,
    device: Device = Device.auto,
) -> None:
    """Train a drafter that goes on from the target's hidden states (EAGLE-3, arXiv 2503.01840).

    Its guesses are better than those of a draft model of the same size.
    """
    check_int("intermediate", intermediate, 1, 1 << 20)
    check_int("vocabulary", vocabulary, 1, 1 << 20)
    check_int("unroll", unroll, 1, 16)
    settings = {
        "layers": tapped_layers(target or bundled_model("target"), layers),
        "intermediate": intermediate,
        "draft_vocabulary": vocabulary,
        "unroll": unroll,
    }
    order = make_order("eagle", target, out, settings, steps, batch, context, own, seed)
    with prepare_eagle(order, data, prompts, device) as (material, work, bar):
        from training.eagle_run import train_eagle

        for title, measured in train_eagle(order, material, work, bar).items():
            print_report(order, measured, f"{out}: {title}")


@train.command()
def block(
    out: Out,
    target: Target = None,
    data: MoreData = None,
    prompts: Prompts = None,
    layers: FusedLayers = None,
    intermediate: Intermediate = 448,
    vocabulary: DraftVocabulary = 8192,
    places: Annotated[int, typer.Option(help="next tokens that one pass guesses")] = 8,
    rank: Annotated[
        int, typer.Option(help="rank of the head that orders a place's guesses by the token before")
    ] = 128,
    steps: Steps = 2000,
    batch: Batch = 8,
    context: Context = 512,
    own: OwnConversations = 500_000,
    seed: Seed = 0,
    device: Device = Device.auto,
) -> None:
    """Train a drafter that guesses all next tokens in one pass (DFlash, arXiv 2602.06036).

    It reads the target's hidden states as EAGLE does, and costs one pass for each step of the
    target instead of one for each token ahead.
    """
    check_int("intermediate", intermediate, 1, 1 << 20)
    check_int("vocabulary", vocabulary, 1, 1 << 20)
    check_int("places", places, 2, 32)
    check_int("rank", rank, 1, 4096)
    settings = {
        "layers": tapped_layers(target or bundled_model("target"), layers),
        "intermediate": intermediate,
        "draft_vocabulary": vocabulary,
        "places": places,
        "rank": rank,
    }
    order = make_order("block", target, out, settings, steps, batch, context, own, seed)
    with prepare_eagle(order, data, prompts, device) as (material, work, bar):
        from training.block import train_block

        for title, measured in train_block(order, material, work, bar).items():
            print_report(order, measured, f"{out}: {title}")


@train.command()
def draft(
    out: Out,
    target: Target = None,
    data: Data = None,
    latency: Annotated[
        float | None,
        typer.Option(help="maximum milliseconds of a pass of 4 rows here; chooses the shape"),
    ] = None,
    shape: Annotated[str | None, typer.Option(help="HIDDENxLAYERS, such as 128x2")] = None,
    start: Annotated[
        str | None, typer.Option(help="draft model to start from: name or folder")
    ] = None,
    loss: Annotated[
        LossKind,
        typer.Option(
            help="the target's distribution (kl for temperature 0, tvd++ above), or the next token"
        ),
    ] = LossKind.tvd_plus_plus,
    steps: Steps = 900,
    batch: Batch = 16,
    context: Context = 256,
    own: Own = 500_000,
    seed: Seed = 0,
    device: Device = Device.auto,
) -> None:
    """Train a draft model that fits a latency budget (arXiv 2402.01528, 2403.00858)."""
    if sum(choice is not None for choice in (latency, shape, start)) != 1:
        raise InvalidRequest(
            "give exactly one of --latency, --shape and --start for the size of the draft model",
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
