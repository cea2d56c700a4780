"""Draws a trace.

Lanes show the target and the drafters, with arrows for the messages between them. Counters are
below. All share one axis of milliseconds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from actors.tracing.trace_reader import Block, Interval, Message, Timeline
from runtime.core.errors import InvalidRequest
from runtime.telemetry.tracing import (
    BOOKKEEPING,
    COMMIT,
    COMPUTE,
    GROWTH,
    PREFILL,
    REROOT,
    STEP,
    TARGET,
    WAIT,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, LANE, COUNTER, FRAME, DPI = 15.0, 0.75, 0.95, 1.5, 130  # inches; dots per inch
BAR = 0.25  # half the height of a bar; lanes are 1 apart
GAP = 1.5  # between the lanes of the target and the first drafter
TARGETS = {COMPUTE: "#2b6cb0", WAIT: "#f6c445", BOOKKEEPING: "#8a94a3", PREFILL: "#7b4fa6"}
DRAFTERS = ("#2f9e6e", "#d9722e", "#17a2b8", "#b0568f", "#8c6d31", "#5c6bc0")
TICK, RETURN, OTHER = "#c0262d", "#30343b", "#b8bec8"
LABEL = 0.012  # minimum width of a labelled bar, as a share of the window
MAX_NAME_LENGTH = 22  # longer names of lanes are cut


def draw_trace(found: Timeline, window: Interval, file: Path) -> None:
    """Draws a window of the trace as a PNG. Raises InvalidRequest if it cannot be written."""
    from matplotlib.figure import Figure

    lanes, names = list(found.blocks), sorted(found.counts)
    heights = [LANE * (len(lanes) + GAP), *(COUNTER for _ in names)]
    figure = Figure(figsize=(WIDTH, FRAME + sum(heights)), dpi=DPI, layout="constrained")
    axes = figure.subplots(1 + len(names), 1, sharex=True, squeeze=False, height_ratios=heights)[
        :, 0
    ]
    run = found.run
    title = (
        f"{1e3 * window[0]:.0f} to {1e3 * window[1]:.0f} ms of a run "
        f"from {1e3 * run[0]:.0f} to {1e3 * run[1]:.0f} ms"
    )
    if any(bar.name == COMPUTE for bar in found.blocks.get(TARGET, [])):
        title += " (+n: tokens committed by the step)"
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    colours = dict(
        zip(
            found.drafters,
            (DRAFTERS[number % len(DRAFTERS)] for number in range(len(lanes))),
            strict=False,
        )
    )
    draw_lanes(axes[0], found, window, colours)
    for axis, name in zip(axes[1:], names, strict=True):
        draw_counter(axis, name, found.counts[name], window, colours)
    axes[-1].set_xlabel("milliseconds since the trace began")
    axes[-1].set_xlim(1e3 * window[0], 1e3 * window[1])
    figure.align_ylabels(list(axes[1:]))
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise InvalidRequest(
            f"cannot write {file} ({error.strerror}): give a file in a folder that exists", "png"
        ) from error


def draw_lanes(axis: "Axes", found: Timeline, window: Interval, colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    heights = dict(zip(found.blocks, lane_heights(found), strict=True))
    keys: dict[str, Patch | Line2D] = {}
    for lane, y in heights.items():
        palette = TARGETS if lane == TARGET else {STEP: colours[lane]}
        for name, colour in palette.items():
            bars = [
                block for block in blocks_within(found.blocks[lane], window) if block.name == name
            ]
            if bars:
                spans = [(1e3 * bar.began, 1e3 * (bar.ended - bar.began)) for bar in bars]
                axis.broken_barh(
                    spans,
                    (y - BAR, 2 * BAR),
                    facecolors=colour,
                    edgecolors="white",
                    linewidth=0.4,
                    zorder=3,
                )
                what = name if lane == TARGET else "drafter's step"
                keys.setdefault(what, Patch(color=colour, label=what))
        ticks = [
            1e3 * at
            for name, at in found.marks[lane]
            if name == REROOT and window[0] <= at <= window[1]
        ]
        if ticks:
            axis.vlines(ticks, y - 1.35 * BAR, y + 1.35 * BAR, colors=TICK, linewidth=1.1, zorder=4)
            keys.setdefault(
                REROOT,
                Line2D([], [], color=TICK, marker="|", linestyle="", markersize=11, label=REROOT),
            )
    number_steps(axis, found, window, heights)
    for kind in (GROWTH, COMMIT):
        arrows = [
            one
            for one in found.messages
            if one.kind == kind and one.source in heights and one.sink in heights
        ]
        arrows = [one for one in arrows if one.sent < window[1] and one.taken > window[0]]
        if arrows:
            draw_arrows(axis, arrows, heights, colours)
            colour, head = (DRAFTERS[0], "^") if kind == GROWTH else (RETURN, "v")
            keys[kind] = Line2D(
                [], [], color=colour, marker=head, markersize=5, linewidth=0.9, label=kind
            )
    axis.set_yticks(
        list(heights.values()), [shorten(lane) for lane in heights], fontsize=11, parse_math=False
    )
    axis.set_ylim(min(heights.values()) - 0.6, max(heights.values()) + 0.6)
    axis.tick_params(axis="both", length=0)
    axis.tick_params(axis="x", labelbottom=False)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color=OTHER, alpha=0.4, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.legend(
        handles=list(keys.values()),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(keys),
        frameon=False,
        fontsize=10,
        handlelength=1.4,
    )


def lane_heights(found: Timeline) -> Iterator[float]:
    """Yields the heights of the lanes, from 0 down, with space for arrows below the target."""
    y = 0.0
    for lane in found.blocks:
        yield y
        y -= GAP if lane == TARGET else 1.0


def number_steps(
    axis: "Axes", found: Timeline, window: Interval, heights: dict[str, float]
) -> None:
    """Labels the bars of steps that are wide enough with the tokens that they committed.

    These are the accepted tokens, and one of the target for each session.
    """
    for bar in blocks_within(found.blocks.get(TARGET, []), window):
        seen = (max(bar.began, window[0]), min(bar.ended, window[1]))
        if (
            bar.name == COMPUTE
            and {"accepted", "sessions"} <= bar.figures.keys()
            and seen[1] - seen[0] > LABEL * (window[1] - window[0])
        ):
            tokens = f"+{bar.figures['accepted'] + bar.figures['sessions']:g}"
            axis.text(
                500 * sum(seen),
                heights[TARGET],
                tokens,
                color="white",
                fontsize=8.5,
                ha="center",
                va="center",
                zorder=5,
            )


def draw_arrows(
    axis: "Axes", arrows: list[Message], heights: dict[str, float], colours: dict[str, str]
) -> None:
    """Draws lines from lane to lane, with a head where the message was received."""
    from matplotlib.collections import LineCollection

    lines, shades = [], []
    for one in arrows:
        down = heights[one.sink] < heights[one.source]
        lines.append(
            [
                (1e3 * one.sent, heights[one.source] + (-BAR if down else BAR)),
                (1e3 * one.taken, heights[one.sink] + (BAR if down else -BAR)),
            ]
        )
        shades.append(RETURN if down else colours.get(one.source, RETURN))
    axis.add_collection(
        LineCollection(lines, colors=shades, linewidths=0.8, alpha=0.75, zorder=2), autolim=False
    )
    for head, down in (("v", True), ("^", False)):
        ends = [
            (line[1], shade)
            for line, shade in zip(lines, shades, strict=True)
            if (line[1][1] < line[0][1]) is down
        ]
        if ends:
            # A marker points at the edge, so its middle is half its height before the edge.
            xs, ys = (
                [x for (x, _), _ in ends],
                [y + (0.06 if down else -0.06) for (_, y), _ in ends],
            )
            axis.scatter(
                xs, ys, s=14, marker=head, c=[shade for _, shade in ends], linewidths=0, zorder=4
            )


def draw_counter(
    axis: "Axes",
    name: str,
    of: dict[str, list[tuple[float, float]]],
    window: Interval,
    colours: dict[str, str],
) -> None:
    highest = 1.0
    for process, values in sorted(of.items()):
        colour = colours.get(process, TARGETS[COMPUTE])
        before = [value for at, value in values if at < window[0]][-1:]
        inside = [(at, value) for at, value in values if window[0] <= at <= window[1]]
        points = [*((window[0], value) for value in before), *inside]
        if points:
            points.append((window[1], points[-1][1]))
            highest = max(highest, *(value for _, value in points))
            axis.step(
                [1e3 * at for at, _ in points],
                [value for _, value in points],
                where="post",
                color=colour,
                linewidth=1.2,
            )
    axis.set_ylim(0, 1.15 * highest)
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11, parse_math=False)
    axis.tick_params(axis="both", labelsize=9, color=OTHER)
    axis.locator_params(axis="y", nbins=3, integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=OTHER, alpha=0.4, linewidth=0.6)


def blocks_within(blocks: list[Block], window: Interval) -> Iterator[Block]:
    return (block for block in blocks if block.began < window[1] and block.ended > window[0])


def shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…"
