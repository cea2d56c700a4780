"""Builds a deployment from the arguments of a command: a target, and names of methods or models."""

import itertools
import json
import os
import re
from collections.abc import Container
from pathlib import Path

from runtime.config import (
    MAX_DRAFTERS,
    ROLES,
    Deployment,
    Device,
    Dtype,
    HeadConfig,
    Placement,
    Policy,
    PoolConfig,
    ScheduleConfig,
    TargetConfig,
)
from runtime.core.cpu_partition import split_cores
from runtime.core.sampling_params import check_int
from runtime.method_registry import drafting_methods, head_methods
from runtime.model_paths import trained_method


def build_deployment(
    target: str,
    drafts: tuple[str, ...],
    drafters: int,
    dtype: Dtype,
    device: Device,
    local: bool,
    policy: Policy = "living",
) -> Deployment:
    """Build one target with a pool of `drafters` actors for each entry of `drafts`.

    An entry is the name of a method or a model. Entries that are heads run inside the target. With
    `local`, target and pools divide the cores of this machine, listen on loopback only, and reserve
    nothing in Ray. Raises InvalidRequest if `drafters` is out of range.
    """
    here = Placement(num_cpus=0, listen="127.0.0.1") if local else Placement()
    check_int("drafters", drafters, 0, MAX_DRAFTERS)
    mounted = {draft: head for draft in drafts if (head := resolve_head(draft)) is not None}
    apart = [draft for draft in drafts if draft not in mounted]
    mine, *shares = (
        split_cores(sorted(os.sched_getaffinity(0)), len(apart))
        if local
        else [()] * (len(apart) + 1)
    )
    pools: list[PoolConfig] = []
    for draft, cores in zip(apart, shares, strict=True):
        method, model, layers = resolve_drafter(draft)
        name = pool_name(
            draft, {*(pool.name for pool in pools), *(head.method for head in mounted.values())}
        )
        place = here.model_copy(update={"cores": cores})
        kind = {
            "method": method,
            "model": model,
            "layers": layers,
            "dtype": dtype,
            "device": device,
        }
        pools.append(
            PoolConfig.model_validate({"name": name, "count": drafters, "placement": place, **kind})
        )
    return Deployment(
        target=TargetConfig(
            model=target,
            dtype=dtype,
            device=device,
            schedule=ScheduleConfig(policy=policy),
            heads=tuple(mounted.values()),
            placement=here.model_copy(update={"cores": mine}),
        ),
        pools=tuple(pools),
    )


def resolve_head(draft: str) -> HeadConfig | None:
    """Return the head that `draft` means: a head's name, or a folder trained to be one.

    Returns None for a drafter or a model.
    """
    if draft in head_methods():
        return HeadConfig(method=draft)
    method = trained_method(draft)
    return HeadConfig(method=method, folder=draft) if method in head_methods() else None


def resolve_drafter(draft: str) -> tuple[str, str, tuple[int, ...]]:
    """Return the method, model and layers that `draft` means.

    `draft` is a method's name, the result of tuning or training one, or a model.
    """
    if layers := read_layers(draft):
        return "layer-skip", "", layers
    if draft in drafting_methods() and draft != "model":
        return draft, "", ()
    method = trained_method(draft)
    return method if method in drafting_methods() else "model", draft, ()


def read_layers(draft: str) -> tuple[int, ...]:
    """Read the layers that `outrider tune layers` wrote to a file; empty for any other file."""
    try:
        found = json.loads(Path(draft).read_bytes())
        layers = tuple(int(layer) for layer in found["layers"])
    except (OSError, ValueError, LookupError, TypeError):
        return ()
    return layers if found.get("method") == "layer-skip" else ()


def pool_name(draft: str, taken: Container[str]) -> str:
    """Derive a pool's name from the last part of a model's name; add a number if it is taken."""
    stem = re.sub(r"[^a-z0-9._-]+", "-", Path(draft).name.lower()).lstrip("._-")[:32] or "draft"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken and name not in ROLES)
