"""`python -m experiments.shapes FOLDER` finds the fastest of draft models of one size and several
depths.

`outrider tune shapes` makes the models and estimates their speed-up by a rule of thumb. Here each
drafts for the widened shipped target.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console

from bench.core.machine import machine, two_cores
from bench.core.methods import Method, OutriderMethod
from bench.core.options import RESULTS
from bench.core.outrider_runner import ModelPair, running_cluster
from bench.core.prompts import Prompt, held_out_prompts
from bench.core.subprocess_call import call_in_subprocess
from bench.core.widen import widen_to_small
from bench.methods.method_goals import MODEL
from bench.methods.method_stats import MethodStats, median_ratio
from bench.methods.methods_report import PLAIN
from bench.methods.study import (
    LEARNING_PROMPTS,
    NEW_TOKENS,
    TEMPERATURES,
    measure_rounds,
    rounds_of,
)
from bench.reports.grid import Grid
from bench.reports.plots import DPI, LIVING, OURS, STYLE
from runtime.core.errors import InvalidRequest, OutriderError
from runtime.model_paths import bundled_model
from runtime.models.loader import load_tokenizer

FILE = "shapes.json"
METHODS = (
    Method(PLAIN, OutriderMethod("plain")),
    Method(MODEL, OutriderMethod("living", drafters=(MODEL,))),
)


@dataclass(frozen=True, slots=True)
class MeasuredShape:
    """A draft model: its folder, millions of parameters, milliseconds of a pass by rows, and
    acceptance by number of guesses."""

    folder: Path
    million: float
    times: dict[int, float]
    rates: dict[int, float]


@dataclass(frozen=True, slots=True)
class ShapeResult:
    """The measured speeds, and the gains over plain decoding, by temperature."""

    shape: MeasuredShape
    speeds: dict[float, float]
    gains: dict[float, float]


def read_shapes(folder: Path) -> list[MeasuredShape]:
    """Read the shapes. Raises InvalidRequest if the folder is not the output of `outrider tune
    shapes`."""
    try:
        return [
            MeasuredShape(
                folder / point["name"],
                point["parameters"] / 1e6,
                {int(rows): 1e3 * seconds for rows, seconds in point["times"].items()},
                {int(k): float(rate) for k, rate in point["rates"].items()},
            )
            for point in json.loads((folder / FILE).read_bytes())["shapes"]
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"{folder} has no shapes: give an output folder of `outrider tune shapes`",
            "folder",
        ) from error


def measure_shape(
    shape: MeasuredShape, target: Path, cores: tuple[int, ...], prompts: Sequence[Prompt]
) -> ShapeResult:
    found: dict[tuple[str, float], MethodStats] = {}
    with running_cluster(
        ModelPair(str(target), str(shape.folder), "float32", cores), METHODS
    ) as cluster:
        for some, note, kept in (
            (prompts[:LEARNING_PROMPTS], "learning", {}),
            (prompts[LEARNING_PROMPTS:], "runs", found),
        ):
            measure_rounds(cluster, rounds_of(some, METHODS), f"{shape.folder.name}: {note}", kept)
    speeds = {at: found[MODEL, at].speed for at in TEMPERATURES}
    return ShapeResult(
        shape, speeds, {at: median_ratio(found[MODEL, at], found[PLAIN, at]) for at in TEMPERATURES}
    )


def results_grid(all_: Sequence[ShapeResult]) -> Grid:
    rows = [
        (
            one.shape.folder.name,
            f"{one.shape.million:.2f}",
            *(f"{one.shape.times[rows]:.2f}" for rows in (1, 4)),
            *(f"{one.shape.rates[k]:.3f}" for k in (1, 4)),
            *(f"{one.speeds[at]:.1f} ({one.gains[at]:.2f} x plain)" for at in TEMPERATURES),
        )
        for one in all_
    ]
    speeds = tuple(f"tokens/s, temperature {at:g}" for at in TEMPERATURES)
    return Grid(
        "shapes",
        ("hidden size x layers", "million", "t(1), ms", "t(4), ms", "first right", "of 4", *speeds),
        tuple(rows),
    )


def results_page(all_: Sequence[ShapeResult], prompts: int, picture: str) -> str:
    facts, best = machine(2), max(all_, key=lambda one: one.gains[TEMPERATURES[0]])
    parts = [
        "# Draft models of one size",
        "The same number of parameters as few wide or many narrow layers, trained alike by "
        "`outrider "
        "tune shapes`. Each drafts for the widened shipped target, as the only drafter of "
        "the living "
        f"schedule. {facts.processor}, {facts.date}; {prompts} prompts, {NEW_TOKENS} new tokens. "
        "Acceptance is at temperature 0, on the target's own continuations of held-out texts.",
        results_grid(all_).markdown(),
        f"Fastest end to end at temperature 0: {best.shape.folder.name}.",
        f"![latency against acceptance, and speed]({picture})",
    ]
    return "\n\n".join(parts) + "\n"


def draw_shapes(all_: Sequence[ShapeResult], file: Path) -> None:
    """Draw latency against acceptance on the left, and the resulting speed on the right."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8))
        left, right = figure.subplots(1, 2)
        times = [one.shape.times[4] for one in all_]
        for k, tint in ((1, LIVING), (4, OURS)):
            left.plot(
                times,
                [one.shape.rates[k] for one in all_],
                "o-",
                color=tint,
                label=f"among the first {k}" if k > 1 else "first guess",
            )
        for at, tint in zip(TEMPERATURES, (LIVING, OURS), strict=True):
            right.plot(
                times,
                [one.gains[at] for one in all_],
                "o-",
                color=tint,
                label=f"temperature {at:g}",
            )
        for axis, highest in (
            (left, [one.shape.rates[4] for one in all_]),
            (right, [max(one.gains.values()) for one in all_]),
        ):
            for one, time, top in zip(all_, times, highest, strict=True):
                axis.annotate(
                    one.shape.folder.name,
                    (time, top),
                    (0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                )
            axis.set(xlabel="milliseconds of a pass of 4 rows")
            axis.set_ylim(bottom=0)
            axis.margins(x=0.1, y=0.15)
            axis.grid()
            axis.legend(loc="lower left")
        left.set(title="acceptance", ylabel="share of the target's choices")
        right.set(title="speed", ylabel="times plain decoding")
        figure.tight_layout(w_pad=2)
        figure.savefig(file, dpi=DPI)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "shapes", type=Path, metavar="FOLDER", help="output folder of `outrider tune shapes`"
    )
    parser.add_argument("--count", type=int, default=3, help="prompts")
    parser.add_argument(
        "--folder", type=Path, default=RESULTS, help="output folder of the page and its picture"
    )
    arguments = parser.parse_args()
    try:
        shapes = read_shapes(arguments.shapes)
    except OutriderError as error:
        parser.error(str(error))
    target = call_in_subprocess(widen_to_small, (bundled_model("target"), "float32"))
    prompts = held_out_prompts(load_tokenizer(str(target)), LEARNING_PROMPTS + arguments.count, 2)
    all_ = sorted(
        (measure_shape(shape, target, two_cores(), prompts) for shape in shapes),
        key=lambda one: one.shape.times[4],
    )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    draw_shapes(all_, arguments.folder / "shapes.png")
    (arguments.folder / "shapes.md").write_text(
        results_page(all_, arguments.count, "shapes.png"), "utf-8"
    )
    console = Console()
    console.print(results_grid(all_).terminal())
    console.print(arguments.folder / "shapes.md")


if __name__ == "__main__":
    main()
