"""Builds a deployment from command-line arguments: a target, and names of methods or models."""

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
    """A pool of `drafters` actors for each of `drafts` (a method's name or a model), beside one target with those of them that are heads.

    With `local`, target and pools share this machine's cores between them and listen on loopback alone; Ray has nothing to ration.
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
    """The head that is meant: by its name, or by a folder that was trained to be one. None for what is a drafter or a model."""
    if draft in head_methods():
        return HeadConfig(method=draft)
    method = trained_method(draft)
    return HeadConfig(method=method, folder=draft) if method in head_methods() else None


def resolve_drafter(draft: str) -> tuple[str, str, tuple[int, ...]]:
    """Method, model and layers of what is no head: a method's name, what was tuned or trained for one, or a model."""
    if layers := read_layers(draft):
        return "layer-skip", "", layers
    if draft in drafting_methods() and draft != "model":
        return draft, "", ()
    method = trained_method(draft)
    return method if method in drafting_methods() else "model", draft, ()


def read_layers(draft: str) -> tuple[int, ...]:
    """What `outrider tune layers` has written into a file; empty for anything else."""
    try:
        found = json.loads(Path(draft).read_bytes())
        layers = tuple(int(layer) for layer in found["layers"])
    except (OSError, ValueError, LookupError, TypeError):
        return ()
    return layers if found.get("method") == "layer-skip" else ()


def pool_name(draft: str, taken: Container[str]) -> str:
    """The last part of a model's name, as far as a pool may be called so; with a number where it is taken already."""
    stem = re.sub(r"[^a-z0-9._-]+", "-", Path(draft).name.lower()).lstrip("._-")[:32] or "draft"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken and name not in ROLES)
