"""`make bench-methods`: every way to guess, alone and beside the draft model, on the target that ships, widened; one table."""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import loop
from bench.apart import apart
from bench.loop import cases, rounds
from bench.machine import machine, two_cores
from bench.methods import Method, Ours, Outcome
from bench.options import RESULTS
from bench.ours import Cluster, Pair, running
from bench.prompts import Prompt, held_out
from bench.tables import Grid
from bench.widen import widened_head, widened_small
from runtime import config
from runtime.models.load import load_tokenizer
from runtime.tracing import STEP, Recording, Span

DRAFTERS = ("model", "ngram", "layer-skip")
HEADS = ("token-recycling", "medusa", "hidden-transfer")
LEARNING = 3  # prompts from which each method learns what its guesses are worth; they are not measured
NEW_TOKENS = 96
TEMPERATURES = (0.0, 0.8)
FIRST_RANKS = 4


@dataclass(slots=True)
class Found:
    """Of one method at one temperature. `rates`: tokens per second of decoding, by prompt; `acceptance`: by method, of the first ranks."""

    name: str
    temperature: float
    rates: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    steps: int = 0
    accepted: dict[str, int] = field(default_factory=dict)
    own: dict[str, list[float]] = field(default_factory=dict)  # milliseconds of its passes, by who guessed
    computed: float = 0.0  # seconds
    acceptance: dict[str, list[float]] = field(default_factory=dict)
    same: bool = True  # tokens as plain decoding


def methods() -> list[Method]:
    """Plain decoding; each drafter and head alone; all but layers beside the model; and what costs next to nothing together with it."""
    alone = [Method(name, Ours("living", drafters=(name,))) for name in DRAFTERS]
    alone += [Method(name, Ours("living", heads=(name,))) for name in HEADS]
    beside = [Method("model + ngram", Ours("living", drafters=("model", "ngram")))]
    beside += [Method(f"model + {name}", Ours("living", drafters=("model",), heads=(name,))) for name in HEADS]
    last = Method("model + ngram + token-recycling", Ours("living", drafters=("model", "ngram"), heads=("token-recycling",)))
    return [Method("plain", Ours("plain")), *alone, *beside, last]


def measured(cluster: Cluster, plan: Sequence[loop.Round], note: str, found: dict[tuple[str, float], Found]) -> None:
    with loop.bar() as progress:
        task = progress.add_task(note, total=sum(len(round_.methods) for round_ in plan))
        for round_ in plan:
            outputs = {}
            for method in round_.methods:
                progress.update(task, description=f"{note}: {method.name}")
                outcome = cluster.run(method, round_.case.prompts, round_.case.sampling)
                temperature = round_.case.sampling.temperature
                one = found.setdefault((method.name, temperature), Found(method.name, temperature))
                add(one, round_.case.name, outcome, cluster.recordings, cluster.learned)
                outputs[method.name] = outcome.outputs
                progress.advance(task)
            for name, output in outputs.items():
                found[name, round_.case.sampling.temperature].same &= output == outputs["plain"]


def add(one: Found, prompt: str, outcome: Outcome, recordings: Sequence[Recording], learned: Mapping[str, Any]) -> None:
    tokens, seconds = sum(map(len, outcome.outputs)) - outcome.first_tokens, outcome.seconds - outcome.first_seconds
    if outcome.steps is None or tokens < 1 or seconds <= 0:
        return
    one.rates[prompt] = tokens / seconds
    one.tokens += sum(map(len, outcome.outputs))
    one.steps += outcome.steps.rounds
    one.computed += outcome.steps.computed
    one.accepted = dict(Counter(one.accepted) + Counter(outcome.steps.by_drafter))
    for part in recordings:
        for event in part.events:
            if isinstance(event, Span) and event.name == STEP:
                one.own.setdefault(event.lane, []).append(1e3 * (event.ended - event.began))
    one.acceptance = by_rank(learned.get(f"{one.temperature:.1f}", {}))


def by_rank(band: Mapping[str, Any]) -> dict[str, list[float]]:
    """How often a guess was right once its parent was, for the first ranks of each who guessed."""
    found = {}
    for who, (tries, hits) in band.get("tables", {}).items():
        sums = [(sum(tries[rank]), sum(hits[rank])) for rank in range(FIRST_RANKS)]
        found[who] = [right / all_ if all_ else 0.0 for all_, right in sums]
    return found


def table(found: Iterable[Found], temperature: float) -> Grid:
    rows = [one for one in found if one.temperature == temperature and one.rates]
    plain = next(one for one in rows if one.name == "plain")
    model = next(one for one in rows if one.name == "model")
    lines = []
    for one in rows:
        speed = statistics.median(one.rates.values())
        own = {who: statistics.median(times) for who, times in one.own.items()}
        lines.append(
            (
                one.name,
                f"{speed:.1f}",
                f"{paired(one, plain):.2f}",
                f"{paired(one, model):.2f}",
                f"{one.tokens / one.steps:.2f}",
                f"{1e3 * one.computed / one.steps:.1f}",
                ", ".join(f"{who} {count}" for who, count in sorted(one.accepted.items()) if who) or "-",
                "; ".join(f"{who} {' '.join(f'{share:.2f}' for share in shares)}" for who, shares in one.acceptance.items()) or "-",
                ", ".join(f"{who} {time:.2f}" for who, time in own.items()) or "-",
                "yes" if one.same else "NO",
            )
        )
    head = ("method", "tokens/s", "x plain", "x model", "tokens/step", "pass, ms", "accepted", "right by rank", "own ms", "text as plain")
    return Grid(f"temperature {temperature:g}", head, tuple(lines), ("accepted", "right by rank", "own ms"))


def paired(above: Found, below: Found) -> float:
    return statistics.median(above.rates[prompt] / below.rates[prompt] for prompt in above.rates.keys() & below.rates.keys())


def sizes() -> Grid:
    """What is loaded, and what training it took."""
    lines = []
    for name in HEADS[1:]:
        folder = Path(config.shipped("target")).parent / "heads" / name
        bytes_ = (folder / "model.safetensors").stat().st_size
        lines.append((name, f"{bytes_ / 1e6:.2f} MB", line_of(folder, "steps"), line_of(folder, "time of the last run")))
    draft = Path(config.shipped("draft"))
    lines.append(("model", f"{(draft / 'model.safetensors').stat().st_size / 1e6:.2f} MB", "see its card", ""))
    return Grid("size and training", ("method", "weights", "steps", "time"), tuple(lines), ("steps", "time"))


def line_of(folder: Path, name: str) -> str:
    """What the card's table says of `name`."""
    lines = (folder / "README.md").read_text("utf-8").splitlines()
    return next((line.split("|")[2].strip() for line in lines if line.startswith(f"| {name} |")), "")


def page(found: Sequence[Found], prompts: int) -> str:
    facts = machine(2)
    parts = [
        "# Ways to guess",
        "The target that ships, widened to the cost of 88 million parameters, float32, on one core; drafters on another. "
        f"{facts.processor}, {facts.date}. {prompts} prompts from held-out files, {NEW_TOKENS} new tokens, in turns. "
        f"What its guesses are worth each method has learned from {LEARNING} others. Medians over prompts; ratios are paired by prompt.",
        "*pass*: the target's, in milliseconds. *right by rank*: share of first, second, ... guesses that were right once their parent "
        "was. *own ms*: a head's time in a step of the target, a drafter's pass.",
    ]
    for temperature in TEMPERATURES:
        parts += [f"## Temperature {temperature:g}", table(found, temperature).markdown()]
    parts += ["## Size and training", sizes().markdown()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5, help="prompts")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    console, cores = Console(), two_cores()
    with console.status("widening the target and its heads"):
        target = apart(widened_small, (config.shipped("target"), "float32"))
        shipped = Path(config.shipped("target")).parent / "heads"
        heads = {name: str(widened_head(shipped / name, target)) if (shipped / name).is_dir() else "" for name in HEADS}
    drawn: list[Prompt] = held_out(load_tokenizer(str(target)), LEARNING + arguments.count, 2)
    which = methods()
    found: dict[tuple[str, float], Found] = {}
    pair = Pair(str(target), config.shipped("draft"), "float32", cores, heads)
    with running(pair, which) as cluster:
        measured(cluster, rounds(cases(drawn[:LEARNING], 1, TEMPERATURES, 1, NEW_TOKENS, 1), which), "learning", {})
        measured(cluster, rounds(cases(drawn[LEARNING:], 1, TEMPERATURES, 1, NEW_TOKENS, 1), which), "runs", found)
    everything = list(found.values())
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "methods.json").write_text(json.dumps([asdict(one) for one in everything], indent=1) + "\n", "utf-8")
    (arguments.folder / "methods.md").write_text(page(everything, arguments.count), "utf-8")
    for temperature in TEMPERATURES:
        console.print(table(everything, temperature).terminal())
    console.print(arguments.folder / "methods.md")


if __name__ == "__main__":
    main()
