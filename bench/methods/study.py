"""`make bench-methods`: every way to guess, alone and beside the draft model, on widened targets; one table."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ray
from rich.console import Console

from bench.core import loop
from bench.core.loop import cases, rounds
from bench.core.machine import machine, two_cores
from bench.core.methods import FIRST, Method, OutriderMethod
from bench.core.options import RESULTS
from bench.core.outrider_runner import OutriderRunner, Pair, running
from bench.core.prompts import Prompt, encode, from_file, held_out
from bench.core.subprocess_call import call_in_subprocess
from bench.core.widen import widened_head, widened_small
from bench.methods.method_goals import BESIDE, MODEL, verdicts
from bench.methods.method_stats import MethodStats, add
from bench.methods.methods_report import PLAIN, Study, draw, methods, page, papers
from bench.methods.weights import Cost, line_of, parameters, training_of
from runtime import config
from runtime.core.errors import Unavailable
from runtime.deployment_builder import read_layers
from runtime.heads.token_recycling import TokenRecycling
from runtime.method_registry import head_methods
from runtime.model_paths import bundled_model
from runtime.models.layer_subset import every_second_layer
from runtime.models.loader import load_tokenizer, read_config, read_json

DRAFTERS = (MODEL, "ngram", "layer-skip")  # and, where they ship, those that were trained
HEADS = ("token-recycling", "medusa", "hidden-transfer")
UNTRAINED = ("ngram", "layer-skip", "token-recycling")
LEARNING = (
    2  # prompts from which each method learns what its guesses are worth; they are not measured
)
NEW_TOKENS = 96
TEMPERATURES = (0.0, 0.8)
SHIPPED = "the target that ships"
LAYERS = (
    RESULTS / "layers.json"
)  # as `outrider tune layers` has found them for the target that ships
SHARED = Path(__file__).parents[3] / "shared"
OTHERS = (
    ("babyllama361-as105", "babyllama105"),
    ("stories260K", "llama2xs-500it"),
)  # targets and drafts in SHARED / "models"
STORIES = SHARED / "prompts" / "tinystories_20_openings.json"
FEW, LONGEST = 2, 128  # prompts of each of these that are measured; tokens of one


@dataclass(frozen=True, slots=True)
class Bench:
    """One target to be measured. `source`: its folder before it was widened; the first LEARNING of the `prompts` are not measured."""

    name: str
    source: Path
    pair: Pair
    prompts: Sequence[Prompt]
    which: Sequence[str]

    @property
    def about(self) -> str:
        model = read_config(Path(self.pair.target), self.pair.target)
        return (
            f"{self.source.name}, widened to {model.hidden_size}x{model.num_hidden_layers} without changing its function "
            f"({parameters(Path(self.pair.target)) / 1e6:.0f} million parameters), float32; draft model: {Path(self.pair.draft).name}. "
            f"{len(self.prompts) - LEARNING} prompts, {NEW_TOKENS} new tokens, all methods in turns."
        )


def ways(which: Sequence[str]) -> list[Method]:
    """Plain decoding; the model; each other way to guess alone, then beside the model; and what costs next to nothing together with it."""

    def guessing(*names: str) -> OutriderMethod:
        drafters, heads = (
            tuple(name for name in names if (name in head_methods()) == is_head)
            for is_head in (False, True)
        )
        return OutriderMethod("living", drafters=drafters, heads=heads)

    others = [name for name in which if name != MODEL]
    together = Method(
        f"{BESIDE}ngram + token-recycling", guessing(MODEL, "ngram", "token-recycling")
    )
    alone = [Method(name, guessing(name)) for name in (MODEL, *others)]
    beside = [Method(BESIDE + name, guessing(MODEL, name)) for name in others]
    return [Method(PLAIN, OutriderMethod("plain")), *alone, *beside, together]


def measured(
    cluster: OutriderRunner,
    plan: Sequence[loop.Round],
    note: str,
    found: dict[tuple[str, float], MethodStats],
) -> None:
    with loop.bar() as progress:
        task = progress.add_task(note, total=sum(len(round_.methods) for round_ in plan))
        for round_ in plan:
            temperature, outputs = round_.case.sampling.temperature, {}
            for method in round_.methods:
                progress.update(task, description=f"{note}: {method.name}")
                before = proposed(cluster)
                try:
                    outcome = cluster.run(method, round_.case.prompts, round_.case.sampling)
                except Unavailable as error:  # of one prompt: the others are measured all the same
                    progress.console.print(
                        f"{method.name}, {round_.case.name}: not measured: {error}"
                    )
                    continue
                nodes = {
                    who: count - before.get(who, 0) for who, count in proposed(cluster).items()
                }
                one = found.setdefault(
                    (method.name, temperature), MethodStats(method.name, temperature)
                )
                add(one, round_.case.name, outcome, cluster.recordings, cluster.learned, nodes)
                outputs[method.name] = outcome.outputs
                progress.advance(task)
            for name, output in outputs.items():
                found[name, temperature].same &= output == outputs[PLAIN]


def proposed(cluster: OutriderRunner) -> dict[str, int]:
    """Nodes that were new to the target's trees since its start, by who guessed."""
    report = ray.get(cluster.targets[FIRST].report.remote())
    return {who: guesses.proposed for who, guesses in report.guesses.items()}


def benches(count: int) -> list[Bench]:
    cores = two_cores()
    shipped = Path(bundled_model("target"))
    target = call_in_subprocess(widened_small, (str(shipped), "float32"))
    trained = {
        name: folder for name in HEADS if (folder := shipped.parent / "heads" / name).is_dir()
    }
    heads = {
        name: str(widened_head(trained[name], target)) if name in trained else "" for name in HEADS
    }
    others = {
        name: str(widened_head(folder, target))
        for name in sorted(config.TRAINED_METHODS)
        if (folder := shipped.parent / name).is_dir()
    }
    layers = read_layers(str(LAYERS)) or every_second_layer(read_config(shipped, shipped.name))
    pair = Pair(str(target), bundled_model("draft"), "float32", cores, heads, tuple(layers), others)
    found = [
        Bench(
            SHIPPED,
            shipped,
            pair,
            held_out(load_tokenizer(str(target)), LEARNING + count, 2),
            (*DRAFTERS, *others, *HEADS),
        )
    ]
    for name, draft in OTHERS:
        source, small = SHARED / "models" / name, SHARED / "models" / draft
        if source.is_dir() and small.is_dir() and STORIES.is_file():
            target = call_in_subprocess(widened_small, (str(source), "float32"))
            openings = encode(load_tokenizer(str(target)), from_file(STORIES), LONGEST)[
                : LEARNING + min(count, FEW)
            ]
            layers = every_second_layer(read_config(source, name))
            pair = Pair(
                str(target), str(small), "float32", cores, {"token-recycling": ""}, tuple(layers)
            )
            found.append(Bench(name, source, pair, openings, (MODEL, *UNTRAINED)))
    return found


def costs(bench: Bench) -> dict[str, Cost]:
    """By method, in the order of the table."""
    target, pair = Path(bench.pair.target), bench.pair
    model = read_config(target, pair.target)
    table = TokenRecycling(model.vocab_size)
    own = (
        line_of(Path(bundled_model("target")).parent / "README.md", "trained on", column=2)
        if pair.draft == bundled_model("draft")
        else ""
    )
    searched = bench.name == SHIPPED and LAYERS.is_file()
    known = {
        MODEL: Cost(2 * parameters(Path(pair.draft)), own or "by others"),
        "ngram": Cost(0, "none"),
        "layer-skip": Cost(
            2 * parameters(target, pair.layers),
            "a search" if searched else "none: every second layer",
        ),
        "token-recycling": Cost(table.tokens.nbytes + table.scores.nbytes, "none"),
    }
    for name, folder in pair.heads.items():
        if folder:
            known[name] = Cost(
                4 * parameters(Path(folder)),
                training_of(Path(bundled_model("target")).parent / "heads" / name),
            )
    for name, folder in pair.trained.items():
        stay = read_json(Path(folder) / "config.json", folder)["settings"]["layers"]
        known[name] = Cost(
            2 * parameters(target, stay), training_of(Path(bundled_model("target")).parent / name)
        )
    return {name: known[name] for name in bench.which}


def plan_of(prompts: Sequence[Prompt], which: Sequence[Method]) -> list[loop.Round]:
    """Every text goes on for NEW_TOKENS, also where the target would end it: one that ends at once tells nothing."""
    every = cases(prompts, 1, TEMPERATURES, 1, NEW_TOKENS, 1)
    return rounds(
        [replace(case, sampling=replace(case.sampling, ignore_eos=True)) for case in every], which
    )


def study(bench: Bench) -> Study:
    which = ways(bench.which)
    found: dict[tuple[str, float], MethodStats] = {}
    learned, measuring = bench.prompts[:LEARNING], bench.prompts[LEARNING:]
    with running(bench.pair, which) as cluster:
        measured(cluster, plan_of(learned, which), f"{bench.name}: learning", {})
        measured(cluster, plan_of(measuring, which), bench.name, found)
    return Study(bench.name, bench.about, tuple(found.values()), costs(bench))


def write(studies: Sequence[Study], folder: Path) -> Path:
    """methods.json, methods.md and methods.png; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine(2)
    content: Mapping[str, object] = {
        "machine": facts.model_dump(),
        "studies": [asdict(one) for one in studies],
    }
    (folder / "methods.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    draw(studies[0], folder / "methods.png")
    (folder / "methods.md").write_text(page(studies, facts, "methods.png"), "utf-8")
    return folder / "methods.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3, help="prompts")
    parser.add_argument("--shipped", action="store_true", help="the target that ships alone")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    console, studies = Console(), []
    with console.status("widening targets and heads"):
        chosen = benches(arguments.count)[: 1 if arguments.shipped else None]
    for bench in chosen:
        studies.append(study(bench))
        file = write(studies, arguments.folder)  # after each: an interruption loses one target
    for one in studies:
        for temperature in one.temperatures:
            console.print(methods(one, temperature).terminal())
    console.print(verdicts(studies[0].by_temperature).terminal())
    console.print(papers(studies[0]).terminal())
    console.print(file)
