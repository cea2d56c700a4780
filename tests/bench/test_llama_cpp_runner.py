"""llama.cpp in its own process: the protocol with the worker, on a stand-in for llama-cpp-python.

The stand-in is a package of that name which decodes a toy: each token is the one before plus one.
"""

import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.core import llama_cpp_runner
from bench.core.llama_cpp_runner import LlamaCppRunner, LlamaCppSpec, bfloat16_file
from bench.core.methods import LLAMA_CPP_METHODS, PLAIN, Method
from bench.core.options import choose_suite
from bench.core.prompts import Prompt
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.core.sampling_params import SamplingParams

END = 60
STAND_IN = f"""
import ctypes, pathlib

class Params(ctypes.Structure):
    _fields_ = [("ftype", ctypes.c_int), ("allow_requantize", ctypes.c_bool),
                ("nthread", ctypes.c_int)]

llama_model_quantize_default_params = Params

def llama_model_quantize(source, destination, how):
    pathlib.Path(destination.decode()).write_text(f"bf16 of {{source.decode()}}")
    return 0 if pathlib.Path(source.decode()).exists() else 1

def llama_model_get_vocab(model):
    return model

def llama_vocab_eos(vocabulary):
    return {END}

def llama_vocab_eot(vocabulary):
    return -1

class Llama:
    def __init__(self, file, n_ctx, n_threads, n_threads_batch, draft_model, verbose):
        assert n_threads == n_threads_batch
        self.model, self.draft, self.slots = file, draft_model, n_ctx

    def reset(self):
        pass

    def set_seed(self, seed):
        pass

    def generate(self, prompt, temp, top_k, top_p, min_p, repeat_penalty):
        assert len(prompt) < self.slots
        token = prompt[-1]
        while True:
            token += 1
            yield token
"""
LOOKUP = """
class LlamaPromptLookupDecoding:
    def __init__(self, num_pred_tokens):
        self.tokens = num_pred_tokens
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LlamaCppRunner]:
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text(textwrap.dedent(STAND_IN))
    (package / "llama_speculative.py").write_text(LOOKUP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "model.gguf").write_text("GGUF")
    core = min(os.sched_getaffinity(0))
    spec = LlamaCppSpec(Path(sys.executable), tmp_path / "model.gguf", (core,), 64)
    with LlamaCppRunner(spec) as found:
        yield found


def ask(runner: LlamaCppRunner, method: Method, *prompts: Prompt) -> tuple[tuple[int, ...], ...]:
    return runner.run(method, prompts, SamplingParams(max_tokens=5)).outputs


@pytest.mark.parametrize("method", LLAMA_CPP_METHODS, ids=lambda method: method.name)
def test_every_method_decodes(runner: LlamaCppRunner, method: Method) -> None:
    before = os.sched_getaffinity(0)
    assert ask(runner, method, Prompt("a", (3, 7))) == ((8, 9, 10, 11, 12),)
    assert ask(runner, method, Prompt("b", (END - 2,))) == ((END - 1, END),)
    assert os.sched_getaffinity(0) == before


def test_times_are_those_of_the_worker(runner: LlamaCppRunner) -> None:
    found = runner.run(LLAMA_CPP_METHODS[0], [Prompt("a", (3,))], SamplingParams(max_tokens=4))
    assert 0 < found.first_seconds <= found.seconds
    assert found.first_tokens == 1


def test_other_methods_and_batches_are_refused(runner: LlamaCppRunner) -> None:
    with pytest.raises(InvalidRequest, match="is not llama"):
        ask(runner, PLAIN, Prompt("a", (3,)))
    with pytest.raises(InvalidRequest, match="one prompt at a time"):
        ask(runner, LLAMA_CPP_METHODS[0], Prompt("a", (3,)), Prompt("b", (4,)))


def test_a_worker_that_fails_is_told(runner: LlamaCppRunner) -> None:
    too_long = Prompt("a", tuple(range(1, 100)))
    with pytest.raises(Unavailable, match="ended with code 1"):
        ask(runner, LLAMA_CPP_METHODS[0], too_long)
    with pytest.raises(Unavailable, match="ended with code 1"):
        ask(runner, LLAMA_CPP_METHODS[0], Prompt("a", (3,)))


def test_the_weights_are_converted_once(
    runner: LlamaCppRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp_runner, "CACHE", tmp_path / "cache")
    source, core = tmp_path / "model.gguf", min(os.sched_getaffinity(0))
    file = bfloat16_file(source, Path(sys.executable), (core,))
    assert file.read_text() == f"bf16 of {source}"
    file.write_text("kept")
    assert bfloat16_file(source, Path(sys.executable), (core,)).read_text() == "kept"


def test_llama_cpp_takes_part_if_there_is_a_file_and_assistance_if_there_is_a_model() -> None:
    def names(**how: bool) -> set[str]:
        return {method.name for method in choose_suite(False, None, **how).all}

    assert "llama.cpp" in names(llama_cpp=True)
    assert not [name for name in names() if "llama" in name]
    assert {"assisted", "living, wrong drafter"} < names()
    without = names(has_model=False)
    assert not [name for name in without if "assisted" in name or "wrong" in name]
    assert {"transformers greedy", "prompt lookup", "living, cold"} < without
