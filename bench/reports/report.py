"""The report of a benchmark: tables in the terminal, and a Markdown page with pictures."""

from pathlib import Path

from rich.console import Console

from bench.core import compare
from bench.core.machine import BF16_FLAGS
from bench.core.results import Results
from bench.reports import plots, tables
from bench.reports.grid import Grid


def print_report(results: Results, console: Console) -> None:
    by_temperature = [
        kind(results, temperature)
        for temperature in compare.temperatures(results)
        for kind in (tables.speeds, tables.categories, tables.steps)
    ]
    others = (
        tables.batches,
        tables.profile,
        tables.acceptance,
        tables.bounds,
        tables.forecasts,
        tables.goals,
    )
    for grid in (*by_temperature, *(kind(results) for kind in others)):
        if grid.rows:
            console.print(grid.terminal())


def write_report(results: Results, folder: Path, trace: Path | None = None) -> Path:
    """Write NAME.md and its pictures next to the results and return the page.

    `trace` is the picture of a recorded run, in the same folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw_pictures(results, folder) | ({"trace": trace} if trace else {})
    page = folder / f"{results.name}.md"
    page.write_text(
        report_page(results, {what: file.name for what, file in pictures.items()}), "utf-8"
    )
    return page


def report_page(results: Results, pictures: dict[str, str]) -> str:
    """Return the page; `pictures` maps subjects to file names next to the page."""
    parts = [f"# Benchmark: {results.name}", introduction(results)]
    parts += section("Goals", "", tables.goals(results))
    speeds = [tables.speeds(results, temperature) for temperature in compare.temperatures(results)]
    parts += section("Speed", image(pictures, "speed") + SPEED, *speeds)
    by_category = [
        tables.categories(results, temperature) for temperature in compare.temperatures(results)
    ]
    parts += section("By category of the prompts", "", *by_category)
    parts += section(
        "Many texts at a time", image(pictures, "batches") + BATCHES, tables.batches(results)
    )
    steps = [tables.steps(results, temperature) for temperature in compare.temperatures(results)]
    parts += section("Where the target's time went", image(pictures, "time") + STEPS, *steps)
    if "trace" in pictures:
        parts += ["## Half a second of living", image(pictures, "trace").strip()]
    parts += section(
        "The pair",
        image(pictures, "steps") + PAIR + cost_ratio(results),
        tables.profile(results),
        tables.acceptance(results),
    )
    parts += section("The bound", BOUND, tables.bounds(results))
    parts += section("The planner's forecast", FORECAST, tables.forecasts(results))
    parts += section("Settings tried", SWEEP, tables.sweep(results))
    parts += section("Methods", "", methods(results))
    return "\n\n".join(part for part in parts if part) + "\n"


SPEED = (
    "Tokens per second of decoding, from the first token to the last: median and quartiles over "
    "prompts. Each prompt counts with the median of its repetitions; ratios are paired by prompt "
    "and repetition. *With prompt* includes the prefill; no prompt is cached from an earlier run. "
    "Living has calibrated its guesses on other prompts, like a target that has already served."
)
FORECAST = (
    "Tokens of all texts divided by their total time, for each batch, expected and measured; "
    "decoding only."
)
BATCHES = "Tokens per second of all texts together, at temperature 0."
SWEEP = "Measured on separate prompts; the best setting of each method is used for the main runs."
STEPS = (
    "Shares of the decoding time. *Accepted*: the share of verified nodes on the target's path. "
    "*Hits*: steps whose new root had been guessed. *Lead*: tokens by which drafting was "
    "ahead when "
    "a step began."
)
PAIR = (
    "The first two columns are medians of each model alone on one core, before, between and after "
    "the runs. The others are T(n) from the passes of the runs, of plain decoding and of all "
    "schedules with the draft together. A shared machine is slower in some minutes than in others, "
    "so the bound and the forecasts use these values. "
)
BOUND = (
    "With an autoregressive drafter no scheme exceeds 1/t + 1/T tokens per second, and none with n "
    "rows exceeds E(n)/T(n), where E(n) is the mean number of tokens that the best tree of n rows "
    "commits if positions are independent. The lower of the two is the bound. *Of chains alone*: "
    "the same with one guess per position; trees gain at most the difference."
)


def introduction(results: Results) -> str:
    machine, pair, settings = results.machine, results.pair, results.settings
    native = sorted(BF16_FLAGS & set(machine.flags))
    facts = {
        "processor": f"{machine.processor}, {machine.cores} cores used, "
        f"{machine.memory_gib:.0f} GiB"
        + (f"; {', '.join(machine.flags)}" if machine.flags else "")
        + ("" if native else "; no native bf16"),
        "GPU": machine.gpu or "none used",
        "software": f"Python {machine.python}, torch {machine.torch}, "
        f"transformers {machine.transformers}",
        "target": f"{pair.target}, {pair.target_parameters / 1e6:.1f}M parameters, {pair.dtype}",
        "draft": f"{pair.draft}, {pair.draft_parameters / 1e6:.1f}M parameters, {pair.dtype}"
        if pair.draft_parameters
        else f"{pair.method} ({pair.draft})",
        "prompts": f"{settings.count} from {settings.prompts}, drawn with seed {settings.seed}",
        "output": f"at most {settings.new_tokens} tokens, or until an end-of-text token",
        "repetitions": f"{settings.repetitions} of ours at the lowest temperature, else 1; methods "
        "interleaved, order rotated",
        "date": machine.date,
    }
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    )


def section(title: str, text: str, *grids: Grid) -> list[str]:
    """Return a section, or nothing if no grid has rows."""
    full = [grid for grid in grids if grid.rows]
    if not full:
        return []
    headed = [
        f"**{grid.title}**\n\n{grid.markdown()}" if len(full) > 1 else grid.markdown()
        for grid in full
    ]
    return [f"## {title}", text, *headed]


def image(pictures: dict[str, str], what: str) -> str:
    return f"![{what}]({pictures[what]})\n\n" if what in pictures else ""


def cost_ratio(results: Results) -> str:
    target, draft = results.profile.target.get(1), results.profile.draft.get(1)
    if target is None or draft is None:
        return ""
    floor = results.profile.floor
    alone = (
        f" Memory bandwidth alone allows {1e3 * floor:.1f} ms for a target step, which takes "
        f"{target / floor:.2f} times as long."
        if floor
        else ""
    )
    return (
        f"Steps of one row: T = {1e3 * target:.1f} ms, t = {1e3 * draft:.2f} ms, c = T/t = "
        f"{target / draft:.1f}.{alone}"
    )


def methods(results: Results) -> Grid:
    rows = [(facts.name, facts.who, str(facts.cores), facts.detail) for facts in results.methods]
    return Grid(
        "methods", ("method", "by", "cores", "what it is"), tuple(rows), ("by", "what it is")
    )
