"""`outrider tune shapes`: compares draft models of one size and several depths."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from actors.cli.commands.doctor import ROW_COUNTS, expected_speedup
from actors.cli.commands.options import Device
from actors.cli.commands.train import draft
from actors.cli.commands.train_options import Batch, Context, Data, Own, Seed, Steps, Target
from runtime.core.errors import InvalidRequest
from runtime.core.sampling_params import check_range
from runtime.model_paths import bundled_model
from training.loss_kind import LossKind

if TYPE_CHECKING:
    from training.shapes import DraftShape

MIN_MILLION, MAX_MILLION = 0.1, 10_000.0  # million parameters
RESULT, PICTURE, FIGURES = "shapes.json", "shapes.png", "training.json"


@dataclass(frozen=True, slots=True)
class MeasuredShape:
    """A shape and its measurements.

    times    seconds of a pass, by rows
    rates    acceptance at temperature 0, by rank
    promise  expected speed-up
    """

    name: str
    parameters: int
    times: dict[int, float]
    rates: dict[int, float]
    promise: float


def shapes(
    out: Annotated[
        Path,
        typer.Option(help="folder for draft models, table and picture; finished models are kept"),
    ],
    million: Annotated[
        float, typer.Option(help="approximate parameters of each draft model, in millions")
    ],
    target: Target = None,
    data: Data = None,
    loss: Annotated[LossKind, typer.Option(help="training loss")] = LossKind.tvd_plus_plus,
    steps: Steps = 300,
    batch: Batch = 8,
    context: Context = 256,
    own: Own = 200_000,
    seed: Seed = 0,
    device: Device = Device.auto,
) -> None:
    """Train draft models of one size and several depths, and find the fastest for the target.

    The shapes go from wide and shallow to narrow and deep. Step times are measured here; the
    speed-up is the rule of thumb of `outrider doctor` (arXiv 2402.01528).
    """
    check_range("million", million, MIN_MILLION, MAX_MILLION)
    from runtime.models.loader import load_model
    from runtime.models.step_timing import step_times
    from training.shapes import make_measure, shapes_of_size

    model = load_model(target or bundled_model("target"), "auto", device.value)
    chosen = shapes_of_size(round(1e6 * million), model.vocabulary)
    for shape in chosen:
        if not (out / shape_name(shape)).exists():
            draft(
                out / shape_name(shape),
                target,
                data,
                None,
                shape_name(shape),
                None,
                loss,
                steps,
                batch,
                context,
                own,
                seed,
                device,
            )
    large, measure = (
        step_times(model, ROW_COUNTS, time.monotonic),
        make_measure(model.vocabulary, model.device),
    )
    points = [
        read_measured(shape, shape.parameters(model.vocabulary), out, measure(shape), large)
        for shape in chosen
    ]
    best = max(points, key=lambda found: found.promise)
    from training.folder import writable, write_atomically

    with writable(out):
        write_atomically(
            out / RESULT,
            (
                json.dumps(
                    {"best": best.name, "shapes": [asdict(found) for found in points]}, indent=2
                )
                + "\n"
            ).encode(),
        )
        draw_shapes(points, best, out / PICTURE)
    print_shapes(points, best, out)


def shape_name(shape: "DraftShape") -> str:
    return f"{shape.hidden}x{shape.layers}"


def read_measured(
    shape: "DraftShape",
    parameters: int,
    out: Path,
    times: dict[int, float],
    large: dict[int, float],
) -> MeasuredShape:
    """Returns a finished shape; `large` are the target's seconds of a pass, by rows.

    Raises InvalidRequest if the finished model has no measurements.
    """
    file = out / shape_name(shape) / FIGURES
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
        rates = {
            int(rank): float(rate) for rank, rate in found["acceptance"][0]["positions"][0].items()
        }
        return MeasuredShape(
            shape_name(shape), parameters, times, rates, expected_speedup(rates, large, times)
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InvalidRequest(
            f"{file} has no training measurements: remove {file.parent} to train it again",
            "out",
        ) from error


def draw_shapes(points: list[MeasuredShape], best: MeasuredShape, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4.2))
    axis.plot(
        [1e3 * found.times[4] for found in points],
        [found.rates[1] for found in points],
        color="0.7",
        zorder=1,
    )
    for found in points:
        axis.scatter(
            1e3 * found.times[4],
            found.rates[1],
            color="tab:green" if found is best else "tab:blue",
            zorder=2,
        )
        axis.annotate(
            f"{found.name}\n{found.promise:.2f} x",
            (1e3 * found.times[4], found.rates[1]),
            (6, -4),
            textcoords="offset points",
        )
    axis.set(
        xlabel="milliseconds of a pass of 4 rows",
        ylabel="acceptance, first guess",
        title="draft models of one size; green: fastest",
    )
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def print_shapes(points: list[MeasuredShape], best: MeasuredShape, out: Path) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in (
        "shape",
        "million parameters",
        "t(1) ms",
        "t(4) ms",
        "first guess right",
        "of 4",
        "expected",
    ):
        table.add_column(heading, justify="right")
    for found in points:
        times = (f"{1e3 * found.times[rows]:.2f}" for rows in (1, 4))
        rates = (f"{found.rates[rank]:.2f}" for rank in (1, 4))
        style = "bold" if found is best else None
        table.add_row(
            found.name,
            f"{found.parameters / 1e6:.2f}",
            *times,
            *rates,
            f"{found.promise:.2f} x",
            style=style,
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{out / best.name} is the best draft model; {out / PICTURE} shows all",
        soft_wrap=True,  # a path that is cut into two lines cannot be copied
    )
