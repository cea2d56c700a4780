"""Runs a job until it is finished or cancelled, in the command or in a Ray job."""

import asyncio
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from actors.jobs.answerer import Answerer
from actors.jobs.job import Job
from actors.jobs.worker import ShowTotals, answer_job

DEFAULT_PARALLEL = 32


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """The options of `outrider submit`.

    url       of a gateway; "" for the deployment of the Ray cluster
    key       file with the gateway's API key
    ca        PEM file of the authority behind the gateway's certificate
    parallel  maximum of items in flight
    """

    file: str
    out: str
    url: str = ""
    key: Path | None = None
    ca: Path | None = None
    parallel: int = DEFAULT_PARALLEL

    def arguments(self) -> list[str]:
        """Returns the arguments for `outrider submit` in another process on this machine."""
        gateway = ["--url", self.url] if self.url else []
        key = ["--api-key-file", str(self.key.absolute())] if self.key else []
        ca = ["--ca", str(self.ca.absolute())] if self.ca else []
        return [self.file, "-o", self.out, "--parallel", str(self.parallel), *gateway, *key, *ca]


def run_job(order: SubmitOptions, job: Job, show: ShowTotals) -> bool:
    """Answers all items; returns False if the job was cancelled. Raises as `actors.jobs.worker`.

    Without a URL, this process must have joined the cluster.
    """

    async def life() -> bool:
        async with open_answerer(order) as answerer:
            return await answer_job(job, answerer, order.parallel, show)

    return asyncio.run(life())


def open_answerer(order: SubmitOptions) -> AbstractAsyncContextManager[Answerer]:
    if order.url:
        from actors.jobs.http_answerer import load_authority, open_gateway, read_key

        return open_gateway(
            order.url,
            read_key(order.key) if order.key else None,
            load_authority(order.ca) if order.ca else None,
        )
    from actors.jobs.cluster_answerer import open_deployment  # transformers, grpc

    return open_deployment()
