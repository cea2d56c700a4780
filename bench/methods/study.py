"""The study of `make bench-methods`: every drafting method, alone and together with the draft
model, on widened targets."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ray
from rich.console import Console

from bench.core import loop
from bench.core.loop import cases, rounds
from bench.core.machine import machine, two_cores
from bench.core.methods import FIRST, Method, OutriderMethod
from bench.core.options import RESULTS, choose_dtype
from bench.core.outrider_runner import ModelPair, OutriderRunner, running_cluster
from bench.core.prompts import (
    CHAT_PROMPTS,
    Prompt,
    encode_prompts,
    held_out_prompts,
    read_prompts,
    sample_prompts,
)
from bench.core.subprocess_call import call_in_subprocess
from bench.core.widen import widen_head, widen_to_small
from bench.methods.method_goals import MODEL, WITH_MODEL, goals_grid
from bench.methods.method_stats import MethodStats, add_run
from bench.methods.methods_report import (
    PLAIN,
    Study,
    draw_methods,
    methods_grid,
    methods_page,
    papers_grid,
    runs_grid,
)
from bench.methods.weights import Cost, card_value, count_parameters, training_cost
from bench.reports.grid import Grid
from runtime import config
from runtime.core.errors import Unavailable
from runtime.deployment_builder import read_layers
from runtime.heads.token_recycling import TokenRecycling
from runtime.method_registry import head_methods
from runtime.model_paths import bundled_model
from runtime.models.layer_subset import every_second_layer
from runtime.models.loader import load_tokenizer, read_config, read_json
from runtime.models.model_folder import find_folder

DRAFTERS = (MODEL, "ngram", "layer-skip")  # and the trained ones that ship
UNTRAINED_HEADS = ("ngram-head", "token-recycling")
HEADS = (*UNTRAINED_HEADS, "medusa", "hidden-transfer")
UNTRAINED = ("ngram", "layer-skip", *UNTRAINED_HEADS)
LEARNING_PROMPTS = 2  # prompts on which each method calibrates its guesses; not measured
NEW_TOKENS = 96
TEMPERATURES = (0.0, 0.8)
SHIPPED = "the target that ships"
LAYERS_FILE = RESULTS / "layers.json"  # the result of `outrider tune layers` for the shipped target
SHARED_FOLDER = Path(__file__).parents[3] / "shared"
OTHER_PAIRS = (
    ("babyllama361-as105", "babyllama105"),
    ("stories260K", "llama2xs-500it"),
)  # targets and drafts in SHARED_FOLDER / "models"
STORY_PROMPTS = SHARED_FOLDER / "prompts" / "tinystories_20_openings.json"
MODELS = Path(bundled_model("target")).parent
MAX_QUESTION_TOKENS = 1024
STORY_COUNT, MAX_PROMPT_TOKENS = (
    2,
    128,
)  # measured prompts of each of these, and their maximum length


@dataclass(frozen=True, slots=True)
class StudyTarget:
    """A target to measure.

    `source` is its folder before widening. The first LEARNING_PROMPTS of the `prompts` are not
    measured.
    """

    name: str
    source: Path
    pair: ModelPair
    prompts: Sequence[Prompt]
    method_names: Sequence[str]

    @property
    def about(self) -> str:
        model = read_config(Path(self.pair.target), self.pair.target)
        size = f"{count_parameters(Path(self.pair.target)) / 1e6:.0f} million parameters"
        what = (
            f"{self.source.name}, widened to {model.hidden_size}x{model.num_hidden_layers} "
            f"without changing its function ({size}), {self.pair.dtype}; draft model: "
            f"{Path(self.pair.draft).name}"
            if self.pair.draft
            else f"{self.name} ({size}), {self.pair.dtype}"
        )
        return (
            f"{what}. {len(self.prompts) - LEARNING_PROMPTS} prompts, {NEW_TOKENS} new tokens, all "
            "methods in turns."
        )


def guessing(*names: str) -> OutriderMethod:
    """Return the living schedule with these drafters and heads."""
    drafters, heads = (
        tuple(name for name in names if (name in head_methods()) == is_head)
        for is_head in (False, True)
    )
    return OutriderMethod("living", drafters=drafters, heads=heads)


def methods_of(which: Sequence[str]) -> list[Method]:
    """Return plain decoding, the model, each other method alone and with the model, and the cheap
    combination of model, ngram and token recycling."""
    others = [name for name in which if name != MODEL]
    together = Method(
        f"{WITH_MODEL}ngram + token-recycling", guessing(MODEL, "ngram", "token-recycling")
    )
    alone = [Method(name, guessing(name)) for name in (MODEL, *others)]
    beside = [Method(WITH_MODEL + name, guessing(MODEL, name)) for name in others]
    return [Method(PLAIN, OutriderMethod("plain")), *alone, *beside, together]


def measure_rounds(
    cluster: OutriderRunner,
    plan: Sequence[loop.Round],
    note: str,
    found: dict[tuple[str, float], MethodStats],
) -> None:
    with loop.progress_bar() as progress:
        task = progress.add_task(note, total=sum(len(round_.methods) for round_ in plan))
        for round_ in plan:
            temperature, outputs = round_.case.sampling.temperature, {}
            for method in round_.methods:
                progress.update(task, description=f"{note}: {method.name}")
                before = proposed_nodes(cluster)
                try:
                    outcome = cluster.run(method, round_.case.prompts, round_.case.sampling)
                except Unavailable as error:  # only this prompt is lost
                    progress.console.print(
                        f"{method.name}, {round_.case.name}: not measured: {error}"
                    )
                    continue
                nodes = {
                    who: count - before.get(who, 0)
                    for who, count in proposed_nodes(cluster).items()
                }
                one = found.setdefault(
                    (method.name, temperature), MethodStats(method.name, temperature)
                )
                add_run(one, round_.case.name, outcome, cluster.recordings, cluster.learned, nodes)
                outputs[method.name] = outcome.outputs
                progress.advance(task)
            for name, output in outputs.items():
                found[name, temperature].same &= output == outputs[PLAIN]


def proposed_nodes(cluster: OutriderRunner) -> dict[str, int]:
    """Return the nodes that were new to the target's trees since its start, by guesser."""
    report = ray.get(cluster.targets[FIRST].report.remote())
    return {who: guesses.proposed for who, guesses in report.guesses.items()}


def study_targets(count: int) -> list[StudyTarget]:
    cores = two_cores()
    shipped = Path(bundled_model("target"))
    target = call_in_subprocess(widen_to_small, (str(shipped), "float32"))
    trained = {
        name: folder for name in HEADS if (folder := shipped.parent / "heads" / name).is_dir()
    }
    heads = {
        name: str(widen_head(trained[name], target)) if name in trained else "" for name in HEADS
    }
    others = {
        name: str(widen_head(folder, target))
        for name in sorted(config.TRAINED_METHODS)
        if (folder := shipped.parent / name).is_dir()
    }
    layers = read_layers(str(LAYERS_FILE)) or every_second_layer(read_config(shipped, shipped.name))
    pair = ModelPair(
        str(target), bundled_model("draft"), "float32", cores, heads, tuple(layers), others
    )
    found = [
        StudyTarget(
            SHIPPED,
            shipped,
            pair,
            held_out_prompts(load_tokenizer(str(target)), LEARNING_PROMPTS + count, 2),
            (*DRAFTERS, *others, *HEADS),
        )
    ]
    for name, draft in OTHER_PAIRS:
        source, small = SHARED_FOLDER / "models" / name, SHARED_FOLDER / "models" / draft
        if source.is_dir() and small.is_dir() and STORY_PROMPTS.is_file():
            target = call_in_subprocess(widen_to_small, (str(source), "float32"))
            openings = encode_prompts(
                load_tokenizer(str(target)), read_prompts(STORY_PROMPTS), MAX_PROMPT_TOKENS
            )[: LEARNING_PROMPTS + min(count, STORY_COUNT)]
            layers = every_second_layer(read_config(source, name))
            pair = ModelPair(
                str(target),
                str(small),
                "float32",
                cores,
                dict.fromkeys(UNTRAINED_HEADS, ""),
                tuple(layers),
            )
            found.append(StudyTarget(name, source, pair, openings, (MODEL, *UNTRAINED)))
    return found


def chat_target(name: str, prompts: Path, count: int) -> StudyTarget:
    """Return a chat model with the drafters that ship for it, on questions from a file."""
    folder, cores = find_folder(name), two_cores()
    trained = {
        method: str(found)
        for method in sorted(config.TRAINED_METHODS)
        if (found := MODELS / name / method).is_dir()
    }
    heads = dict.fromkeys(UNTRAINED_HEADS, "") | (
        {"eagle-head": trained["eagle"]} if "eagle" in trained else {}
    )
    dtype = choose_dtype("auto", machine(2).flags)
    pair = ModelPair(str(folder), "", dtype, cores, heads, (), trained)
    tokenizer = load_tokenizer(name)
    questions = encode_prompts(tokenizer, read_prompts(prompts), MAX_QUESTION_TOKENS)
    chosen = sample_prompts(questions, LEARNING_PROMPTS + count, 2)
    return StudyTarget(name, folder, pair, chosen, (*trained, "ngram", *heads))


def chat_methods(which: Sequence[str]) -> list[Method]:
    """Return plain decoding, each method alone, and each beside all heads without training."""
    free = tuple(name for name in which if name in UNTRAINED_HEADS)
    others = [name for name in which if name not in free]
    groups = [*((name,) for name in which), free, *((name, *free) for name in others)]
    groups = [group for group in dict.fromkeys(groups) if group]
    return [
        Method(PLAIN, OutriderMethod("plain")),
        *(Method(" + ".join(group), guessing(*group)) for group in groups),
    ]


def costs_of(bench: StudyTarget) -> dict[str, Cost]:
    """Return the costs by method, in the order of the table."""
    target, pair = Path(bench.pair.target), bench.pair
    model = read_config(target, pair.target)
    table = TokenRecycling(model.vocab_size)
    own = (
        card_value(Path(bundled_model("target")).parent / "README.md", "trained on", column=2)
        if pair.draft == bundled_model("draft")
        else ""
    )
    searched = bench.name == SHIPPED and LAYERS_FILE.is_file()
    known = {
        "ngram": Cost(0, "none"),
        "ngram-head": Cost(0, "none"),
        "layer-skip": Cost(
            2 * count_parameters(target, pair.layers),
            "a search" if searched else "none: every second layer",
        ),
        "token-recycling": Cost(table.tokens.nbytes + table.scores.nbytes, "none"),
    }
    if pair.draft:
        known[MODEL] = Cost(2 * count_parameters(Path(pair.draft)), own or "by others")

    def card(name: str, folder: str, kind: str = "") -> str:
        """Return the cost in the card; a widened folder has none, but what it was made from."""
        return training_cost(MODELS / kind / name if bench.name == SHIPPED else Path(folder))

    for name, folder in pair.heads.items():
        if folder:
            known[name] = Cost(4 * count_parameters(Path(folder)), card(name, folder, "heads"))
    for name, folder in pair.trained.items():
        size = count_parameters(Path(folder))
        if name == "s3d":  # layers of the target, of which some are trained
            stay = read_json(Path(folder) / "config.json", folder)["settings"]["layers"]
            size = count_parameters(target, stay)
        known[name] = Cost(2 * size, card(name, folder))
    return {name: known[name] for name in bench.method_names}


def rounds_of(prompts: Sequence[Prompt], which: Sequence[Method]) -> list[loop.Round]:
    """Return rounds in which every text has NEW_TOKENS tokens, ignoring end-of-text tokens.

    A text that ends at once would carry no information.
    """
    every = cases(prompts, 1, TEMPERATURES, 1, NEW_TOKENS, 1)
    return rounds(
        [replace(case, sampling=replace(case.sampling, ignore_eos=True)) for case in every], which
    )


def run_study(bench: StudyTarget, which: Sequence[Method]) -> Study:
    found: dict[tuple[str, float], MethodStats] = {}
    learned, measuring = bench.prompts[:LEARNING_PROMPTS], bench.prompts[LEARNING_PROMPTS:]
    with running_cluster(bench.pair, which) as cluster:
        measure_rounds(cluster, rounds_of(learned, which), f"{bench.name}: learning", {})
        measure_rounds(cluster, rounds_of(measuring, which), bench.name, found)
    return Study(bench.name, bench.about, tuple(found.values()), costs_of(bench))


def write_study(studies: Sequence[Study], folder: Path, name: str = "methods") -> Path:
    """Write NAME.json, NAME.md and NAME.png; return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine(2)
    content: Mapping[str, object] = {
        "machine": facts.model_dump(),
        "studies": [asdict(one) for one in studies],
    }
    page, picture = folder / f"{name}.md", folder / f"{name}.png"
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    draw_methods(studies[0], picture)
    page.write_text(methods_page(studies, facts, picture.name), "utf-8")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3, help="prompts")
    parser.add_argument("--shipped", action="store_true", help="measure only the shipped target")
    parser.add_argument("--target", help="measure this chat model alone, with what ships for it")
    parser.add_argument("--prompts", type=Path, default=CHAT_PROMPTS, help="with --target")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    console, studies = Console(), []
    if arguments.target:
        bench = chat_target(arguments.target, arguments.prompts, arguments.count)
        one = run_study(bench, chat_methods(bench.method_names))
        print_study(console, one, runs_grid)
        console.print(write_study([one], arguments.folder, f"methods-{arguments.target}"))
        return
    with console.status("widening targets and heads"):
        chosen = study_targets(arguments.count)[: 1 if arguments.shipped else None]
    for bench in chosen:
        studies.append(run_study(bench, methods_of(bench.method_names)))
        file = write_study(
            studies, arguments.folder
        )  # after each target, so an interruption loses only one
    for one in studies:
        print_study(console, one, methods_grid)
    console.print(goals_grid(studies[0].by_temperature).terminal())
    console.print(papers_grid(studies[0]).terminal())
    console.print(file)


def print_study(console: Console, one: Study, grid: Callable[[Study, float], Grid]) -> None:
    for temperature in one.temperatures:
        console.print(grid(one, temperature).without_empty_columns().terminal())
