"""A simulated process that answers a batch file, on a disk that is slow, full and torn."""

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from actors.fleet.fleet_state import TargetState
from actors.jobs import job as jobs
from actors.jobs.index import JobIndex, OutputMark
from actors.jobs.items import Answer, Item, item_seed
from actors.jobs.job import open_job
from actors.jobs.outputs import Destination, FileOutput
from actors.jobs.worker import Clock, answer_job
from actors.openai.errors import TARGETS_LOST, to_api_error
from actors.routing.router import Router
from actors.rpc.client import GrpcTarget
from runtime.core.errors import InvalidRequest, TargetsLost, Unavailable
from runtime.core.messages import Request
from runtime.core.sampling_params import SamplingParams
from tests.simulation.machines import Machine
from tests.simulation.network import Network
from tests.simulation.toys import VOCABULARY, PlainOutput
from tests.simulation.virtual_time import ProcessLoop, World, sleep

RESTART_S = 0.7  # until somebody runs the command again


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """A batch file: its number of items, how many are asked at once, the longest wait of the disk
    in seconds, and the probability that it fails.
    """

    items: int
    at_once: int
    slow_s: float
    errors: float


class BatchMachine(Machine):
    """Answers one file. A life ends when it is killed or its disk fails; the next one goes on.

    `plain` gets the output of each request that it makes, by the name of the session.
    """

    def __init__(
        self,
        world: World,
        network: Network,
        spec: BatchSpec,
        folder: Path,
        plain: dict[str, PlainOutput],
        target_faults: int,
    ) -> None:
        self.spec, self.plain, self.target_faults = spec, plain, target_faults
        self.file, self.out = folder / "in.jsonl", folder / "out.jsonl"
        random = Random(f"batch/{world.random.random()}")
        self.ids = random
        self.prompts = {
            f"item-{number}": [random.randrange(VOCABULARY) for _ in range(3)]
            for number in range(spec.items)
        }
        self.file.write_text("".join(map(self.line, self.prompts)))
        self.outputs: dict[str, PlainOutput] = {}
        self.router: Router | None = None
        self.asked = 0
        self.finished = False
        super().__init__(world, network, "batch")

    def tell(self, targets: list[TargetState]) -> None:
        """Tell its router who is there."""

        def update() -> None:
            if self.router is not None:
                self.router.update(targets)

        if not self.loop.dead:
            self.loop.call_later(0.001, update)

    def line(self, name: str) -> str:
        body = {"model": "toy", "prompt": self.prompts[name]}
        item = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
        return json.dumps(item) + "\n"

    def build(self) -> None:
        self.router = Router(GrpcTarget)
        self.loop.create_task(self.work(self.loop, self.router))

    async def work(self, loop: ProcessLoop, router: Router) -> None:
        try:
            with self.disk(loop), open_job(str(self.file), str(self.out)) as job:
                clock = Clock(loop.time, asyncio.sleep)
                await answer_job(job, self, self.spec.at_once, lambda _: None, clock)
                self.check(job.record.id)
                self.finished = True
        except Unavailable as error:
            self.world.log(self.name, f"gives up: {type(error).__name__}")
            self.world.fate.call_later(0.0, self.kill)
        else:
            self.world.log(self.name, "has answered all items")
        finally:
            self.router = None  # nobody tells it of targets any more
            await router.close()

    def kill(self) -> None:
        if not self.loop.dead and not self.finished:
            super().kill()
            self.loop.reap(close=False)  # the kernel closes its files and releases its lock
            self.world.fate.call_later(RESTART_S, self.begin)

    async def close(self) -> None:
        """Its end is a kill."""

    @contextmanager
    def disk(self, loop: ProcessLoop) -> Iterator[None]:
        """Let jobs write to the simulated disk."""
        disk = Disk(loop, self.spec, self.random)

        class SlowIndex(JobIndex):
            @contextmanager
            def _transaction(self) -> Iterator[None]:
                disk.wait()
                with super()._transaction():
                    yield
                    disk.wait()
                    if disk.fails():
                        raise sqlite3.OperationalError("disk I/O error")
                disk.wait()

        def destination(url: str) -> Destination:
            return Destination(DiskOutput(FileOutput(Path(url), lambda _: None), disk), Path(url))

        def uuid4() -> SimpleNamespace:
            return SimpleNamespace(hex=f"{self.ids.getrandbits(128):032x}")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jobs, "resolve_output", destination)
            patch.setattr(jobs, "JobIndex", SlowIndex)
            patch.setattr(jobs, "uuid", SimpleNamespace(uuid4=uuid4))
            patch.setenv("XDG_DATA_HOME", str(self.out.parent))
            yield

    # As actors.jobs.cluster_answerer, without tokenizer and HTTP bodies

    async def answer(self, item: Item) -> Answer:
        self.asked += 1
        name, router = f"{item.custom_id}.{self.asked}", self.router
        assert router is not None
        sampling = SamplingParams(temperature=1.0, max_tokens=12, seed=item.body["seed"])
        request = Request(name, tuple(item.body["prompt"]), sampling)
        if item.custom_id not in self.outputs:
            self.outputs[item.custom_id] = PlainOutput(request)
        self.plain[name] = self.outputs[item.custom_id]
        text, count = "", 0
        try:
            async for chunk in router.generate(request):
                text += "".join(chunk.pieces)
                count += len(chunk.tokens)
        except (InvalidRequest, TargetsLost) as error:
            found = to_api_error(error)
            return Answer(found.status, found.body(), name)
        usage = {"prompt_tokens": len(request.prompt), "completion_tokens": count}
        return Answer(200, {"choices": [{"text": text}], "usage": usage}, name)

    def check(self, job: str) -> None:
        """Check that each item is answered exactly once, as plain decoding does."""
        lines = [json.loads(line) for line in self.out.read_text().splitlines()]
        counts = Counter(line["custom_id"] for line in lines)
        if counts != Counter(self.prompts.keys()):
            self.world.fail(f"items are answered {dict(counts)} times")
        for line in lines:
            name, response = line["custom_id"], line["response"]
            lost = response["body"].get("error", {}).get("code") == TARGETS_LOST
            if lost and self.target_faults >= 2:
                continue
            if self.outputs[name].request.sampling.seed != item_seed(job, name):
                self.world.fail(f"{name} was answered with the seed of another job")
            texts = [choice["text"] for choice in response["body"].get("choices", ())]
            if texts != ["".join(self.outputs[name].pieces)]:
                self.world.fail(f"{name} is answered {response['body']}")


class Disk:
    """Waits, and fails, by chance."""

    def __init__(self, loop: ProcessLoop, spec: BatchSpec, random: Random) -> None:
        self.loop, self.spec, self.random = loop, spec, random

    def wait(self) -> None:
        if self.loop.world.running_thread is not None:
            sleep(self.loop, self.random.uniform(0.0, self.spec.slow_s))

    def fails(self) -> bool:
        is_working = self.loop.world.running_thread is not None
        return is_working and self.random.random() < self.spec.errors


class DiskOutput:
    """An output whose writes take time, and may stop in their middle."""

    def __init__(self, inner: FileOutput, disk: Disk) -> None:
        self.inner, self.disk = inner, disk
        self.begin, self.resume, self.finish = inner.begin, inner.resume, inner.finish

    def append(self, lines: bytes) -> OutputMark:
        self.disk.wait()
        cut = self.disk.random.randrange(len(lines) + 1)
        mark = self.inner.append(lines[:cut])
        self.disk.wait()
        if self.disk.fails():
            raise Unavailable("no space left on the disk")
        if cut < len(lines):
            mark = self.inner.append(lines[cut:])
        self.disk.wait()
        return mark
