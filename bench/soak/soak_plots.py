"""The picture of a soak: each quantity over time, a line for each life of a process."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.reports.plots import DPI, INK, STYLE
from bench.soak.growth import HOUR_S, QUANTITIES
from bench.soak.soak_report import SoakReport

COLOURS = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]


def draw_soak(report: SoakReport, file: Path) -> None:
    """Write the picture as PNG. Processes that are not judged are drawn thinly."""
    names = list(dict.fromkeys(track.process for track in report.tracks))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.1 * len(QUANTITIES)))
        panels = figure.subplots(len(QUANTITIES), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (quantity, (unit, _)) in zip(panels, QUANTITIES.items(), strict=True):
            for track in report.tracks:
                hours = [at / HOUR_S for at in track.times]
                axis.plot(
                    hours,
                    track.values[quantity],
                    color=colours[track.process],
                    linewidth=1.4 if track.judged else 0.7,
                )
            axis.axvline(report.warm_up / HOUR_S, color=INK, linewidth=0.6, linestyle=":")
            axis.set_title(f"{quantity}, {unit}" if unit else quantity)
            axis.set_ylim(bottom=0)
            axis.grid(axis="y")
        panels[-1].set_xlabel("hours; the dotted line ends the warm-up")
        lines = [mpl.lines.Line2D([], [], color=colours[name], label=name) for name in names]
        figure.legend(handles=lines, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0.0))
        figure.tight_layout()
        figure.savefig(file, dpi=DPI, bbox_inches="tight")
