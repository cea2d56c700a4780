"""A benchmark from its options to its page: prepare the pair, run the stages, write the page."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from actors.launch.prepare import context_length
from actors.tracing.trace_plot import draw_trace
from actors.tracing.trace_reader import middle_window, read_trace, save_trace
from bench.core import compare, loop, profiling, results
from bench.core.llama_cpp_runner import (
    LlamaCppRunner,
    LlamaCppSpec,
    bfloat16_file,
    build_environment,
)
from bench.core.machine import machine, two_cores
from bench.core.methods import (
    Cores,
    Method,
    Outcome,
    OutriderMethod,
    Runner,
    TransformersMethod,
)
from bench.core.options import (
    LEARNING_PROMPTS,
    SWEEP_PROMPTS,
    WARM_UP_PROMPTS,
    BenchOptions,
    choose_suite,
    expected_seconds,
)
from bench.core.outrider_runner import ModelPair, OutriderRunner, running_cluster
from bench.core.profiling import ProfileJob, ProfileResult
from bench.core.prompts import (
    CHAT_PROMPTS,
    Prompt,
    encode_prompts,
    held_out_prompts,
    read_prompts,
    sample_prompts,
)
from bench.core.results import PairFacts, Results, RunSettings
from bench.core.subprocess_call import call_in_subprocess
from bench.core.transformers_runner import TransformersRunner, WorkerSpec
from bench.core.widen import CACHE, SMALL_SHAPE, widen_to_small
from bench.reports import report
from bench.stages import FINISHING, MEASURING, BenchPlan, BenchState, BenchTools
from runtime.core.errors import InvalidRequest
from runtime.core.messages import Tokens
from runtime.core.sampling_params import SamplingParams
from runtime.models.catalogue import CATALOGUE
from runtime.models.gguf_model import is_gguf
from runtime.models.loader import load_tokenizer
from runtime.models.model_folder import find_folder
from runtime.models.vocab_check import check_pair
from runtime.schedulers.pearl import gamma
from runtime.telemetry.tracing import Recording

HELD_OUT = "held-out files of the standard library"


class CombinedRunner:
    """A Runner for all methods: ours on the cluster, those of others in processes of their own, by
    kind of method and cores."""

    def __init__(
        self, cluster: OutriderRunner, rivals: Mapping[tuple[type, Cores], Runner]
    ) -> None:
        self.cluster, self.rivals = cluster, rivals

    def run(self, method: Method, prompts: Sequence[Prompt], sampling: SamplingParams) -> Outcome:
        runner = (
            self.cluster
            if isinstance(method.how, OutriderMethod)
            else self.rivals[type(method.how), method.how.cores]
        )
        return runner.run(method, prompts, sampling)


def benchmark(options: BenchOptions, console: Console) -> Results:
    """Run the benchmark and write NAME.json, NAME.md and the pictures.

    An interruption keeps everything measured so far.
    """
    cores = two_cores()
    file = options.folder / f"{options.name}.json"
    with keep_off(cores), console.status("preparing the pair") as status:
        plan, state = prepare(options, cores, status.update)
    step, draft_step = state.results.profile.target[1], state.results.profile.draft.get(1)
    minutes = expected_seconds(plan.suite, options.size, step) / 60
    console.print(
        f"T = {1e3 * step:.1f} ms, "
        + (f"t = {1e3 * draft_step:.2f} ms, " if draft_step else "")
        + f"{options.dtype}: about {minutes:.0f} minutes more"
    )
    pair = ModelPair(plan.pair.target, options.draft, options.dtype, cores, method=options.method)
    with (
        keep_off(cores),
        start_runners(pair, options, plan, console) as runner,
        loop.progress_bar() as progress,
    ):
        lab = BenchTools(
            runner,
            progress,
            lambda so_far: results.write_results(so_far, file),
            lambda: call_in_subprocess(profiling.profile_pair, plan.pair).profile,
        )
        for stage in MEASURING:
            state = stage(plan, state, lab)
        recordings = runner.cluster.recordings
    with keep_off(cores), console.status("acceptance and forecasts"):
        for finish in FINISHING:
            state = finish(plan, state)
    results.write_results(state.results, file)
    report.write_report(state.results, options.folder, draw_recording(options, recordings))
    return state.results


def prepare(
    options: BenchOptions, cores: tuple[int, ...], note: Callable[[str], None]
) -> tuple[BenchPlan, BenchState]:
    """Return the plan, and a state whose results contain only the pair.

    Raises an error if the pair or the options are invalid.
    """
    target = (
        str(call_in_subprocess(widen_to_small, (options.target, options.dtype)))
        if options.widen
        else options.target
    )
    source, prompts, other_prompts = choose_prompts(options, target)
    note("measuring the pair by itself")
    has_model = options.method == "model"
    pair = ProfileJob(target, options.draft if has_model else None, options.dtype, cores[0])
    measured = call_in_subprocess(profiling.profile_pair, pair)
    times = measured.profile
    which = choose_suite(
        options.quick,
        gamma(times.target[1], times.draft[1]) if has_model else None,
        has_model,
        options.gguf is not None,
    )
    plan = BenchPlan(options, which, pair, prompts, other_prompts)
    results = empty_results(options, measured, source, len(plan.measured_prompts))
    return plan, BenchState(results)


def gguf_of(target: str) -> Path:
    """Return the GGUF file that a target's name means. Raises InvalidRequest if it means none."""
    model = CATALOGUE.get(target)
    file = Path(target) if model is None else model.file()
    if not is_gguf(file):
        raise InvalidRequest(
            f"target {target[:256]!r} is no GGUF file, which llama.cpp needs: give a .gguf file, "
            f"or pull and give {', '.join(CATALOGUE)}",
            "llama_cpp",
        )
    return file


def choose_prompts(options: BenchOptions, target: str) -> tuple[str, list[Prompt], list[Prompt]]:
    """Return where the prompts come from, the measured ones, and those for sweep, warm-up and
    learning.

    Raises PairMismatch if the models do not fit together, InvalidRequest if their context has no
    room for prompts.
    """
    tokenizer = load_tokenizer(target)
    context = context_length(target)
    if options.method == "model":
        contexts = context, context_length(options.draft)
        check_pair(tokenizer, load_tokenizer(options.draft), (target, options.draft), contexts)
        context = min(contexts)
    most = context - options.size.new_tokens
    if most < 1:
        raise InvalidRequest(
            f"new_tokens {options.size.new_tokens} leaves no room in a context of {context}: "
            "ask for fewer",
            "new_tokens",
        )
    others = SWEEP_PROMPTS + WARM_UP_PROMPTS + (0 if options.quick else LEARNING_PROMPTS)
    wanted = max((options.size.count, *options.size.batches))
    file = options.prompts or (CHAT_PROMPTS if tokenizer.chat_template else None)
    of_file = None if file is None else encode_prompts(tokenizer, read_prompts(file), most)
    drawn = (
        held_out_prompts(tokenizer, wanted + others, options.seed)
        if of_file is None
        else sample_prompts(of_file, wanted + others, options.seed)
    )
    prompts, other_prompts = drawn[:wanted], drawn[wanted:]
    if len(other_prompts) < others:  # the file has too few prompts for both
        other_prompts = held_out_prompts(tokenizer, others, options.seed)
    source = HELD_OUT if file is None else file.name
    return source, prompts, other_prompts


def draw_recording(options: BenchOptions, recordings: Sequence[Recording]) -> Path:
    """Draw the recorded run; its trace stays in the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    trace, picture = (
        CACHE / f"{options.name}-trace.json",
        options.folder / f"{options.name}-trace.png",
    )
    save_trace(trace, recordings)
    timeline = read_trace(trace)
    draw_trace(timeline, middle_window(timeline), picture)
    return picture


def empty_results(
    options: BenchOptions, measured: ProfileResult, source: str, count: int
) -> Results:
    """Return results that contain only the pair."""
    size = options.size
    facts = PairFacts(
        target=Path(options.target).name
        + (f", widened to {SMALL_SHAPE.hidden}x{SMALL_SHAPE.layers}" if options.widen else ""),
        draft=Path(options.draft).name or options.method,
        target_parameters=measured.parameters[0],
        draft_parameters=measured.parameters[1],
        dtype=options.dtype,
        method=options.method,
    )
    settings = RunSettings(
        prompts=source,
        count=count,
        new_tokens=size.new_tokens,
        repetitions=size.repetitions,
        seed=options.seed,
    )
    return Results(
        name=options.name,
        machine=machine(2),
        pair=facts,
        settings=settings,
        methods=(),
        profile=measured.profile,
    )


@contextlib.contextmanager
def start_runners(
    pair: ModelPair, options: BenchOptions, plan: BenchPlan, console: Console
) -> Iterator[CombinedRunner]:
    """Load everything that is compared; stop it at the end of the block."""
    if options.gguf is not None:
        console.print("llama.cpp: preparing its environment and the weights in bfloat16")
    slots = options.size.new_tokens + max(len(prompt.tokens) for prompt in plan.all_prompts)
    with contextlib.ExitStack() as stack:
        rivals: dict[tuple[type, Cores], Runner] = {}
        with console.status("starting target, drafters and the others"):
            for method in plan.suite.rivals:
                key = type(method.how), method.how.cores
                if key not in rivals:
                    place = tuple(pair.cores[core] for core in method.how.cores)
                    rivals[key] = (
                        stack.enter_context(transformers_runner(pair, place))
                        if isinstance(method.how, TransformersMethod)
                        else stack.enter_context(llama_cpp_runner(options.gguf, place, slots))
                    )
                    rivals[key].run(
                        method, [Prompt("", LOADING_PROMPT)], SamplingParams(max_tokens=2)
                    )  # returns once the models are loaded
            cluster = stack.enter_context(running_cluster(pair, plan.suite.all))
        yield CombinedRunner(cluster, rivals)


def transformers_runner(pair: ModelPair, cores: Cores) -> TransformersRunner:
    draft = Path(pair.draft) if pair.method == "model" else None
    return TransformersRunner(WorkerSpec(find_folder(pair.target), draft, pair.dtype, cores))


def llama_cpp_runner(gguf: Path | None, cores: Cores, slots: int) -> LlamaCppRunner:
    assert gguf is not None
    python = build_environment()
    return LlamaCppRunner(LlamaCppSpec(python, bfloat16_file(gguf, python, cores), cores, slots))


LOADING_PROMPT: Tokens = tuple(range(1, 9))


@contextlib.contextmanager
def keep_off(cores: Sequence[int]) -> Iterator[None]:
    """Keep this process and its unpinned children off these cores, if there are others."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, usable - set(cores) or usable)
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


def differing_methods(found: Results) -> list[str]:
    """Return our methods whose text differs from plain decoding in some run; in float32 there are
    none."""
    names = [facts.name for facts in found.methods if facts.who == "ours"]
    keys = {(run.temperature, run.batch) for run in found.runs}
    counts = {
        name: [compare.agreement(found, name, "plain", *key) for key in keys] for name in names
    }
    return [name for name in names if any(same != of for same, of in counts[name])]
