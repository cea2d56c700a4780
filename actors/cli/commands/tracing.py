"""`outrider trace`: summarizes and draws a trace."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors.tracing.trace_reader import (
    DelayStats,
    Interval,
    Timeline,
    TraceStats,
    middle_window,
    read_trace,
    trace_stats,
)
from runtime.core.errors import InvalidRequest
from runtime.telemetry.tracing import COMMIT, GROWTH


def trace(
    file: Annotated[
        Path,
        typer.Argument(help="trace file of generate, serve or bench; ui.perfetto.dev opens it too"),
    ],
    png: Annotated[Path | None, typer.Option(help="draw the trace as a PNG")] = None,
    begin: Annotated[
        float | None,
        typer.Option("--from", help="start in seconds of the trace; default: start of the run"),
    ] = None,
    end: Annotated[
        float | None,
        typer.Option(
            "--to",
            help="end; default: end of the run; without both, half a second is drawn",
        ),
    ] = None,
) -> None:
    """Show how target, drafters and wire spent their time, and draw it."""
    found = read_trace(file)
    window = choose_window(found, begin, end)
    if png is not None:
        from actors.tracing.trace_plot import draw_trace  # matplotlib

        draw_trace(found, window if (begin, end) != (None, None) else middle_window(found), png)
    Console(highlight=False).print(trace_table(found, trace_stats(found, window), window))


def choose_window(found: Timeline, begin: float | None, end: float | None) -> Interval:
    """Returns the run, or the given part of the trace. Raises InvalidRequest if it is empty."""
    first, last = found.bounds
    wanted = (found.run[0] if begin is None else begin, found.run[1] if end is None else end)
    if not wanted[0] < wanted[1]:
        raise InvalidRequest(
            f"the window from {wanted[0]:g} s to {wanted[1]:g} s is empty: "
            "give --from a smaller value than --to",
            "from",
        )
    window = (max(wanted[0], first), min(wanted[1], last))
    if not window[0] < window[1]:
        raise InvalidRequest(
            f"nothing happens between {wanted[0]:g} s and {wanted[1]:g} s: the trace goes from "
            f"{first:.3f} s to {last:.3f} s",
            "from",
        )
    return window


def trace_table(found: Timeline, seen: TraceStats, window: Interval) -> Table:
    title = f"{window[0]:.3f} s to {window[1]:.3f} s"
    shown = Table(
        title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
    )
    shown.add_column(style="dim")
    shown.add_column()
    shown.add_row(
        "target's time", ", ".join(f"{name} {share:.0%}" for name, share in seen.target.items())
    )
    for name, share in seen.drafters.items():
        shown.add_row(Text(name), f"in a step {share:.0%} of the time")
    if seen.drafters:
        shown.add_row("overlap", f"target and some drafter compute {seen.overlap:.0%} of the time")
    for kind in (GROWTH, COMMIT) if seen.drafters else ():
        shown.add_row(f"{kind}s", describe_delay(seen.delays[kind], found.unanswered.get(kind, 0)))
    if found.cut:
        shown.add_row("note", "the recording was full: its beginning may be missing")
    return shown


def describe_delay(delay: DelayStats, unanswered: int) -> str:
    lost = f"; {unanswered} in the whole trace were not received" if unanswered else ""
    if not delay.count:
        return f"0{lost}"
    skew = (
        f" (clocks disagree: the minimum is {1e3 * delay.least:.2f} ms)" if delay.least < 0 else ""
    )
    return f"{delay.count}, median {1e3 * delay.median:.2f} ms from sent to received{skew}{lost}"
