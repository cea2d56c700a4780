"""The runner for transformers: generate() as documented, in a separate process pinned to its
cores."""

import copy
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.core.methods import Method, Outcome, TransformersMethod
from bench.core.prompts import Prompt
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.core.messages import Tokens
from runtime.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """The models and cores of a worker; without a draft there is no assisted generation.

    `cores` are the machine's core numbers; there are as many threads. Both models run on `device`
    (cpu, cuda or cuda:0).
    """

    target: Path
    draft: Path | None
    dtype: str
    cores: tuple[int, ...]
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class GenerateJob:
    how: TransformersMethod
    prompts: tuple[Tokens, ...]
    sampling: SamplingParams


class TransformersRunner:
    """A worker process that has loaded the pair, as a Runner for transformers' methods and a
    context manager."""

    def __init__(self, place: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve_jobs, args=(theirs, place), name="transformers", daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> "TransformersRunner":
        return self

    def run(self, method: Method, prompts: Sequence[Prompt], sampling: SamplingParams) -> Outcome:
        """Run a method in the worker.

        Raises InvalidRequest for what generate() does not support, Unavailable if the process has
        ended.
        """
        if not isinstance(method.how, TransformersMethod):
            raise InvalidRequest(
                f"method {method.name!r} is not transformers': run it with OutriderRunner", "method"
            )
        if len(prompts) > 1 and method.how.kind != "greedy":
            raise InvalidRequest(
                f"method {method.name!r} takes one prompt at a time, not {len(prompts)}", "batch"
            )
        try:
            self._connection.send(
                GenerateJob(method.how, tuple(prompt.tokens for prompt in prompts), sampling)
            )
            outcome: Outcome = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise Unavailable(
                f"transformers' process ended with code {self._process.exitcode}: see its "
                "message above"
            ) from error
        return outcome

    def close(self) -> None:
        self._connection.close()
        self._process.terminate()  # it may be running a job whose result nobody needs
        self._process.join()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def serve_jobs(connection: Connection, place: WorkerSpec) -> None:
    """Answer jobs until the other end closes. An error ends the process."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to the caller, which ends this process
    os.sched_setaffinity(0, place.cores)
    import torch

    torch.set_num_threads(len(place.cores))
    pair = LoadedPair(place)
    while True:
        try:
            job: GenerateJob = connection.recv()
        except EOFError:
            return
        connection.send(pair.run(job))


class LoadedPair:
    """The target and the assistant, loaded in this process."""

    def __init__(self, place: WorkerSpec) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        safely = {"use_safetensors": True, "local_files_only": True, "dtype": place.dtype}
        self.target: Any
        self.draft: Any
        self.target, self.draft = (
            None
            if folder is None
            else AutoModelForCausalLM.from_pretrained(folder, **safely).to(place.device).eval()
            for folder in (place.target, place.draft)
        )
        self.usual = None if self.draft is None else copy.deepcopy(self.draft.generation_config)

    def run(self, job: GenerateJob) -> Outcome:
        import torch

        torch.manual_seed(job.sampling.seed)
        ids, mask = pad_left(job.prompts)
        first = FirstTokens()
        how = self.arguments(job.how, job.sampling)
        began = time.perf_counter()
        given = {
            "inputs": ids.to(self.target.device),
            "attention_mask": mask.to(self.target.device),
        }
        rows: list[list[int]] = self.target.generate(**given, **how, streamer=first).tolist()
        ended = time.perf_counter()
        outputs = tuple(until_end(row[ids.shape[1] :], self.ends()) for row in rows)
        return Outcome(outputs, ended - began, first.at - began, first.count)

    def arguments(self, how: TransformersMethod, sampling: SamplingParams) -> dict[str, Any]:
        """Return the arguments of generate().

        generate() reads the number of guesses from the assistant's generation config. A constant
        number disables its other limit, the confidence threshold.
        """
        found: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            "do_sample": sampling.temperature > 0,
        }
        if sampling.temperature > 0:
            found |= {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        if self.target.generation_config.pad_token_id is None:
            found["pad_token_id"] = min(self.ends(), default=0)
        if how.kind == "lookup":
            found["prompt_lookup_num_tokens"] = how.guesses
        if how.kind == "assisted":
            found["assistant_model"] = self.draft
            self.draft.generation_config = copy.deepcopy(self.usual)
            if how.guesses:
                constant = {
                    "num_assistant_tokens": how.guesses,
                    "num_assistant_tokens_schedule": "constant",
                }
                self.draft.generation_config.update(**constant, assistant_confidence_threshold=0.0)
        return found

    def ends(self) -> set[int]:
        said = self.target.generation_config.eos_token_id
        return set(said if isinstance(said, list) else [said]) - {None}


class FirstTokens:
    """A streamer that records when the first tokens after the prompt came, and how many.

    generate() needs only these two methods.
    """

    def __init__(self) -> None:
        self.calls, self.at, self.count = 0, 0.0, 0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 2:
            self.at, self.count = time.perf_counter(), value.numel()

    def end(self) -> None:
        pass


def pad_left(prompts: Sequence[Tokens]) -> tuple[Any, Any]:
    """Return token ids and attention mask, int64 (prompts, longest), padded on the left."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def until_end(tokens: Sequence[int], ends: set[int]) -> Tokens:
    """Return the tokens up to and including the first end token; generate() pads finished texts."""
    last = next((index for index, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tuple(tokens[: last + 1])
