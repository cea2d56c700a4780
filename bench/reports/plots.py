"""The pictures of a benchmark. Our methods are coloured, others grey; living is the darkest."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from bench.core import compare
from bench.core.results import MethodFacts, Results

LIVING, OURS, OTHERS, INK = "#0b6e6e", "#7fc0b8", "#b9bec5", "#3b4148"
TIME_COLOURS = {
    "compute": "#0b6e6e",
    "wait": "#f2b544",
    "bookkeeping": "#d1603d",
    "rest": "#e4e6e9",
}
STYLE: Any = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa1a9",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.axisbelow": True,
    "grid.color": "#e4e6e9",
    "legend.frameon": False,
}
DPI = 130


def draw_pictures(results: Results, folder: Path) -> dict[str, Path]:
    """Write NAME-speed.png and so on for everything measured; return the files by subject."""
    pictures = {
        "speed": speed_figure,
        "steps": steps_figure,
        "time": time_figure,
        "batches": batches_figure,
    }
    found: dict[str, Path] = {}
    with mpl.rc_context(STYLE):
        for what, picture in pictures.items():
            figure = picture(results)
            if figure is not None:
                found[what] = folder / f"{results.name}-{what}.png"
                figure.savefig(found[what], dpi=DPI, bbox_inches="tight")
    return found


def method_colour(facts: MethodFacts) -> str:
    if facts.name in ("living", "living + ngram"):
        return LIVING
    return OURS if facts.who == "ours" else OTHERS


def speed_figure(results: Results) -> Figure | None:
    """Draw bars by method, one panel per temperature, with quartiles over prompts as whiskers."""
    temperatures = [
        t
        for t in compare.temperatures(results)
        if any(compare.decode_speed(results, facts.name, t) for facts in results.methods)
    ]
    if not temperatures:
        return None
    height = 0.31 * len(results.methods) + 1.1
    figure = Figure(figsize=(6.6 * len(temperatures), height))
    axes = figure.subplots(1, len(temperatures), squeeze=False)
    for axis, temperature in zip(axes[0], temperatures, strict=True):
        speed_bars(axis, results, temperature)
    legend = [
        Patch(color=tint, label=name)
        for name, tint in (
            ("living tree", LIVING),
            ("ours, others", OURS),
            ("transformers", OTHERS),
        )
    ]
    axes[0][0].legend(handles=legend, loc="lower right")
    figure.tight_layout(w_pad=2)
    return figure


def speed_bars(axis: Axes, results: Results, temperature: float) -> None:
    measured = [
        (found, facts)
        for facts in results.methods
        if (found := compare.decode_speed(results, facts.name, temperature))
    ]
    measured.sort(key=lambda pair: pair[0].median)
    longest = max(found.high for found, _ in measured)
    for place, (found, facts) in enumerate(measured):
        axis.barh(place, found.median, color=method_colour(facts), height=0.72)
        axis.plot(
            [found.low, found.high],
            [place, place],
            color="#1c2126",
            linewidth=1.1,
            solid_capstyle="butt",
        )
        times = compare.speed_ratio(results, facts.name, "plain", temperature)
        label = f"{found.median:.0f}" + (
            f"   {times.median:.2f} x plain" if times and facts.name != "plain" else ""
        )
        axis.text(found.high + 0.015 * longest, place, label, va="center", fontsize=8.5)
    axis.set_yticks(range(len(measured)), [facts.name for _, facts in measured])
    axis.set(
        title=f"temperature {temperature:g}",
        xlabel="tokens per second of decoding: median and quartiles over prompts",
    )
    axis.set_xlim(0, 1.22 * longest)
    axis.margins(y=0.01)
    axis.grid(axis="x")
    axis.tick_params(axis="y", length=0)


def steps_figure(results: Results) -> Figure | None:
    """Draw T(n) and t(n), each on its own scale; a flat curve means that rows are free."""
    times = {"target: T(n)": results.profile.target, "draft: t(n)": results.profile.draft}
    shown = {name: found for name, found in times.items() if found}
    if not shown:
        return None
    figure = Figure(figsize=(5 * len(shown), 3.2))
    axes = figure.subplots(1, len(shown), squeeze=False)
    for axis, (name, found) in zip(axes[0], shown.items(), strict=True):
        rows = sorted(found)
        axis.plot(rows, [1e3 * found[n] for n in rows], marker="o", markersize=4, color=LIVING)
        if name.startswith("target") and results.profile.floor:
            axis.axhline(1e3 * results.profile.floor, color=INK, linewidth=1, linestyle="--")
            axis.annotate(
                "memory alone",
                (rows[-1], 1e3 * results.profile.floor),
                ha="right",
                va="bottom",
                fontsize=8.5,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(rows, [str(n) for n in rows])
        axis.minorticks_off()
        axis.set(title=name, xlabel="rows in one step", ylabel="milliseconds")
        axis.set_ylim(bottom=0)
        axis.grid()
    figure.tight_layout(w_pad=2)
    return figure


def time_figure(results: Results) -> Figure | None:
    """Draw the shares of the target's time at the lowest temperature, for our methods."""
    temperature = min(compare.temperatures(results), default=0.0)
    found = [
        (facts.name, parts)
        for facts in results.methods
        if (parts := compare.time_shares(results, facts.name, temperature))
    ]
    if not found:
        return None
    figure = Figure(figsize=(8, 0.32 * len(found) + 1.3))
    axis = figure.subplots()
    for place, (_, parts) in enumerate(reversed(found)):
        left = 0.0
        for part, tint in TIME_COLOURS.items():
            axis.barh(
                place,
                parts[part],
                left=left,
                color=tint,
                height=0.72,
                label=part if place == 0 else None,
            )
            if parts[part] >= 0.04:
                light = "white" if part in ("compute", "bookkeeping") else INK
                axis.text(
                    left + parts[part] / 2,
                    place,
                    f"{parts[part]:.0%}",
                    ha="center",
                    va="center",
                    color=light,
                    fontsize=8.5,
                )
            left += parts[part]
    axis.set_yticks(range(len(found)), [name for name, _ in reversed(found)])
    axis.tick_params(axis="y", length=0)
    axis.set(title=f"the target's time, temperature {temperature:g}", xlim=(0, 1))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.margins(y=0.02)
    axis.legend(
        ncols=len(TIME_COLOURS), loc="upper left", bbox_to_anchor=(0, -0.1 - 0.4 / len(found))
    )
    return figure


def batches_figure(results: Results) -> Figure | None:
    """Draw tokens per second of the batch, and the speed-up over plain decoding, by batch size."""
    sizes = compare.batches(results)
    batched = [
        facts
        for facts in results.methods
        if any(run.method == facts.name and run.batch > 1 for run in results.runs)
    ]
    if not batched:
        return None
    figure = Figure(figsize=(10, 3.4))
    left, right = figure.subplots(1, 2)
    for facts in batched:
        line: Any = {
            "color": method_colour(facts),
            "marker": "o",
            "markersize": 4,
            "label": facts.name,
        }
        found = {
            size: one
            for size in sizes
            if (one := compare.decode_speed(results, facts.name, batch=size))
        }
        left.plot(list(found), [one.median for one in found.values()], **line)
        low, high = [one.low for one in found.values()], [one.high for one in found.values()]
        left.fill_between(
            list(found), low, high, color=method_colour(facts), alpha=0.2, linewidth=0
        )
        ratios = {
            size: one.median
            for size in sizes
            if (one := compare.speed_ratio(results, facts.name, "plain", batch=size))
        }
        right.plot(list(ratios), list(ratios.values()), **line)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set(xlabel="texts at a time")
        axis.set_ylim(bottom=0)
        axis.grid()
    left.set(title="all texts together, temperature 0", ylabel="tokens per second")
    right.set(title="times as fast as plain")
    left.legend()
    figure.tight_layout(w_pad=2)
    return figure
