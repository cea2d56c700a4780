"""`python -m experiments.aligned FOLDER...` compares draft models that differ only in their
training loss.

Each FOLDER is the output of `outrider train draft --loss ...`; the first is the reference.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console

from bench.core.options import RESULTS
from bench.methods.weights import card_value
from bench.reports.grid import Grid
from bench.reports.plots import DPI, LIVING, OTHERS, STYLE
from runtime.core.errors import InvalidRequest, OutriderError
from training.draft import KL_SHARE
from training.loop import smooth

MIN_GAIN = 0.05  # required gain in correct first guesses over next-token training
CARD, FIGURES = "README.md", "training.json"


@dataclass(frozen=True, slots=True)
class TrainedDraft:
    """A trained draft.

    settings  as on its card
    rates     by temperature and k: the share of positions whose first k guesses contain the
              target's choice
    """

    name: str
    settings: str
    steps: str
    losses: tuple[float, ...]
    rates: dict[float, dict[int, float]]
    seconds: float


def read_trained(folder: Path) -> TrainedDraft:
    """Read a trained draft. Raises InvalidRequest if the folder is not the output of a draft
    training."""
    try:
        found = json.loads((folder / FIGURES).read_bytes())
        rates = {
            float(at["temperature"]): {
                int(k): float(rate) for k, rate in at["positions"][0].items()
            }
            for at in found["acceptance"]
        }
        losses, seconds = tuple(float(loss) for loss in found["losses"]), float(found["seconds"])
        least = min(losses)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InvalidRequest(
            f"{folder} has no training figures: give an output folder of `outrider train draft`",
            "folder",
        ) from error
    if not rates or not least < float("inf"):
        raise InvalidRequest(f"{folder} has no acceptance figures: train it again", "folder")
    return TrainedDraft(
        folder.name,
        card_value(folder / CARD, "settings"),
        card_value(folder / CARD, "steps"),
        losses,
        rates,
        seconds,
    )


def results_grid(trained: Sequence[TrainedDraft]) -> Grid:
    """Return acceptance in percent, followed by the difference to the first draft in points."""
    first, lines = trained[0], []
    for temperature, known in sorted(first.rates.items()):
        for one in trained:
            rates = one.rates.get(temperature, {})
            cells = (
                f"{100 * rates[k]:.1f}"
                + (f" ({100 * (rates[k] - known[k]):+.1f})" if one is not first else "")
                if k in rates
                else "-"
                for k in sorted(known)
            )
            ends = smooth(list(one.losses))
            lines.append(
                (
                    one.name,
                    f"{temperature:g}",
                    *cells,
                    f"{ends[0]:.3f} to {ends[-1]:.3f}",
                    f"{one.seconds / 60:.1f}",
                )
            )
    ranks = tuple(f"k = {k}" for k in sorted(next(iter(first.rates.values()))))
    return Grid(
        "aligned drafts",
        ("trained towards", "temperature", *ranks, "its loss", "minutes"),
        tuple(lines),
    )


def verdict_lines(trained: Sequence[TrainedDraft]) -> list[str]:
    """State for every draft but the first whether its first guess gains as much as required."""
    first, found = trained[0], []
    for one in trained[1:]:
        for temperature in sorted(one.rates.keys() & first.rates.keys()):
            more = one.rates[temperature][1] - first.rates[temperature][1]
            verdict = "met" if more >= MIN_GAIN else "missed"
            found.append(
                f"{one.name} over {first.name} at temperature {temperature:g}: first guess "
                f"right {100 * more:+.1f} points (goal "
                f"{100 * MIN_GAIN:+.0f}: {verdict})"
            )
    return found


def results_page(trained: Sequence[TrainedDraft], picture: str) -> str:
    how = "\n".join(f"| {one.name} | {one.settings} | {one.steps} |" for one in trained)
    parts = [
        "# Draft models aligned with their target",
        "All drafts have the same shape, data, seed and steps; only the training loss differs "
        "(`outrider train draft --loss`). The table shows how often the first k guesses "
        "contain the "
        "token that the target chooses, in percent, on the target's own continuations of held-out "
        f"texts, by the rule of the runtime. In brackets: the difference to {trained[0].name} in "
        "points. The losses are distances of different kinds, so only their trends can be compared "
        f"(tvd and tvd++ use forward KL for {KL_SHARE:.0%} of the steps, then their loss jumps).",
        results_grid(trained).markdown(),
        "\n".join(f"- {verdict}" for verdict in verdict_lines(trained)),
        f"![loss by step]({picture})",
        f"| | settings | steps |\n|---|---|---|\n{how}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw_losses(trained: Sequence[TrainedDraft], file: Path) -> None:
    """Draw the loss of each draft by step, raw and smoothed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5 * len(trained), 3.2))
        for axis, one in zip(
            figure.subplots(1, len(trained), squeeze=False)[0], trained, strict=True
        ):
            axis.plot(one.losses, color=OTHERS, linewidth=0.6)
            axis.plot(smooth(list(one.losses)), color=LIVING)
            axis.set(title=one.name, xlabel="step", ylabel="its loss")
            axis.grid()
        figure.tight_layout(w_pad=2)
        figure.savefig(file, dpi=DPI)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "trained",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="trained drafts; the first is the reference",
    )
    parser.add_argument(
        "--folder", type=Path, default=RESULTS, help="output folder of the page and its picture"
    )
    given = parser.parse_args(arguments)
    try:
        trained = [read_trained(folder) for folder in given.trained]
    except OutriderError as error:
        parser.error(str(error))
    given.folder.mkdir(parents=True, exist_ok=True)
    draw_losses(trained, given.folder / "aligned.png")
    (given.folder / "aligned.md").write_text(results_page(trained, "aligned.png"), "utf-8")
    console = Console(highlight=False, soft_wrap=True)
    console.print(results_grid(trained).terminal())
    for verdict in verdict_lines(trained):
        console.print(verdict)
    console.print(given.folder / "aligned.md")


if __name__ == "__main__":
    main()
