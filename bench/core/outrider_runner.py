"""The runner for our methods: target and drafters are Ray actors on separate cores that talk gRPC;
requests come from this process."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import ray

from actors.controller.actor_handles import START_TIMEOUT_S, actor_class
from actors.drafter import DraftActor
from actors.fleet.ray_session import ray_cluster, translate_ray_errors
from actors.rpc.client import GrpcTarget
from actors.rpc.common import CALLER_SILENCE_MS
from actors.rpc.endpoints import Endpoint
from actors.target import TargetActor
from bench.core import recording_stats
from bench.core.methods import DRAFT, Cores, Method, Outcome, OutriderMethod
from bench.core.prompts import Prompt
from runtime.config import DrafterConfig, Dtype, HeadConfig, Placement, ScheduleConfig, TargetConfig
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.core.messages import Chunk, Request, Stats, Tokens
from runtime.core.sampling_params import SamplingParams
from runtime.kv.prefix_cache import PrefixCache
from runtime.scheduler_factory import make_scheduler
from runtime.schedulers.base import Scheduler
from runtime.scoring.calibration import Calibrations
from runtime.telemetry.tracing import Recording

MAX_TRIES = 3  # of a run during which a drafter is lost
ATTACH_TIMEOUT_S = 10.0  # for the target to attach its drafters
POLL_PERIOD_S = 0.01


@dataclass(frozen=True, slots=True)
class ModelPair:
    """The target and draft (folders or names) and the core numbers that `Cores` index into.

    method   the drafting method that reads `draft`, which is a draft model for "model"
    heads    head folders by method; "" for a head without weights
    layers   the layers that layer-skip keeps; default: every second
    trained  folders of drafters trained for the target, by method
    """

    target: str
    draft: str
    dtype: Dtype
    cores: tuple[int, ...]
    heads: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    trained: Mapping[str, str] = field(default_factory=dict)
    method: str = "model"

    def placement(self, cores: Cores) -> Placement:
        return Placement(cores=tuple(self.cores[place] for place in cores), listen="127.0.0.1")

    def target_config(self, cores: Cores) -> TargetConfig:
        heads = tuple(
            HeadConfig(method=method, folder=folder) for method, folder in self.heads.items()
        )
        return TargetConfig(
            model=self.target,
            dtype=self.dtype,
            device="cpu",
            heads=heads,
            placement=self.placement(cores),
        )

    def drafter_config(self, method: str, cores: Cores) -> DrafterConfig:
        model = self.trained.get(method, "" if method in ("ngram", "layer-skip") else self.draft)
        layers = self.layers if method == "layer-skip" else ()
        named = {
            "name": drafter_name(method),
            "method": self.method if method == DRAFT else method,
            "model": model,
            "layers": layers,
            "dtype": self.dtype,
        }
        return DrafterConfig.model_validate(
            {**named, "device": "cpu", "placement": self.placement(cores)}
        )


def drafter_name(method: str) -> str:
    return f"{DRAFT if method == 'model' else method}-0"


def schedule_config(how: OutriderMethod) -> ScheduleConfig:
    return ScheduleConfig.model_validate({"policy": how.schedule, **dict(how.options)})


class MethodTarget(TargetActor):
    """A target that switches between methods and isolates each from what another has learned or
    cached."""

    def __init__(self, config: TargetConfig, record: bool = False) -> None:
        super().__init__(config, record)
        self.policies: dict[OutriderMethod, Scheduler] = {}
        self.known: dict[tuple[str, ...], Calibrations] = {}

    def use_method(self, how: OutriderMethod, peers: list[Endpoint]) -> None:
        """Use this method from the next request on. Call it only if no request is running.

        A method that returns finds its state again: each has its own scheduler, and each policy
        with these drafters its own calibration. The prefix cache starts empty, so prompts are read
        again.
        """
        engine = self.target.engine
        if how.cold or how not in self.policies:
            self.policies[how] = make_scheduler(schedule_config(how), self.times)
        self.target.schedule(self.policies[how], frozenset(f"{head}-0" for head in how.heads))
        engine.requests.calibrations = (
            Calibrations()
            if how.cold
            else self.known.setdefault((how.schedule, *how.drafters, *how.heads), Calibrations())
        )
        engine.requests.prefixes = PrefixCache(engine.requests.prefixes.max_slots)
        self.drafters(peers)

    def learned(self) -> dict[str, Any]:
        """Return the calibration of the current method, in the format of `Calibrations.saved`."""
        return self.target.engine.requests.calibrations.to_dict()


class Service(Protocol):
    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]: ...


@dataclass(slots=True)
class TimedAnswer:
    """The tokens of one request, and how many were there at each moment (`time.perf_counter`)."""

    tokens: list[int] = field(default_factory=list)
    moments: list[tuple[float, int]] = field(default_factory=list)
    stats: Stats | None = None


async def ask_all(
    service: Service, prompts: Sequence[Tokens], sampling: SamplingParams
) -> tuple[float, list[TimedAnswer]]:
    """Send all prompts at once; return the start time and the answers.

    Raises Unavailable if a request ends with an error.
    """
    requests = [Request(uuid.uuid4().hex, prompt, sampling) for prompt in prompts]
    began = time.perf_counter()
    return began, list(
        await asyncio.gather(*(time_answer(service, request) for request in requests))
    )


async def time_answer(service: Service, request: Request) -> TimedAnswer:
    answer = TimedAnswer()
    async for chunk in service.generate(request):
        if chunk.finish_reason in ("error", "cancelled"):
            raise Unavailable(
                f"the target did not finish ({chunk.error or chunk.finish_reason}): see the "
                "message above"
            )
        answer.tokens += chunk.tokens
        answer.moments.append((time.perf_counter(), len(answer.tokens)))
        answer.stats = chunk.stats or answer.stats
    return answer


def outcome_of(began: float, answers: Sequence[TimedAnswer]) -> Outcome:
    """Summarise requests that were sent at `began`, without the figures of the steps."""
    first = max(next(at for at, count in answer.moments if count) for answer in answers)
    return Outcome(
        outputs=tuple(tuple(answer.tokens) for answer in answers),
        seconds=max(answer.moments[-1][0] for answer in answers) - began,
        first_seconds=first - began,
        first_tokens=sum(
            max(count for at, count in answer.moments if at <= first) for answer in answers
        ),
    )


class OutriderRunner:
    """A Runner for the methods that it was started for.

    recordings  those of the last run: the target's, then its drafters'
    learned     the calibration after the last run (`MethodTarget.learned`)
    """

    def __init__(
        self, targets: Mapping[Cores, Any], drafters: Mapping[tuple[str, Cores], Any]
    ) -> None:
        """Take the handles of started MethodTarget and DraftActor actors."""
        self.targets, self.drafters = targets, drafters
        self.recordings: list[Recording] = []
        self.learned: dict[str, Any] = {}
        self._loop = asyncio.Runner()
        self._services: dict[str, GrpcTarget] = {}

    def run(
        self,
        method: Method,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        tries: int = MAX_TRIES,
    ) -> Outcome:
        """Run a method and keep its recordings.

        Raises InvalidRequest for a method of transformers. Raises Unavailable if an actor has
        ended, or if a drafter was lost in every try.
        """
        if not isinstance(method.how, OutriderMethod):
            raise InvalidRequest(
                f"method {method.name!r} is transformers': run it with TransformersRunner", "method"
            )
        how, target = method.how, self.targets[method.how.target_cores]
        drafters = {
            drafter_name(name): self.drafters[name, how.drafter_cores] for name in how.drafters
        }
        with translate_ray_errors():
            peers = [
                Endpoint(name, ray.get(handle.where.remote()).address, 0)
                for name, handle in drafters.items()
            ]
            ray.get(target.use_method.remote(how, peers))
            self._await_drafters(target, sorted(drafters))
            actors = [target, *drafters.values()]
            ray.get(
                [actor.trace.remote() for actor in actors]
            )  # drop what was recorded since the last run
            address = ray.get(target.where.remote()).address
            began, answers = self._loop.run(
                self._ask(address, [prompt.tokens for prompt in prompts], sampling)
            )
            if (left := sorted(ray.get(target.attached.remote()))) != sorted(drafters):
                if tries > 1:  # perhaps the machine stalled: discard the run
                    return self.run(method, prompts, sampling, tries - 1)
                raise Unavailable(
                    f"of the drafters {sorted(drafters)} only {left} were left after "
                    f"{method.name}: see the message above"
                )
            self.recordings = ray.get([actor.trace.remote() for actor in actors])
            self.learned = ray.get(target.learned.remote())
        return with_steps(outcome_of(began, answers), answers, self.recordings)

    def _await_drafters(self, target: Any, names: list[str]) -> None:
        deadline = time.monotonic() + ATTACH_TIMEOUT_S
        while (attached := sorted(ray.get(target.attached.remote()))) != names:
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"the target has the drafters {attached} and not {names}: see the message above"
                )
            time.sleep(POLL_PERIOD_S)

    async def _ask(
        self, address: str, prompts: Sequence[Tokens], sampling: SamplingParams
    ) -> tuple[float, list[TimedAnswer]]:
        if address not in self._services:
            self._services[address] = GrpcTarget(address, silence_ms=CALLER_SILENCE_MS)
        return await ask_all(self._services[address], prompts, sampling)

    def close(self) -> None:
        """Close the connections; the actors keep running."""
        for service in self._services.values():
            self._loop.run(service.close())
        self._loop.close()


def with_steps(
    found: Outcome, answers: Sequence[TimedAnswer], parts: Sequence[Recording]
) -> Outcome:
    """Add the passes and, for a single prompt, the figures of the target's steps.

    Several prompts share their steps, so they have no figures of their own.
    """
    target, *drafters = parts
    stats = answers[0].stats if len(answers) == 1 else None
    steps = None if stats is None else recording_stats.recorded_steps(stats, target, drafters)
    return replace(found, steps=steps, passes=recording_stats.recorded_passes(target, drafters))


@contextlib.contextmanager
def running_cluster(pair: ModelPair, methods: Iterable[Method]) -> Iterator[OutriderRunner]:
    """Start a Ray cluster on this machine with the actors that these methods need; stop it at the
    end of the block.

    Targets start one by one before any drafter, because each measures T(n) at start and must be
    alone on its cores. All actors record, which costs a few microseconds per step. Raises the error
    of an actor's start, or Unavailable if Ray does not start.
    """
    hows = [method.how for method in methods if isinstance(method.how, OutriderMethod)]
    wanted_targets = sorted({how.target_cores for how in hows})
    wanted_drafters = sorted({(name, how.drafter_cores) for how in hows for name in how.drafters})
    with ray_cluster(None, cpus=len(wanted_targets) + len(wanted_drafters)):
        targets = {}
        for cores in wanted_targets:
            config = pair.target_config(cores)
            targets[cores] = actor_class(
                MethodTarget, actor_name("target", cores), config.placement
            ).remote(config, True)
            ray.get(targets[cores].start.remote(), timeout=START_TIMEOUT_S)
        drafters = {}
        for method, cores in wanted_drafters:
            drafter = pair.drafter_config(method, cores)
            handle = actor_class(DraftActor, actor_name(method, cores), drafter.placement).remote(
                drafter, pair.target, 0, True
            )
            drafters[method, cores] = handle
        ray.get([handle.start.remote() for handle in drafters.values()], timeout=START_TIMEOUT_S)
        found = OutriderRunner(targets, drafters)
        try:
            yield found
        finally:
            found.close()


def actor_name(what: str, cores: Cores) -> str:
    return f"bench-{what}-{'-'.join(map(str, cores))}"
