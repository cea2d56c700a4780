"""`outrider tune layers` and `outrider tune shapes`: find settings of drafters by measuring."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from actors.cli.commands.options import Device
from actors.cli.commands.train_options import Context, Data, Target
from actors.cli.commands.train_setup import read_documents
from actors.cli.commands.tune_shapes import shapes
from runtime.core.errors import InvalidRequest
from runtime.core.sampling_params import check_int
from runtime.model_paths import bundled_model

if TYPE_CHECKING:
    from training.layers import Subset

MAX_TEXTS = 4096

tune = typer.Typer(
    help="Find settings of a drafting method by measuring.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


tune.command()(shapes)


@tune.command()
def layers(
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    target: Target = None,
    data: Data = None,
    texts: Annotated[
        int, typer.Option(help="texts to measure on, evenly spread over the data")
    ] = 16,
    context: Context = 128,
    device: Device = Device.auto,
) -> None:
    """Search for the layers of the target that draft best.

    The methods are Draft & Verify (arXiv 2309.08168) and LayerSkip (arXiv 2404.16710). Layers are
    removed one by one, always the one that matters least. The file gets the number of layers with
    the highest expected speed-up on a separate device, and the results for all other numbers.
    """
    check_int("texts", texts, 1, MAX_TEXTS)
    if out.exists():
        raise InvalidRequest(f"{out} exists: give another --out, or remove it first", "out")
    import torch

    from actors.launch.prepare import context_length
    from runtime.models.head_checkpoint import target_identity
    from runtime.models.loader import load_model
    from runtime.models.step_timing import step_times
    from runtime.schedulers.living import MEASURED_ROWS
    from training import folder, text
    from training import layers as method
    from training.progress import ProgressBar
    from training.run import check_context
    from training.teacher import load_teacher

    name = target or bundled_model("target")
    length = check_context(context, context_length(name))
    with ProgressBar() as bar:
        bar.note("loading the target")
        teacher = load_teacher(name, device.value)
        corpus = text.build_corpus(
            read_documents(data),
            teacher.tokenizer.backend_tokenizer,
            teacher.tokenizer.eos_token_id,
            2 * length,
        )
        count = len(method.layers_of(teacher))
        rows = [torch.tensor([excerpt]) for excerpt in text.excerpts(corpus.train, texts, length)]
        score = method.agreement_score(teacher, rows)
        found = method.search_layers(
            count, score, bar.counts("removing layers", method.count_trials(count))
        )
        bar.note("measuring steps")
        rates, times = (
            method.rank_rates(teacher, rows),
            step_times(load_model(name, "auto", device.value), MEASURED_ROWS, time.monotonic),
        )
        promises = {
            subset: method.forecast_speed_up(
                rates(subset.layers), method.pass_share(teacher, subset.layers), times
            )
            for subset in found
        }
    with folder.writable(out):
        content = method.as_json(
            target_identity(teacher.module.config, teacher.tokenizer), promises
        )
        folder.write_atomically(out, (json.dumps(content, indent=2) + "\n").encode())
    print_layers(promises, count, out)


def print_layers(promises: "dict[Subset, float]", count: int, out: Path) -> None:
    from training.layers import best_subset

    chosen = best_subset(promises)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("layers", "agree with all", "expected", "kept"):
        table.add_column(heading)
    for subset, promise in promises.items():
        kept, style = " ".join(map(str, subset.layers)), "bold" if subset is chosen else None
        table.add_row(
            f"{len(subset.layers)} of {count}",
            f"{subset.acceptance:.2f}",
            f"{promise:.2f} x plain",
            kept,
            style=style,
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    if promises[chosen] <= 1.0:
        console.print(
            "No speed-up is expected from the layers of this target: choose another method."
        )
    console.print(
        f"{out} names layers {', '.join(map(str, chosen.layers))} for the method layer-skip: "
        f"use `--draft {out}`"
    )
