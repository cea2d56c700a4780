"""Jobs that go on in the cluster when the command is over: as Ray jobs that run the same command there."""

import logging
import shlex
import sys

import ray
from ray.job_submission import JobSubmissionClient

from actors.jobs.runner import SubmitOptions
from runtime.core.errors import Unavailable

ENTRYPOINT = "from actors.cli import main; main()"
WORKAROUND = "leave --detach out, or run `ray job submit -- outrider submit ...` against its head"


def detach(order: SubmitOptions) -> str:
    """Hands the order to the cluster that this process has joined; returns the name of the Ray job. Raises Unavailable.

    Its files must be where they are here on the machine that runs it, the cluster's head.
    """
    dashboard = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).dashboard_url
    if not dashboard:
        raise Unavailable(f"this cluster has no dashboard, which takes Ray jobs: {WORKAROUND}")
    try:
        client = JobSubmissionClient(f"http://{dashboard.removeprefix('http://')}")
        name: str = client.submit_job(
            entrypoint=shlex.join([sys.executable, "-c", ENTRYPOINT, "submit", *order.arguments()])
        )
    except (ConnectionError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise Unavailable(
            f"the dashboard at {dashboard} does not take the job ({first}): {WORKAROUND}"
        ) from error
    return name
