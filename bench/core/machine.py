"""Facts about the machine that affect the results."""

import datetime
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from bench.core.results import Machine
from runtime.core.errors import InvalidRequest

SPEED_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "bf16",
    "i8mm",
    "sve",
)  # CPU flags that determine the cost of a row


BF16_FLAGS = {"avx512_bf16", "amx_bf16"}  # CPU flags of native bf16 multiplication


def two_cores() -> tuple[int, int]:
    """Return two cores that this process may use, avoiding two threads of one core if possible.

    Raises InvalidRequest if fewer than two cores are available.
    """
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise InvalidRequest(
            f"the benchmark needs two cores and may use {len(usable)}: allow it two",
            "cores",
        )
    twins = read_text(f"/sys/devices/system/cpu/cpu{usable[0]}/topology/thread_siblings_list")
    return usable[0], next(
        (core for core in usable[1:] if str(core) not in re.split(r"[,\s]", twins)), usable[1]
    )


def machine(cores: int, gpu: str = "") -> Machine:
    """Describe this machine; `cores` are those the benchmark uses, `gpu` is the name of its GPU."""
    facts = cpu_facts(read_text("/proc/cpuinfo"))
    flags = facts.get("flags", facts.get("Features", "")).split()
    return Machine(
        processor=facts.get("model name", platform.processor() or platform.machine()),
        flags=tuple(flag for flag in SPEED_FLAGS if flag in flags),
        cores=cores,
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        gpu=gpu,
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def cpu_facts(text: str) -> dict[str, str]:
    """Parse the entry of the first processor in /proc/cpuinfo."""
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def read_text(file: str) -> str:
    try:
        return Path(file).read_text("utf-8")
    except OSError:
        return ""
