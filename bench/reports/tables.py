"""The tables of a benchmark, for the terminal and for Markdown."""

from bench.core import compare
from bench.core.methods import LIVING, PLAIN
from bench.core.prompts import category
from bench.core.results import Results
from bench.core.summary_stats import Spread
from bench.reports.goals import findings
from bench.reports.grid import Grid

REFERENCES = ("plain", "transformers greedy")


def goals(results: Results) -> Grid:
    rows = [
        (found.goal.what, found.wanted, found.measured, found.verdict)
        for found in findings(results)
    ]
    return Grid("goals", ("goal", "wanted", "measured", ""), tuple(rows))


def speeds(results: Results, temperature: float, batch: int = 1) -> Grid:
    """Return the methods by falling speed; ratios are paired by prompt and repetition."""
    rows = []
    for facts in results.methods:
        found = compare.decode_speed(results, facts.name, temperature, batch)
        all_of_it = compare.overall_speed(results, facts.name, temperature, batch)
        if found is None or all_of_it is None:
            continue
        ratios = [
            format_spread(
                compare.speed_ratio(results, facts.name, reference, temperature, batch), 2
            )
            for reference in REFERENCES
        ]
        same, of = compare.agreement(results, facts.name, "plain", temperature, batch)
        text = (
            f"{same} of {of}" if of and (facts.who == "ours" or temperature == 0) else "-"
        )  # transformers samples with other noise
        row = (
            facts.name,
            facts.who,
            str(facts.cores),
            format_spread(found, 1),
            *ratios,
            f"{all_of_it.median:.1f}",
            text,
        )
        rows.append((found.median, row))
    columns = (
        "method",
        "by",
        "cores",
        "tokens/s",
        "x plain",
        "x transformers greedy",
        "tokens/s with prompt",
        "same text as plain",
    )
    title = f"temperature {temperature:g}" + (f", batch {batch}" if batch > 1 else "")
    return Grid(
        title, columns, tuple(row for _, row in sorted(rows, key=lambda pair: -pair[0])), ("by",)
    )


def categories(results: Results, temperature: float) -> Grid:
    """Return plain and living decoding by category of the prompts.

    There are no rows if all prompts are of one category, or each of its own.
    """
    prompts = {run.prompt for run in results.runs if run.batch == 1}
    names = sorted({category(prompt) for prompt in prompts})
    rows = []
    for name in names if 1 < len(names) < len(prompts) else ():
        found = compare.of_category(results, name)
        steps = compare.total_steps(found, LIVING.name, temperature)
        runs = compare.runs_of(found, LIVING.name, temperature)
        if not runs or not steps:
            continue
        speeds = (
            compare.decode_speed(found, method, temperature) for method in (PLAIN.name, LIVING.name)
        )
        ratio = compare.speed_ratio(found, LIVING.name, PLAIN.name, temperature)
        rows.append(
            (
                name,
                str(len({run.prompt for run in runs})),
                *(format_spread(speed, 1) for speed in speeds),
                format_spread(ratio, 2),
                f"{sum(run.tokens for run in runs) / steps.rounds:.2f}",
            )
        )
    return Grid(
        f"by category, temperature {temperature:g}",
        ("prompts", "number", "plain, tokens/s", "living, tokens/s", "x plain", "tokens/step"),
        tuple(rows),
    )


def format_spread(found: Spread | None, digits: int) -> str:
    """Format median and quartiles."""
    return (
        f"{found.median:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"
        if found
        else "-"
    )


def steps(results: Results, temperature: float) -> Grid:
    """Return the step figures of our methods."""
    rows = []
    for facts in results.methods:
        found, parts = (
            compare.total_steps(results, facts.name, temperature),
            compare.time_shares(results, facts.name, temperature),
        )
        if found is None or parts is None or not found.rounds:
            continue
        tokens = sum(run.tokens for run in compare.runs_of(results, facts.name, temperature))
        by_drafter = ", ".join(f"{name} {count}" for name, count in found.by_drafter.items()) or "-"
        rows.append(
            (
                facts.name,
                f"{tokens / found.rounds:.2f}",
                f"{found.verified / found.rounds:.1f}",
                f"{found.accepted / found.verified:.0%}" if found.verified else "-",
                f"{found.hits / found.rounds:.0%}" if found.drafted else "-",
                f"{found.lead:.1f}" if found.lead is not None else "-",
                *(f"{parts[part]:.0%}" for part in ("compute", "wait", "bookkeeping")),
                by_drafter,
            )
        )
    columns = (
        "method",
        "tokens/step",
        "nodes/step",
        "accepted",
        "hits",
        "lead",
        "compute",
        "wait",
        "bookkeeping",
        "accepted by drafter",
    )
    return Grid(
        f"the target's steps, temperature {temperature:g}",
        columns,
        tuple(rows),
        ("accepted by drafter",),
    )


def sweep(results: Results) -> Grid:
    """Return the settings that were tried, by falling speed within each method."""
    tried = sorted(results.sweep, key=lambda one: (one.name, -one.tokens_per_second))
    rows = [(one.name, one.detail, f"{one.tokens_per_second:.1f}") for one in tried]
    return Grid("settings tried", ("method", "setting", "tokens/s"), tuple(rows), ("setting",))


def batches(results: Results, temperature: float = 0.0) -> Grid:
    """Return tokens per second of each batch as a whole."""
    names = [
        facts.name
        for facts in results.methods
        if any(run.method == facts.name and run.batch > 1 for run in results.runs)
    ]
    rows = []
    for batch in compare.batches(results):
        found = [compare.decode_speed(results, name, temperature, batch) for name in names]
        ratio = compare.speed_ratio(results, "living", "plain", temperature, batch)
        rows.append(
            (str(batch), *(format_spread(one, 1) for one in found), format_spread(ratio, 2))
        )
    return Grid(
        "batches",
        ("batch", *(f"{name}, tokens/s" for name in names), "living / plain"),
        tuple(rows) if names else (),
    )


def profile(results: Results) -> Grid:
    """Return the step times of the pair alone, then of the target during the runs."""
    places = results.profile.places
    columns = [results.profile.target, results.profile.draft, *(place.target for place in places)]
    head = [
        f"T(n) at temperature {place.temperature:g}, {place.batch} at a time, ms"
        for place in places
    ]
    widths = sorted(set().union(*columns))
    rows = [(str(n), *(milliseconds(times.get(n)) for times in columns)) for n in widths]
    return Grid("step times", ("rows", "target T(n), ms", "draft t(n), ms", *head), tuple(rows))


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def acceptance(results: Results) -> Grid:
    ranks = sorted({rank for found in results.profile.acceptance for rank in found.ranks})
    rows = [
        (
            f"{found.temperature:g}",
            str(found.batch),
            *(f"{found.ranks[rank]:.3f}" if rank in found.ranks else "-" for rank in ranks),
        )
        for found in results.profile.acceptance
    ]
    return Grid(
        "acceptance",
        ("temperature", "texts at a time", *(f"k = {rank}" for rank in ranks)),
        tuple(rows),
    )


def bounds(results: Results) -> Grid:
    rows = []
    for found in (of for of in results.profile.acceptance if of.batch == 1):
        limit = compare.bound_of(results, found.temperature)
        share = compare.bound_share(results, "living", found.temperature)
        if limit:
            verifying = f"{limit.verifying:.1f} at {limit.rows} rows"
            times = f"{limit.rate * compare.step_times_in_place(results, found.temperature)[1]:.2f}"
            reached = f"{share:.0%}" if share else "not measured"
            rows.append(
                (
                    f"{found.temperature:g}",
                    f"{limit.drafting:.1f}",
                    verifying,
                    f"{limit.chain:.1f}",
                    times,
                    reached,
                )
            )
    head = (
        "temperature",
        "1/t + 1/T, tokens/s",
        "most of E(n)/T(n), tokens/s",
        "of chains alone",
        "bound, x plain",
        "living reaches",
    )
    return Grid("bound", head, tuple(rows))


def forecasts(results: Results) -> Grid:
    rows = [
        (
            method,
            f"{temperature:g}",
            str(batch),
            f"{expected:.1f}",
            f"{measured:.1f}",
            f"{expected / measured - 1:+.0%}",
        )
        for (method, temperature, batch), (expected, measured) in compare.forecasts_and_measured(
            results
        ).items()
    ]
    return Grid(
        "the planner's forecast",
        ("method", "temperature", "batch", "expected, tokens/s", "measured", "difference"),
        tuple(rows),
    )
