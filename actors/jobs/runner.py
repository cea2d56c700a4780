"""One life of a job, wherever it is lived: by the command, or by an actor in the cluster."""

import asyncio
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from actors.jobs.answerer import Answerer
from actors.jobs.job import Job
from actors.jobs.worker import Show, work

MOST = 32  # items in flight, unless said otherwise


@dataclass(frozen=True, slots=True)
class Order:
    """`url`: of a gateway, with the files of its `key` and its authority `ca`; "": what the Ray cluster serves. `most`: items in flight."""

    file: str
    out: str
    url: str = ""
    key: Path | None = None
    ca: Path | None = None
    most: int = MOST

    def arguments(self) -> list[str]:
        """Of `outrider submit`, for another process on this machine."""
        gateway = ["--url", self.url] if self.url else []
        key = ["--api-key-file", str(self.key.absolute())] if self.key else []
        ca = ["--ca", str(self.ca.absolute())] if self.ca else []
        return [self.file, "-o", self.out, "--parallel", str(self.most), *gateway, *key, *ca]


def live(order: Order, job: Job, show: Show) -> bool:
    """Until all is answered, and True then; False where the job was cancelled. Raises as actors.jobs.worker.

    Where there is no URL, this process has joined the cluster before.
    """

    async def life() -> bool:
        async with answering(order) as answerer:
            return await work(job, answerer, order.most, show)

    return asyncio.run(life())


def answering(order: Order) -> AbstractAsyncContextManager[Answerer]:
    if order.url:
        from actors.jobs.http_answerer import gateway, read_authority, read_key

        return gateway(
            order.url,
            read_key(order.key) if order.key else None,
            read_authority(order.ca) if order.ca else None,
        )
    from actors.jobs.cluster_answerer import deployment  # transformers, grpc

    return deployment()
