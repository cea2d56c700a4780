"""`outrider jobs`: lists, follows and cancels batch jobs."""

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from actors.cli.views.job_view import JobProgress
from actors.jobs.registry import JobStatus, cancel_job, find_job, list_jobs, read_status
from runtime.core.errors import InvalidRequest

POLL_PERIOD_S = 1.0


def jobs(
    job: Annotated[
        str | None, typer.Argument(help="job to follow until it ends or stops; default: list all")
    ] = None,
    cancelled: Annotated[
        bool,
        typer.Option("--cancel", help="cancel the job; submitting it again resumes it"),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print the current state as one JSON object per line")
    ] = False,
) -> None:
    """List the batch jobs of this user on this machine, including detached ones."""
    if cancelled and job is None:
        raise InvalidRequest("--cancel without a job: give its ID", "job")
    found = list_jobs() if job is None else [cancel_job(job) if cancelled else find_job(job)]
    if as_json:
        sys.stdout.writelines(json.dumps(job_json(one)) + "\n" for one in found)
    elif job is None:
        Console(highlight=False).print(jobs_table(found))
    elif not cancelled:
        follow_job(found[0])


def follow_job(one: JobStatus) -> None:
    with JobProgress(quiet=False) as bar:
        bar.show(one.totals)
        while one.state == "running":
            time.sleep(POLL_PERIOD_S)
            one = read_status(one.file) or one
            bar.show(one.totals)
    totals = one.totals
    done = f"{totals.done} of {totals.items} items, {totals.failed} of them failed"
    sys.stdout.write(f"{one.record.id} {one.state}: {done}: {one.record.output}\n")


def job_json(one: JobStatus) -> dict[str, Any]:
    return {**asdict(one.record), "state": one.state, **asdict(one.totals)}


def jobs_table(found: list[JobStatus]) -> Table:
    rows = Table("job", "state", "answered", "failed", "tokens", "output")
    for one in found:
        answered = f"{one.totals.done}/{one.totals.items}"
        rows.add_row(
            one.record.id,
            one.state,
            answered,
            str(one.totals.failed),
            str(one.totals.tokens),
            one.record.output,
        )
    return rows
