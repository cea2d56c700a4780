"""`outrider submit`: answers a batch file, each item exactly once."""

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
START_TIMEOUT_S = 30.0  # of a detached job
POLL_PERIOD_S = 0.2


def submit(
    file: Annotated[
        str,
        typer.Argument(help="batch file in OpenAI's format; a path or any URL of fsspec"),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="file for the answers, in any order; a path or any URL of fsspec"
        ),
    ],
    url: Annotated[
        str,
        typer.Option(
            help="OpenAI-compatible gateway, such as http://127.0.0.1:8000/v1; default: the cluster"
        ),
    ] = "",
    api_key_file: Annotated[
        Path | None, typer.Option(help="file that contains only the API key for --url")
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(help="PEM file of the certificate authority for an https --url"),
    ] = None,
    address: Address = None,
    parallel: Annotated[
        int,
        typer.Option(help="maximum of items in flight; the deployment may admit fewer"),
    ] = DEFAULT_PARALLEL,
    detach: Annotated[
        bool,
        typer.Option("--detach", help="run the job in the cluster and return; see `outrider jobs`"),
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer a batch file. After an interruption, the same command resumes the job.

    Failed items have their error as answer. The state is in OUTPUT.job next to the output, or in
    the user's data folder if the output is a URL. A file in which a line has no custom_id, or two
    have the same, is refused before anything starts. If the file or the output is changed
    meanwhile, the job ends; answers are kept, and it resumes once they are restored.
    """
    check_int("parallel", parallel, 1, MAX_PARALLEL)
    if (api_key_file or ca) and not url:
        raise InvalidRequest("--api-key-file and --ca need a gateway: give its --url", "url")
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
                f"interrupted after {job.totals.done} of {job.totals.items} items; the same "
                "command resumes the job",
            )
            raise
    if not over:
        done = f"{job.totals.done} of {job.totals.items} items"
        raise Unavailable(
            f"{job.record.id} was cancelled after {done}: the same command resumes it"
        )
    if as_json:
        sys.stdout.write(json.dumps(job_summary(job)) + "\n")
    else:
        print_note(
            job, f"{job.totals.done} items, {job.totals.failed} of them failed: {job.record.output}"
        )


def finish_job(order: SubmitOptions, address: str | None, job: Job, bar: JobProgress) -> bool:
    """Answers the remaining items; returns False if the job was cancelled.

    If no item is left, no deployment is needed.
    """
    if job.totals.done == job.totals.items:
        job.finish()
        return True
    bar.note("joining the cluster")
    with nullcontext() if order.url else join_cluster(address):
        return run_job(order, job, bar.show)


def submit_detached(order: SubmitOptions, address: str | None, as_json: bool) -> None:
    with open_job(order.file, order.out) as job:  # reports errors in the file now
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
            f"{found} is queued as Ray job {name} and has not started within "
            f"{START_TIMEOUT_S:g} s; see: ray job logs {name}\n"
        )
    else:
        sys.stdout.write(f"{found} runs as Ray job {name}; follow it with: outrider jobs {found}\n")


def job_summary(job: Job) -> dict[str, Any]:
    return {"id": job.record.id, "output": job.record.output, **asdict(job.totals)}


def print_note(job: Job, what: str) -> None:
    sys.stderr.write(f"{job.record.id}: {what}\n")
