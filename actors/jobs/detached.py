"""Submits jobs to the cluster as Ray jobs, which continue after the command has ended.

A Ray job runs the same `outrider submit` command on the head of the cluster.
"""

import logging
import shlex
import sys

import ray
from ray.job_submission import JobSubmissionClient

from actors.jobs.runner import SubmitOptions
from runtime.core.errors import Unavailable

ENTRYPOINT = "from actors.cli import main; main()"
WORKAROUND = "omit --detach, or run `ray job submit -- outrider submit ...` on the head"


def detach(order: SubmitOptions) -> str:
    """Submits the job to the cluster that this process has joined; returns the ID of the Ray job.

    The head of the cluster must have the files under the same paths. Raises Unavailable if the
    dashboard does not accept the job.
    """
    dashboard = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).dashboard_url
    if not dashboard:
        raise Unavailable(f"the cluster has no dashboard to submit Ray jobs to: {WORKAROUND}")
    try:
        client = JobSubmissionClient(f"http://{dashboard.removeprefix('http://')}")
        name: str = client.submit_job(
            entrypoint=shlex.join([sys.executable, "-c", ENTRYPOINT, "submit", *order.arguments()])
        )
    except (ConnectionError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise Unavailable(
            f"the dashboard at {dashboard} rejects the job ({first}): {WORKAROUND}"
        ) from error
    return name
