"""The traffic of a soak: clients and batch jobs that compare every answer with plain decoding."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actors.jobs.job import open_job
from actors.jobs.runner import SubmitOptions, run_job
from bench.load.http_client import HOST
from bench.soak.requests import (
    SoakCase,
    SoakRequest,
    ask,
    join_events,
    leave_early,
    plain,
)
from runtime.core.errors import OutriderError, Unavailable

LEAVE_SHARE = 0.15  # of the requests: the client leaves before the end
MAX_LEAVE_S = 0.5
BATCH_PARALLEL = 4
BATCH_PAUSE_S = 2.0
MAX_WRONG = 50  # lines kept


@dataclass(slots=True)
class Tally:
    """What all clients have seen.

    answers  right ones by kind, and "left" for clients that left early
    wrong    answers that failed or differed, how many
    lines    one line for each of the first MAX_WRONG of them
    """

    answers: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    lines: list[str] = field(default_factory=list)

    def add_wrong(self, what: str) -> None:
        self.wrong += 1
        if len(self.lines) < MAX_WRONG:
            self.lines.append(what)


async def answer_plainly(port: int, requests: Sequence[SoakRequest]) -> list[SoakCase]:
    """Return the requests with their answers by plain decoding. Raises Unavailable for an error."""
    found = []
    for request in requests:
        answer = await ask(port, request.url, plain(request))
        if not answer.said:
            raise Unavailable(
                f"no plain answer to a request of kind {request.kind} ({answer.status}: "
                f"{answer.error}): give another --target"
            )
        found.append(SoakCase(request, answer.said))
    return found


async def run_client(
    port: int, cases: Sequence[SoakCase], draw: random.Random, over: asyncio.Event, tally: Tally
) -> None:
    """Send one request after the other until `over` is set; the last one gets its full answer."""
    while not over.is_set():
        case = draw.choice(cases)
        request, stream = case.request, draw.random() < 0.5
        body = request.body | {"stream": stream}
        if draw.random() < LEAVE_SHARE:
            await leave_early(port, request.url, body, MAX_LEAVE_S * draw.random())
            tally.answers["left"] += 1
            continue
        answer = await ask(port, request.url, body)
        if answer.said == case.expected:
            tally.answers[request.kind] += 1
        else:
            found = answer.said or f"{answer.status} {answer.error}"
            tally.add_wrong(f"{request.kind}, stream {stream}: {found}, not {case.expected}")
            await asyncio.sleep(0.1)  # a gateway that refuses everything is not to be flooded


async def run_batches(
    port: int, cases: Sequence[SoakCase], folder: Path, over: asyncio.Event, tally: Tally
) -> None:
    """Answer one batch file with all cases after the other until `over` is set."""
    while not over.is_set():
        file, out = folder / "batch.jsonl", folder / "answers.jsonl"
        write_batch(file, cases)
        try:
            await asyncio.to_thread(run_batch, port, file, out)
        except OutriderError as error:
            tally.add_wrong(f"batch: {type(error).__name__}: {error}")
            await asyncio.sleep(BATCH_PAUSE_S)
            continue
        compare_batch(out, cases, tally)
        out.unlink()
        for left in (folder / f"{out.name}.job").iterdir():
            left.unlink()
        await asyncio.sleep(BATCH_PAUSE_S)


def run_batch(port: int, file: Path, out: Path) -> None:
    """Answer the file as `outrider submit` does. Raises OutriderError."""
    order = SubmitOptions(str(file), str(out), f"http://{HOST}:{port}/v1", parallel=BATCH_PARALLEL)
    with open_job(order.file, order.out) as job:
        run_job(order, job, lambda totals: None)


def write_batch(file: Path, cases: Sequence[SoakCase]) -> None:
    with file.open("w") as lines:
        for number, case in enumerate(cases):
            item = {
                "custom_id": f"item-{number}",
                "method": "POST",
                "url": case.request.url,
                "body": case.request.body,
            }
            lines.write(json.dumps(item) + "\n")


def compare_batch(out: Path, cases: Sequence[SoakCase], tally: Tally) -> None:
    """Count each item's answer: right if it is there once, as plain decoding says."""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    times = Counter(line["custom_id"] for line in lines)
    found = {line["custom_id"]: line["response"]["body"] for line in lines}
    for number, case in enumerate(cases):
        name = f"item-{number}"
        body = found.get(name, {})
        if times[name] == 1 and join_events([body]) == case.expected:
            tally.answers["batch"] += 1
        else:
            tally.add_wrong(f"batch, {times[name]} answers to {case.request.kind}: {body}")
