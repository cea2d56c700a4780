"""`outrider plan`: forecasts the speed of schedules by simulation."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from actors.cli.commands.options import Dtype, ModelDtype
from actors.cli.views.plan_view import Plan, plan_json, plan_tables, plot_plan, recommendations
from runtime import config
from runtime.core.errors import InvalidRequest
from runtime.core.sampling_params import SamplingParams, check_int, check_range
from runtime.deployment_builder import build_deployment, resolve_head
from runtime.model_paths import bundled_model
from runtime.sim import sweep
from runtime.sim.forecast import Forecast, Setting
from runtime.sim.pair_profile import PairProfile, read_profile
from runtime.sim.replayed_head import HeadProfile
from runtime.sim.sweep import Job

MAX_SESSIONS, MAX_TARGETS = 10_000, 64
MAX_RTT_MS = 10_000.0
DEFAULT_RTT_MS = 1.0
SCHEDULES_GROUP = "schedules"


def plan(
    target: Annotated[
        str | None, typer.Option(help="model name, folder or .gguf file; default: the bundled one")
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="model, method or head as for generate (repeatable); default: the bundled model"
        ),
    ] = None,
    dtype: ModelDtype = Dtype.auto,
    temperature: float = 0.0,
    measured: Annotated[
        list[Path] | None,
        typer.Option(help="file written by --save, in place of models (repeatable)"),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="write the measurements of one pair to this file")
    ] = None,
    rtt: Annotated[
        float | None,
        typer.Option(help="round trip to the drafters in milliseconds; default: 1, or as measured"),
    ] = None,
    sessions: Annotated[int, typer.Option(help="concurrent sessions")] = 1,
    drafters: int = 1,
    targets: Annotated[
        int, typer.Option(help="targets that share the sessions; drafters serve all")
    ] = 1,
    schedule: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(sweep.SCHEDULES)} (repeatable); default: all"),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="draw the forecast as a PNG")] = None,
    as_object: Annotated[
        bool, typer.Option("--json", help="print a JSON object in place of tables")
    ] = False,
) -> None:
    """Forecast tokens per second for each schedule.

    The runtime itself runs on a virtual clock, with measured step times and guesses.
    """
    names = tuple(dict.fromkeys(schedule or sweep.SCHEDULES))
    setting = check_setting(names, sessions, drafters, targets, rtt, temperature)
    if measured and (target or draft):
        raise InvalidRequest(
            "--measured replaces models: give either --measured, or --target and --draft",
            "measured",
        )
    errors = Console(stderr=True, highlight=False)
    heads: list[HeadProfile] = []
    if measured:
        pairs = [read_profile(file) for file in measured]
        pairs = (
            pairs if rtt is None else [pair.model_copy(update={"rtt": rtt / 1e3}) for pair in pairs]
        )
    else:
        pairs, heads = measure_pairs(
            target, draft, dtype, temperature, DEFAULT_RTT_MS if rtt is None else rtt, errors
        )
    if save is not None:
        write_profile(save, pairs)
    with parallel_simulator(errors) as run_all:
        found = forecast_plan(pairs, heads, names, setting, run_all)
    if png is not None:
        plot_plan(found, png)
    console = Console(highlight=False)
    if as_object:
        typer.echo(json.dumps(plan_json(found)))
        return
    for table in plan_tables(found):
        console.print(table)
        console.print()
    for sentence in recommendations(found):
        console.print(sentence)


def check_setting(
    names: Sequence[str],
    sessions: int,
    drafters: int,
    targets: int,
    rtt: float | None,
    temperature: float,
) -> Setting:
    """Returns the setting. Raises InvalidRequest for values out of range."""
    wrong = [name for name in names if name not in sweep.SCHEDULES]
    if wrong:
        raise InvalidRequest(
            f"unknown schedule {wrong[0]!r}: give one of {', '.join(sweep.SCHEDULES)}",
            "schedule",
        )
    check_int("sessions", sessions, 1, MAX_SESSIONS)
    check_int("drafters", drafters, 1, config.MAX_DRAFTERS)
    check_int("targets", targets, 1, MAX_TARGETS)
    if rtt is not None:
        check_range("rtt", rtt, 0.0, MAX_RTT_MS)
    SamplingParams(temperature=temperature)
    return Setting(drafters=drafters, sessions=sessions, targets=targets)


def measure_pairs(
    target: str | None,
    drafts: list[str] | None,
    dtype: Dtype,
    temperature: float,
    rtt: float,
    errors: Console,
) -> tuple[list[PairProfile], list[HeadProfile]]:
    """Measures the drafters, of which there is at least one, and the heads.

    Heads without a drafter are combined with the bundled draft model, or with n-grams on another
    target.
    """
    name, chosen = target or bundled_model("target"), tuple(dict.fromkeys(drafts or ()))
    if all(resolve_head(draft) for draft in chosen):
        chosen = (*chosen, bundled_model("draft") if target is None else "ngram")
    wanted = build_deployment(name, chosen, 1, dtype.value, "auto", local=False)
    with errors.status("loading torch") as status:
        # torch and transformers are slow to import
        from actors.cli.commands.measure import measure_models

        drafters = [pool.member(0) for pool in wanted.pools]
        pairs, heads, warnings = measure_models(
            name, drafters, wanted.target.heads, dtype.value, temperature, rtt / 1e3, status.update
        )
    for warning in warnings:
        errors.print(f"note: {warning}", style="yellow")
    return pairs, heads


def write_profile(file: Path, pairs: Sequence[PairProfile]) -> None:
    if len(pairs) != 1:
        raise InvalidRequest(f"--save holds one pair, not {len(pairs)}: give one --draft", "save")
    try:
        file.write_text(pairs[0].model_dump_json(indent=1, by_alias=True) + "\n", "utf-8")
    except OSError as error:
        raise InvalidRequest(
            f"cannot write {file} ({error.strerror}): give a file in a folder that exists", "save"
        ) from error


@contextmanager
def parallel_simulator(errors: Console) -> Iterator[sweep.RunAll]:
    """Runs simulations on all cores of this process, with a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn"))
    with pool, Progress(*columns, console=errors, transient=True) as progress:

        def run_all(jobs: Sequence[Job]) -> list[Forecast]:
            distinct = {job.dedup_key: job for job in jobs}
            bar = progress.add_task("simulating", total=len(distinct))
            longest_first = sorted(distinct, key=lambda same: -distinct[same].effort)
            coming = {same: pool.submit(distinct[same].run) for same in longest_first}
            for _ in as_completed(coming.values()):
                progress.advance(bar)
            progress.remove_task(bar)
            return [coming[job.dedup_key].result() for job in jobs]

        yield run_all


def forecast_plan(
    pairs: Sequence[PairProfile],
    heads: Sequence[HeadProfile],
    names: Sequence[str],
    setting: Setting,
    run_all: sweep.RunAll,
) -> Plan:
    """Forecasts all schedules for every drafter, and the rest for the fastest one."""
    configs = [sweep.best_settings(pair, names, setting, run_all) for pair in pairs]
    jobs = [
        job
        for pair, chosen in zip(pairs, configs, strict=True)
        for job in sweep.jobs(pair, chosen, setting)
        if job.group == SCHEDULES_GROUP
    ]
    compared = list(zip(jobs, run_all(jobs), strict=True))
    fastest = max(compared, key=lambda done: done[1].tokens_per_second)[0].profile
    jobs = [
        job
        for job in sweep.jobs(fastest, configs[pairs.index(fastest)], setting)
        if job.group != SCHEDULES_GROUP
    ]
    if "living" in names:
        shallow = sweep.with_half_draft_time(fastest)
        jobs.append(
            Job("half as deep", "living", 0, shallow, config.ScheduleConfig(), replace(setting))
        )
        jobs += sweep.head_jobs(fastest, heads, setting)
    return Plan(tuple(pairs), fastest, setting, (*compared, *zip(jobs, run_all(jobs), strict=True)))
