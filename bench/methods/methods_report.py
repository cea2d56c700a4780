"""The comparison of drafting methods as Markdown, in a terminal, and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.core.results import Machine
from bench.methods.method_goals import MODEL, WITH_MODEL, goals_grid
from bench.methods.method_stats import FIRST_RANKS, MethodStats, extra_step_ms, median_ratio
from bench.methods.papers import PAPERS
from bench.methods.weights import Cost
from bench.reports.grid import Grid
from bench.reports.plots import DPI, LIVING, OTHERS, OURS, STYLE

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Study:
    """The results for one target: `about` describes it, `costs` is by method."""

    name: str
    about: str
    found: tuple[MethodStats, ...]
    costs: Mapping[str, Cost]

    def at(self, temperature: float) -> dict[str, MethodStats]:
        """Return the statistics at a temperature, by method; empty if plain decoding was not
        measured."""
        rows = {one.name: one for one in self.found if one.temperature == temperature and one.rates}
        return rows if PLAIN in rows else {}

    @property
    def temperatures(self) -> list[float]:
        """The temperatures at which something was measured."""
        return [at for at in sorted({one.temperature for one in self.found}) if self.at(at)]

    @property
    def by_temperature(self) -> dict[float, dict[str, MethodStats]]:
        return {at: self.at(at) for at in self.temperatures}


def methods_grid(study: Study, temperature: float) -> Grid:
    """Return a row per drafting method: alone, and together with the draft model."""
    rows = study.at(temperature)
    lines = []
    for name, cost in study.costs.items():
        one, both = rows.get(name), rows.get(WITH_MODEL + name)
        if one is None:
            continue
        kind = "draft" if name == MODEL else name
        shares = one.acceptance.get(kind, [])
        lines.append(
            (
                name,
                *(f"{share:.2f}" for share in shares),
                *("-" for _ in range(FIRST_RANKS - len(shares))),
                f"{one.tokens_per_step:.2f}",
                format_number(one.per_node(f"{kind}-0"), 3),
                f"{extra_step_ms(one, rows[PLAIN]):+.1f}",
                f"{one.speed:.1f}",
                f"{median_ratio(one, rows[PLAIN]):.2f}",
                f"{both.speed:.1f}" if both else "-",
                f"{median_ratio(both, rows[MODEL]):.2f}" if both and MODEL in rows else "-",
                f"{cost.keeps / 1e6:.2f}",
                cost.training,
            )
        )
    ranks = tuple(f"right, {rank}." for rank in range(1, FIRST_RANKS + 1))
    columns = (
        "method",
        *ranks,
        "tokens/step",
        "ms/node",
        "extra ms/step",
        "alone, tokens/s",
        "x plain",
        "with model, tokens/s",
        "x model",
    )
    return Grid(
        f"{study.name}, temperature {temperature:g}",
        (*columns, "MB", "training"),
        tuple(lines),
        ("training",),
    )


def runs_grid(study: Study, temperature: float) -> Grid:
    """Return a row per measured method."""
    rows = study.at(temperature)
    lines = [
        (
            one.name,
            f"{one.speed:.1f}",
            f"{median_ratio(one, rows[PLAIN]):.2f}",
            f"{median_ratio(one, rows[MODEL]):.2f}" if MODEL in rows else "-",
            f"{one.tokens_per_step:.2f}",
            f"{extra_step_ms(one, rows[PLAIN]):+.1f}",
            ", ".join(f"{who} {count}" for who, count in sorted(one.accepted.items()) if who)
            or "-",
            ", ".join(
                f"{who} {1e3 * one.seconds[who] / passes:.2f}"
                for who, passes in sorted(one.passes.items())
            )
            or "-",
            "yes" if one.same else "NO",
        )
        for one in sorted(rows.values(), key=lambda one: -one.speed)
    ]
    columns = (
        "method",
        "tokens/s",
        "x plain",
        "x model",
        "tokens/step",
        "extra ms/step",
        "accepted",
        "own ms",
        "text as plain",
    )
    return Grid(
        f"{study.name}, temperature {temperature:g}: all runs",
        columns,
        tuple(lines),
        ("accepted", "own ms"),
    )


def papers_grid(study: Study) -> Grid:
    """Compare each paper's report with the measurement at the lowest temperature."""
    rows = study.at(min(study.temperatures, default=0.0))
    lines = []
    for paper in PAPERS:
        one = rows.get(paper.method)
        ours = median_ratio(one, rows[PLAIN]) if one else None
        reached = ours is not None and paper.min_speed_up is not None and ours >= paper.min_speed_up
        figure = f"{ours:.2f} x" if ours is not None else "-"
        lines.append(
            (
                paper.method,
                f"{paper.title}, {paper.source}",
                paper.reported,
                paper.setup,
                figure,
                "-" if reached else paper.difference,
            )
        )
    columns = ("method", "paper", "it reports", "on", "here, alone", "why it is less here")
    return Grid("papers", columns, tuple(lines), columns)


def format_number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


LEGEND = (
    "*right, 1.*: how often the first guess was right once its parent was; *2.*: the second guess, "
    "and so on. *ms/node*: the guesser's time per node that was new to the target's tree. "
    "*extra ms/step*: the time of a target step (pass and bookkeeping) beyond a step of plain "
    "decoding. *x plain*, *x model*: speed-up over plain decoding and over the draft model alone; "
    "medians over prompts, paired by prompt. *MB*: weights (16 bits per number, heads 32) or "
    "tables "
    "in addition to the target's. *own ms*: a head's time per step, or the time of a drafter's "
    "pass. Each method has calibrated its guesses on other prompts."
)

TREE_NOTE = (
    "Tokens per step are those of the trees that the living schedule chose for speed; they are "
    "smaller if rows are expensive. `python -m experiments.same_tree` counts what heads reach with "
    "the same tree, regardless of its cost ([same-tree.md](same-tree.md))."
)


def methods_page(studies: Sequence[Study], machine: Machine, picture: str) -> str:
    parts = [
        "# Drafting methods",
        f"{machine.processor}, {machine.date}: the target on one core, drafters on another "
        f"(`make bench-methods`). {LEGEND}",
        f"![tokens per second by method]({picture})",
    ]
    for study in studies:
        parts += [f"## {study.name}", study.about]
        for temperature in study.temperatures:
            for grid in (methods_grid(study, temperature), runs_grid(study, temperature)):
                parts += [f"**{grid.title}**", grid.without_empty_columns().markdown()]
    if studies and MODEL in studies[0].costs:
        parts += [
            "## Goals",
            f"On {studies[0].name}. {TREE_NOTE}",
            goals_grid(studies[0].by_temperature).markdown(),
        ]
        parts += [
            "## What the papers report",
            f"*Here*: on {studies[0].name}, at temperature 0.",
            papers_grid(studies[0]).markdown(),
        ]
    return "\n\n".join(parts) + "\n"


def draw_methods(study: Study, file: Path) -> None:
    """Draw tokens per second by method, one panel per temperature."""
    with mpl.rc_context(STYLE):
        names = list(study.at(study.temperatures[0]))
        figure = Figure(figsize=(6.6 * len(study.temperatures), 0.31 * len(names) + 1.1))
        axes = figure.subplots(1, len(study.temperatures), squeeze=False)
        for axis, temperature in zip(axes[0], study.temperatures, strict=True):
            rows = study.at(temperature)
            shown = sorted(rows.values(), key=lambda one: one.speed)
            for place, one in enumerate(shown):
                axis.barh(place, one.speed, color=bar_colour(one.name), height=0.72)
                axis.plot(
                    [min(one.rates.values()), max(one.rates.values())],
                    [place, place],
                    color="#1c2126",
                    linewidth=1.1,
                )
                label = f"{one.speed:.0f}   {median_ratio(one, rows[PLAIN]):.2f} x plain"
                axis.text(max(one.rates.values()) * 1.01, place, label, va="center", fontsize=8.5)
            axis.set_yticks(range(len(shown)), [one.name for one in shown])
            axis.set(
                title=f"temperature {temperature:g}",
                xlabel="tokens per second of decoding: median and range over prompts",
            )
            axis.margins(x=0.25, y=0.01)
            axis.set_xlim(left=0)
            axis.grid(axis="x")
            axis.tick_params(axis="y", length=0)
        figure.tight_layout(w_pad=2)
        figure.savefig(file, dpi=DPI)


def bar_colour(name: str) -> str:
    """Return the colour of plain decoding, of a combination with the model, or of a method
    alone."""
    return OTHERS if name == PLAIN else LIVING if name.startswith(WITH_MODEL) else OURS
