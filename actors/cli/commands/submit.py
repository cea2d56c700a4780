"""`outrider submit`: a file of requests in, a file of answers out, each exactly once, however often it is interrupted."""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from actors.cli.commands.options import Address, Json
from actors.cli.views.job_view import JobProgress
from actors.jobs.job import Job, absolute_url, open_job
from actors.jobs.registry import find_job
from actors.jobs.runner import DEFAULT_PARALLEL, SubmitOptions, run_job
from actors.launch.cluster import join_cluster
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.core.sampling_params import check_int

MAX_PARALLEL = 1024
START_TIMEOUT_S, POLL_PERIOD_S = (
    30.0,
    0.2,
)  # seconds for a detached job to begin, and between two looks


def submit(
    file: Annotated[
        str,
        typer.Argument(
            help="requests, one in each line, in OpenAI's batch format; a path or any URL of fsspec"
        ),
    ],
    out: Annotated[
        str,
        typer.Option("--output", "-o", help="answers, in any order; a path or any URL of fsspec"),
    ],
    url: Annotated[
        str,
        typer.Option(
            help="any OpenAI-compatible gateway, e.g. http://127.0.0.1:8000/v1; default: the cluster"
        ),
    ] = "",
    api_key_file: Annotated[
        Path | None, typer.Option(help="file with the key for --url alone in it")
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(help="PEM file of the authority behind the certificate of an https --url"),
    ] = None,
    address: Address = None,
    parallel: Annotated[
        int,
        typer.Option(
            help="at most so many items in flight; fewer where the deployment admits fewer"
        ),
    ] = DEFAULT_PARALLEL,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", help="hand the job to the cluster and return; see `outrider jobs`"
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer a batch file. Interrupted and started again by the same command, it goes on where it was.

    Items that fail have their error as their answer. State is in OUTPUT.job beside the output, or in the user's data folder where the
    output is a URL. A file with a line that has no custom_id to answer to, or one that stands twice, is refused before anything starts.
    A file or an output that somebody changes meanwhile ends the job; what was answered is kept, and it goes on when they are back.
    """
    check_int("parallel", parallel, 1, MAX_PARALLEL)
    if (api_key_file or ca) and not url:
        raise InvalidRequest("--api-key-file and --ca are for a gateway: give its --url", "url")
    order = SubmitOptions(absolute_url(file), absolute_url(out), url, api_key_file, ca, parallel)
    if detach:
        submit_detached(order, address, as_json)
        return
    with JobProgress(quiet=as_json) as bar, open_job(order.file, order.out) as job:
        try:
            over = finish_job(order, address, job, bar)
        except KeyboardInterrupt:
            print_note(
                job,
                f"interrupted after {job.totals.done} of {job.totals.items} items; the same command goes on from there",
            )
            raise
    if not over:
        done = f"{job.totals.done} of {job.totals.items} items"
        raise Unavailable(
            f"{job.record.id} was cancelled after {done}: the same command goes on from there"
        )
    if as_json:
        sys.stdout.write(json.dumps(job_summary(job)) + "\n")
    else:
        print_note(
            job, f"{job.totals.done} items, {job.totals.failed} of them failed: {job.record.output}"
        )


def finish_job(order: SubmitOptions, address: str | None, job: Job, bar: JobProgress) -> bool:
    """False where the job was cancelled meanwhile. Where nothing is left to ask, nobody need serve."""
    if job.totals.done == job.totals.items:
        job.finish()
        return True
    bar.note("asking who serves")
    with nullcontext() if order.url else join_cluster(address):
        return run_job(order, job, bar.show)


def submit_detached(order: SubmitOptions, address: str | None, as_json: bool) -> None:
    with open_job(order.file, order.out) as job:  # what is wrong with the file is said here and now
        found = job.record.id
    with join_cluster(address):
        from actors.jobs.detached import detach  # Ray

        name = detach(order)
        until = time.monotonic() + START_TIMEOUT_S
        while find_job(found).state == "stopped" and time.monotonic() < until:
            time.sleep(POLL_PERIOD_S)
    if as_json:
        sys.stdout.write(json.dumps({"id": found, "ray_job": name}) + "\n")
    elif find_job(found).state == "stopped":
        sys.stdout.write(
            f"{found} waits as Ray job {name} and has not begun here within {START_TIMEOUT_S:g} s; see: ray job logs {name}\n"
        )
    else:
        sys.stdout.write(f"{found} runs as Ray job {name}; follow it with: outrider jobs {found}\n")


def job_summary(job: Job) -> dict[str, Any]:
    return {"id": job.record.id, "output": job.record.output, **asdict(job.totals)}


def print_note(job: Job, what: str) -> None:
    sys.stderr.write(f"{job.record.id}: {what}\n")
