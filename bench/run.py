"""A benchmark from its options to its page: profile, sweep, runs, batches, forecasts, a recorded run."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from actors.launch.prepare import context_length
from actors.tracing.trace_plot import draw
from actors.tracing.trace_reader import middle, read, save
from bench.core import compare, loop, profiling, results
from bench.core.forecasts import forecasts, foreseen
from bench.core.loop import Round, cases, measure, rounds
from bench.core.machine import machine, two_cores
from bench.core.methods import BOTH, FIRST, LIVING, LIVINGS, PLAIN, Cores, Method, Outcome, OutriderMethod, Runner, TransformersMethod
from bench.core.options import LEARNING, SWEPT, WARMING, Options, Suite, batch_cases, expected_seconds, main_rounds, own, suite
from bench.core.outrider_runner import OutriderRunner, Pair, running
from bench.core.places import places
from bench.core.profiling import Answered, Job, Measured
from bench.core.prompts import Prompt, encode, from_file, held_out, pick
from bench.core.results import PairFacts, Profile, Results, Settings, Tried
from bench.core.subprocess_call import call_in_subprocess
from bench.core.transformers_runner import Place, TransformersRunner
from bench.core.widen import CACHE, SMALL, widened_small
from bench.reports import report
from runtime.errors import InvalidRequest
from runtime.messages import Tokens
from runtime.models.load import load_tokenizer
from runtime.models.pair import check_pair
from runtime.sampling import Sampling
from runtime.schedulers.pearl import gamma
from runtime.tracing import Recording


class Everything:
    """A Runner for all methods: ours on the cluster, transformers' in the process of their cores."""

    def __init__(self, cluster: OutriderRunner, rivals: dict[Cores, TransformersRunner]) -> None:
        self.cluster, self.rivals = cluster, rivals

    def run(self, method: Method, prompts: Sequence[Prompt], sampling: Sampling) -> Outcome:
        runner: Runner = self.rivals[method.how.cores] if isinstance(method.how, TransformersMethod) else self.cluster
        return runner.run(method, prompts, sampling)


def benchmark(options: Options, console: Console) -> Results:
    """Does all of it, and writes NAME.json, NAME.md and pictures; what was measured until then is kept where it is interrupted."""
    cores = two_cores()
    with aside(cores), console.status("preparing the pair") as status:
        target = str(call_in_subprocess(widened_small, (options.target, options.dtype))) if options.widen else options.target
        tokenizer = load_tokenizer(target)
        contexts = (context_length(target), context_length(options.draft))
        check_pair(tokenizer, load_tokenizer(options.draft), (target, options.draft), contexts)
        most = min(contexts) - options.size.new_tokens
        if most < 1:
            raise InvalidRequest(f"new_tokens {options.size.new_tokens} leave no room in a context of {min(contexts)}", "new_tokens")
        others = SWEPT + WARMING + (0 if options.quick else LEARNING)
        wanted = max((options.size.count, *options.size.batches))
        of_file = None if options.prompts is None else encode(tokenizer, from_file(options.prompts), most)
        drawn = held_out(tokenizer, wanted + others, options.seed) if of_file is None else pick(of_file, wanted + others, options.seed)
        prompts, asides = drawn[:wanted], drawn[wanted:]
        if len(asides) < others:  # the file has not enough for both
            asides = held_out(tokenizer, others, options.seed)
        status.update("measuring the pair by itself")
        alone = Job(target, options.draft, options.dtype, cores[0])
        measured = call_in_subprocess(profiling.measure, alone)
    step = measured.profile.target[1]
    which = suite(options.quick, gamma(step, measured.profile.draft[1]))
    found = empty(options, target, measured, len(prompts[: options.size.count]))
    minutes = expected_seconds(which, options.size, step) / 60
    console.print(
        f"T = {1e3 * step:.1f} ms, t = {1e3 * measured.profile.draft[1]:.2f} ms, {options.dtype}: about {minutes:.0f} minutes more"
    )
    pair = Pair(target, options.draft, options.dtype, cores)
    with aside(cores), everything(pair, which, console) as runner:
        found, methods, recordings = measured_all(
            options, which, runner, found, prompts, asides, lambda: call_in_subprocess(profiling.measure, alone).profile
        )
    with aside(cores), console.status("acceptance and forecasts"):
        plain = tuple(run for run in found.runs if run.method == PLAIN.name)
        guessed = call_in_subprocess(profiling.acceptance, Answered(alone, options.seed, plain))
        found = found.model_copy(update={"profile": found.profile.model_copy(update={"acceptance": guessed})})
        kept = tuple(run.model_copy(update={"answers": (), "passes": None}) for run in found.runs)
        found = found.model_copy(update={"runs": kept, "forecasts": forecasts(found, methods)})
    results.write(found, options.folder / f"{options.name}.json")
    CACHE.mkdir(parents=True, exist_ok=True)
    trace, picture = CACHE / f"{options.name}-trace.json", options.folder / f"{options.name}-trace.png"
    save(trace, recordings)
    timeline = read(trace)
    draw(timeline, middle(timeline), picture)
    report.write(found, options.folder, picture)
    return found


def measured_all(
    options: Options,
    which: Suite,
    runner: Everything,
    found: Results,
    prompts: list[Prompt],
    asides: list[Prompt],
    profile: Callable[[], Profile],
) -> tuple[Results, tuple[Method, ...], Sequence[Recording]]:
    """All runs; the methods in their best settings; the recordings of the last run. What was measured until then is kept in the file.

    `profile` measures the pair by itself again: between the runs and after them, so that it speaks of the machine as they met it.
    """
    size, seed = options.size, options.seed
    file = options.folder / f"{options.name}.json"
    measured, swept = prompts[: size.count], asides[:SWEPT]
    warming, learned = asides[SWEPT : SWEPT + WARMING], asides[SWEPT + WARMING :]

    def keep(so_far: Results) -> None:
        results.write(so_far, file)

    with loop.bar() as progress:

        def do(plan: list[Round], note: str) -> Iterator[tuple[results.Run, ...]]:
            return measure(plan, runner, progress, note)

        lowest, new = min(size.temperatures), size.new_tokens
        tried = tuple(method for group in which.groups.values() for method in group)
        firsts = [group[0] for group in which.groups.values()]
        list(do(rounds(cases(warming[:1], 1, (lowest,), 1, max(2, new // 4), seed), [*which.fixed, *firsts, *which.rivals]), "warming up"))
        sweep = loop.collect(found, do(rounds(cases(swept, 1, (lowest,), 1, new, seed), tried), "sweep"), lambda so_far: None)
        best = loop.chosen(sweep, which.groups)
        methods = which.final(best)
        found = found.model_copy(update={"methods": tuple(method.facts for method in methods), "sweep": told(sweep, which, lowest)})
        list(do(rounds(cases(warming, 1, size.temperatures, 1, new, seed), own(methods)), "warming up"))
        list(do(rounds(cases(learned, 1, size.temperatures, 1, new, seed), LIVINGS), "learning"))
        found = loop.collect(found, do(main_rounds(measured, size, seed, methods), "runs"), keep)
        profiles = [found.profile, profile()]
        batched = rounds(batch_cases(prompts, size, seed), which.batched)
        short = [Round(loop.Case("", one.case.prompts, Sampling(max_tokens=max(2, new // 4))), one.methods) for one in batched]
        list(do(short, "warming up"))
        found = loop.collect(found, do(batched, "batches"), keep)
        profiles.append(profile())
        list(do(rounds(cases(warming[:1], 1, (lowest,), 1, new, seed), [LIVING]), "a recorded run"))
    alone, like = profiling.middle(profiles), {method.name for method in own(methods) if foreseen(method.how)}
    where = places(alone, [run for run in found.runs if run.method in like])
    found = found.model_copy(update={"profile": alone.model_copy(update={"places": where})})
    keep(found)
    return found, methods, runner.cluster.recordings


def empty(options: Options, target: str, measured: Measured, count: int) -> Results:
    """Results with nothing but the pair in them."""
    source = "held-out files of the standard library" if options.prompts is None else options.prompts.name
    size = options.size
    facts = PairFacts(
        target=Path(options.target).name + (f", widened to {SMALL.hidden}x{SMALL.layers}" if options.widen else ""),
        draft=Path(options.draft).name,
        target_parameters=measured.parameters[0],
        draft_parameters=measured.parameters[1],
        dtype=options.dtype,
    )
    settings = Settings(prompts=source, count=count, new_tokens=size.new_tokens, repetitions=size.repetitions, seed=options.seed)
    return Results(name=options.name, machine=machine(2), pair=facts, settings=settings, methods=(), profile=measured.profile)


def told(sweep: Results, which: Suite, temperature: float) -> tuple[Tried, ...]:
    speeds = {
        (name, method): found
        for name, group in which.groups.items()
        for method in group
        if (found := compare.speed(sweep, method.name, temperature))
    }
    return tuple(Tried(name=name, detail=setting(method), tokens_per_second=found.median) for (name, method), found in speeds.items())


def setting(method: Method) -> str:
    how = method.how
    return f"{method.facts.detail}, drafter on {len(how.drafter_cores)}" if isinstance(how, OutriderMethod) else method.facts.detail


@contextlib.contextmanager
def everything(pair: Pair, which: Suite, console: Console) -> Iterator[Everything]:
    """All that is compared, loaded and at rest. It ends with the block."""
    with contextlib.ExitStack() as stack:
        rivals: dict[Cores, TransformersRunner] = {}
        with console.status("starting target, drafters and transformers"):
            for cores in (FIRST, BOTH):
                first = next((method for method in which.rivals if method.how.cores == cores), None)
                if first is not None:
                    place = Place(Path(pair.target), Path(pair.draft), pair.dtype, tuple(pair.cores[core] for core in cores))
                    rivals[cores] = stack.enter_context(TransformersRunner(place))
                    rivals[cores].run(first, [Prompt("", FIRST_TOKENS)], Sampling(max_tokens=2))  # answers when it has loaded
            cluster = stack.enter_context(running(pair, which.all))
        yield Everything(cluster, rivals)


FIRST_TOKENS: Tokens = tuple(range(1, 9))


@contextlib.contextmanager
def aside(cores: Sequence[int]) -> Iterator[None]:
    """Keeps this process, and what of its children asks for no cores, off these where there are others."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, usable - set(cores) or usable)
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


def differing(found: Results) -> list[str]:
    """Our methods that did not write plain's text in every run: in float32 there are none."""
    names = [facts.name for facts in found.methods if facts.who == "ours"]
    keys = {(run.temperature, run.batch) for run in found.runs}
    counts = {name: [compare.agreement(found, name, "plain", *key) for key in keys] for name in names}
    return [name for name in names if any(same != of for same, of in counts[name])]
