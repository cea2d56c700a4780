"""`outrider tune layers`: which of the target's own layers make the best drafter, found on texts; `outrider tune shapes`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from actors.cli.generate import Device
from actors.cli.train import Context, Data, Target, documents
from actors.cli.tune_shapes import shapes
from runtime import config
from runtime.errors import InvalidRequest
from runtime.sampling import whole

if TYPE_CHECKING:
    from training.layers import Subset

MOST_TEXTS = 4096

tune = typer.Typer(help="Find settings of a drafting method by measuring.", rich_markup_mode=None, no_args_is_help=True)


tune.command()(shapes)


@tune.command()
def layers(
    out: Annotated[Path, typer.Option(help="the JSON file to be written")],
    target: Target = None,
    data: Data = None,
    texts: Annotated[int, typer.Option(help="so many, evenly spread over the data, are measured on")] = 16,
    context: Context = 128,
    device: Device = Device.auto,
) -> None:
    """Search for the layers that the target can draft with (Draft & Verify, arXiv 2309.08168; LayerSkip, 2404.16710).

    Layers are left out one after the other, always the one that is missed least; of all numbers of layers the one that promises most is
    written down, with what was found for the others.
    """
    whole("texts", texts, 1, MOST_TEXTS)
    if out.exists():
        raise InvalidRequest(f"{out} is there already: give another --out, or remove it first", "out")
    import torch

    from actors.cli.prepare import context_length
    from runtime.models.trained import identity_of
    from training import folder, text
    from training import layers as method
    from training.progress import Bar
    from training.run import fitting_context
    from training.teacher import load_teacher

    name = target or config.shipped("target")
    length = fitting_context(context, context_length(name))
    with Bar() as bar:
        bar.note("loading the target")
        teacher = load_teacher(name, device.value)
        corpus = text.corpus(documents(data), teacher.tokenizer.backend_tokenizer, teacher.tokenizer.eos_token_id, 2 * length)
        count = len(method.layers_of(teacher))
        rows = [torch.tensor([excerpt]) for excerpt in text.excerpts(corpus.train, texts, length)]
        score = method.agreement(teacher, rows)
        found = method.search(count, score, bar.counts("leaving layers out", method.trials(count)))
    best = method.best(found, count)
    with folder.writable(out):
        content = method.as_json(identity_of(teacher.module.config, teacher.tokenizer), best, found, count)
        folder.write(out, (json.dumps(content, indent=2) + "\n").encode())
    show(found, best, count, out)


def show(found: "list[Subset]", best: "Subset", count: int, out: Path) -> None:
    from training.layers import speed_up

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("layers", "agree with all", "promise", "kept"):
        table.add_column(heading)
    for subset in found:
        promise, length = speed_up(subset.acceptance, len(subset.layers) / count)
        style = "bold" if subset is best else None
        kept = " ".join(map(str, subset.layers))
        table.add_row(
            f"{len(subset.layers)} of {count}", f"{subset.acceptance:.2f}", f"{promise:.2f} x in chains of {length}", kept, style=style
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{out} names layers {', '.join(map(str, best.layers))} for the drafting method layer-skip")
