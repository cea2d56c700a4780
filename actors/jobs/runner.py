"""One life of a job, wherever it is lived: by the command, or by an actor in the cluster."""

import asyncio
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from actors.jobs.answerer import Answerer
from actors.jobs.job import Job
from actors.jobs.worker import ShowTotals, answer_job

DEFAULT_PARALLEL = 32  # items in flight, unless said otherwise


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """`url`: of a gateway, with the files of its `key` and its authority `ca`; "": what the Ray cluster serves. `parallel`: items in flight."""

    file: str
    out: str
    url: str = ""
    key: Path | None = None
    ca: Path | None = None
    parallel: int = DEFAULT_PARALLEL

    def arguments(self) -> list[str]:
        """Of `outrider submit`, for another process on this machine."""
        gateway = ["--url", self.url] if self.url else []
        key = ["--api-key-file", str(self.key.absolute())] if self.key else []
        ca = ["--ca", str(self.ca.absolute())] if self.ca else []
        return [self.file, "-o", self.out, "--parallel", str(self.parallel), *gateway, *key, *ca]


def run_job(order: SubmitOptions, job: Job, show: ShowTotals) -> bool:
    """Until all is answered, and True then; False where the job was cancelled. Raises as actors.jobs.worker.

    Where there is no URL, this process has joined the cluster before.
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
