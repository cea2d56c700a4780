"""The runner for llama.cpp, through llama-cpp-python in an environment of its own, in a process
pinned to its cores.

llama.cpp is compiled on the machine, for its processor. The weights are those of the GGUF file,
converted to bfloat16 as ours are, so both read the same number of bytes.
"""

import json
import os
import subprocess
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.core.methods import LlamaCppMethod, Method, Outcome
from bench.core.prompts import Prompt
from bench.core.widen import CACHE
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.core.sampling_params import SamplingParams

PACKAGE = "llama-cpp-python==0.3.36"
ENVIRONMENT = CACHE / "llama-cpp"
WORKER = Path(__file__).with_name("llama_cpp_worker.py")


def python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def build_environment(environment: Path = ENVIRONMENT) -> Path:
    """Create the environment if it is missing; return its Python. It takes about 15 minutes.

    Raises Unavailable if llama.cpp cannot be downloaded or compiled here.
    """
    done = environment / "installed"
    if not done.exists():
        venv.EnvBuilder(clear=True, with_pip=True).create(environment)
        pip = [str(python_of(environment)), "-m", "pip", "install", "--quiet", PACKAGE]
        if (code := subprocess.run(pip, check=False).returncode) != 0:
            raise Unavailable(
                f"{PACKAGE} cannot be installed (pip ended with code {code}, see above): "
                "llama.cpp is left out"
            )
        done.touch()
    return python_of(environment)


@dataclass(frozen=True, slots=True)
class LlamaCppSpec:
    """A worker's Python, its model, the machine's core numbers, and the slots of its context."""

    python: Path
    gguf: Path
    cores: tuple[int, ...]
    slots: int


class LlamaCppRunner:
    """A worker process, as a Runner for llama.cpp's methods and a context manager."""

    def __init__(self, spec: LlamaCppSpec) -> None:
        usable = os.sched_getaffinity(0)
        os.sched_setaffinity(0, spec.cores)  # which the worker inherits
        try:
            self._process = subprocess.Popen(
                [
                    str(spec.python),
                    str(WORKER),
                    str(spec.gguf),
                    str(len(spec.cores)),
                    str(spec.slots),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        finally:
            os.sched_setaffinity(0, usable)

    def __enter__(self) -> "LlamaCppRunner":
        return self

    def convert(self, destination: Path) -> None:
        """Write the model in bfloat16. Raises Unavailable."""
        self._call({"convert": str(destination)})

    def run(self, method: Method, prompts: Sequence[Prompt], sampling: SamplingParams) -> Outcome:
        """Run a method in the worker.

        Raises InvalidRequest for another runner's method or several prompts, Unavailable if the
        process has ended.
        """
        if not isinstance(method.how, LlamaCppMethod):
            raise InvalidRequest(f"method {method.name!r} is not llama.cpp's", "method")
        if len(prompts) > 1:
            raise InvalidRequest(
                f"method {method.name!r} takes one prompt at a time, not {len(prompts)}", "batch"
            )
        found = self._call(
            {
                "guesses": method.how.guesses,
                "prompts": [list(prompt.tokens) for prompt in prompts],
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "seed": sampling.seed,
            }
        )
        return Outcome(
            tuple(map(tuple, found["outputs"])),
            found["seconds"],
            found["first_seconds"],
            found["first_tokens"],
        )

    def _call(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(job), file=self._process.stdin, flush=True)
        except OSError:
            line = ""
        else:
            line = self._process.stdout.readline()
        if not line:
            raise Unavailable(
                f"llama.cpp's process ended with code {self._process.wait()}: see its message above"
            )
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def bfloat16_file(gguf: Path, python: Path, cores: tuple[int, ...]) -> Path:
    """Return the cached GGUF file with the same weights in bfloat16; write it if missing."""
    size, changed = gguf.stat().st_size, gguf.stat().st_mtime_ns
    done = CACHE / f"{gguf.stem}-{size}-{changed}-bf16.gguf"
    if not done.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = done.with_suffix(".partial")
        with LlamaCppRunner(LlamaCppSpec(python, gguf, cores, 8)) as worker:
            worker.convert(partial)
        partial.replace(done)
    return done
