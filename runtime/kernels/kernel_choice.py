"""Chooses by measurement which kernel computes the products with matrices of one type and shape.

A flag of the processor says that an instruction exists, not that the code which uses it is fast.
One kernel serves all numbers of rows, or else a row's result could depend on its neighbours. The
choice is kept in the cache folder, for each processor, version of torch and number of threads, so
that later processes compute the same numbers and do not measure again.
"""

import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from llvmlite import binding

from runtime.core.cache_folder import cache_folder

ROW_COUNTS = (1, 4, 8, 16)
MAX_WEIGHTS = 1 << 20  # of the matrix that is measured: fewer outputs stand for more
ROUNDS = 3
MARGIN = 1.1  # a later candidate must be this many times as fast: near-ties fall the same way
VERSION = 1  # of the kernels; a new one voids the choices that are kept

Product = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernel chosen, and each candidate's milliseconds for ROW_COUNTS rows of `shape`.

    `times` is empty if there was no alternative.
    """

    kernel: str
    shape: tuple[int, int]
    times: Mapping[str, Sequence[float]]


def fastest(times: Mapping[str, Sequence[float]]) -> str:
    """Return the candidate with the shortest time; the first, unless another has a MARGIN."""
    best, *others = times
    for other in others:
        if MARGIN * sum(times[other]) < sum(times[best]):
            best = other
    return best


def choose_kernel(
    dtype: torch.dtype,
    shape: tuple[int, int],
    candidates: Sequence[str],
    make: Callable[[str, torch.Tensor], Product],
) -> KernelChoice:
    """Return the choice for (outer, inner) matrices, measured now or earlier.

    `make` returns the product of a candidate with a matrix. Candidates are in order of preference.
    """
    measured = shape_class(shape)
    if len(candidates) == 1:
        return KernelChoice(candidates[0], measured, {})
    name = (
        f"{str(dtype).removeprefix('torch.')} {measured[0]}x{measured[1]} "
        f"{torch.get_num_threads()} {','.join(candidates)}"
    )
    kept = read_choices()
    if name not in kept:
        times = measure(dtype, measured, candidates, make)
        kept[name] = KernelChoice(fastest(times), measured, times)
        write_choices(kept)
    return kept[name]


def shape_class(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the matrix that stands for this one."""
    outer, inner = shape
    return min(outer, max(1, MAX_WEIGHTS // inner)), inner


def measure(
    dtype: torch.dtype,
    shape: tuple[int, int],
    candidates: Sequence[str],
    make: Callable[[str, torch.Tensor], Product],
) -> dict[str, list[float]]:
    """Return each candidate's milliseconds by ROW_COUNTS, interleaved; the shortest of ROUNDS."""
    weight = (torch.randn(shape, dtype=torch.float32) / shape[1] ** 0.5).to(dtype)
    products = {name: make(name, weight) for name in candidates}
    inputs = [torch.randn(rows, shape[1]).to(dtype) for rows in ROW_COUNTS]
    times = {name: [float("inf")] * len(inputs) for name in candidates}
    with torch.inference_mode():
        for _ in range(ROUNDS + 1):
            for place, rows in enumerate(inputs):
                for name, product in products.items():
                    began = time.perf_counter()
                    product(rows, None)
                    taken = 1e3 * (time.perf_counter() - began)
                    times[name][place] = min(times[name][place], round(taken, 4))
    return times


@functools.cache
def processor() -> str:
    """Return what the choices depend on besides the matrices."""
    features = binding.get_host_cpu_features().flatten()
    return f"{VERSION}\n{binding.get_host_cpu_name()}\n{features}\n{torch.__version__}"


def choices_file() -> Path:
    return cache_folder() / f"kernels-{hashlib.sha256(processor().encode()).hexdigest()[:16]}.json"


_known: dict[Path, dict[str, KernelChoice]] = {}  # what this process has read or measured


def read_choices() -> dict[str, KernelChoice]:
    """Return the choices kept for this processor. A damaged file counts as none."""
    file = choices_file()
    if file not in _known:
        try:
            _known[file] = {
                str(name): KernelChoice(
                    str(one["kernel"]),
                    (int(one["shape"][0]), int(one["shape"][1])),
                    {str(kind): [float(ms) for ms in row] for kind, row in one["times"].items()},
                )
                for name, one in json.loads(file.read_bytes()).items()
                if one["kernel"] in one["times"]
            }
        except FileNotFoundError:
            _known[file] = {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("measuring the kernels again: %s cannot be read (%s)", file.name, error)
            _known[file] = {}
    return _known[file]


def write_choices(choices: Mapping[str, KernelChoice]) -> None:
    """Keep the choices, atomically; without a folder to write to, for this process only."""
    file = choices_file()
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    content = {
        name: {"kernel": one.kernel, "shape": one.shape, "times": dict(one.times)}
        for name, one in choices.items()
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1), "utf-8")
        temporary.replace(file)
    except OSError as error:
        log.info("the choice of kernels is not kept: %s", error)
