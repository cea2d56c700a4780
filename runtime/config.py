"""What is started where. Checked here, at the edge; trusted inside. The only place that reads files or the machine's shape."""

import hashlib
import importlib.resources
import itertools
import json
import os
import pkgutil
import re
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

import runtime.drafters
import runtime.heads
from runtime.core.cpu_affinity import share_of, split_cores
from runtime.core.errors import InvalidRequest
from runtime.core.sampling_params import whole

Device = Literal["auto", "cpu", "cuda"]
MOST_DRAFTERS = 64
POOL_NAME = r"^[a-z0-9][a-z0-9._-]{0,40}$"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Policy = Literal["living", "plain", "sync", "amusd", "pearl"]
TRAINED = frozenset(
    {"s3d"}
)  # drafting methods whose model is a folder that was trained for this target
LANES = ("target", "wire")  # of a trace; every other lane is a drafter's
ROLES = (*LANES, "controller", "gateway")  # actors that are no drafters


class Strict(BaseModel):
    """Unknown keys are errors; values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Placement(Strict):
    """Where an actor runs: what it takes from Ray, and what it uses of the machine it lands on."""

    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    resources: dict[str, float] = {}
    node: str | None = Field(
        default=None, description="IP address of the node; default: Ray chooses"
    )
    cores: tuple[int, ...] = Field(default=(), description="CPU cores to stay on; default: all")
    threads: int | None = Field(
        default=None, ge=1, description="torch threads; default: as many as cores"
    )
    listen: str = Field(
        default="",
        description="IP address that its gRPC server binds; default: that of its Ray node",
    )


class ScheduleConfig(Strict):
    """When the target verifies what (runtime/schedulers). The living tree is the product; the others are what it is compared with.

    `width`, `branches`, `passes` and `rows` shape the tree of `sync`; `passes` is also the gamma of `pearl`.
    """

    policy: Policy = "living"
    width: int = Field(default=1, ge=1, le=64)
    branches: int = Field(default=1, ge=1, le=64)
    passes: int = Field(default=4, ge=1, le=32)
    rows: int = Field(default=4, ge=1, le=64)


def known_head(method: str) -> str:
    if method not in heads():
        raise ValueError(f"{method!r} is no head: give one of {', '.join(heads())}")
    return method


class HeadConfig(Strict):
    """One head of a target; they are called METHOD-0, METHOD-1, ... `folder`: what was trained for this target; default: what ships."""

    method: Annotated[str, AfterValidator(known_head), Field(description="a file in runtime/heads")]
    folder: str = ""


class TargetConfig(Strict):
    model: str
    dtype: Dtype = "auto"
    device: Device = "auto"
    schedule: ScheduleConfig = ScheduleConfig()
    kv_tokens: int | None = Field(
        default=None,
        ge=128,
        description="tokens that fit its KV memory; default: a quarter of what is free",
    )
    heads: tuple[HeadConfig, ...] = Field(
        default=(), description="guess from the target's own passes, beside the drafters"
    )
    replicas: int = Field(default=1, ge=0, le=64)
    placement: Placement = Placement()

    def named_heads(self) -> dict[str, HeadConfig]:
        count: Counter[str] = Counter()
        named: dict[str, HeadConfig] = {}
        for head in self.heads:
            named[f"{head.method}-{count[head.method]}"] = head
            count[head.method] += 1
        return named


def known(method: str) -> str:
    if method not in methods():
        raise ValueError(f"{method!r} is no drafting method: give one of {', '.join(methods())}")
    return method


Method = Annotated[str, AfterValidator(known), Field(description="a file in runtime/drafters")]


Layers = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    Field(
        description="of the target, for layer-skip (`outrider tune layers`); default: every second"
    ),
]


class DrafterConfig(Strict):
    """One drafter. `model` is the draft model of the methods that have one, or the folder of what was trained for this target."""

    name: str
    method: Method = "model"
    model: str = ""
    layers: Layers = ()
    dtype: Dtype = "auto"
    device: Device = "auto"
    width: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="leaves expanded in one forward pass; default: as many as cost little more than one",
    )
    placement: Placement = Placement()

    @field_validator("name")
    @classmethod
    def free(cls, name: str) -> str:
        if name in LANES:
            raise ValueError(
                f"{name!r} has a meaning of its own in traces: give the drafter another name"
            )
        return name


class PoolConfig(Strict):
    """Drafters of one kind, as many as are wanted at the time. They are called NAME-0, NAME-1, ...

    `min` and `max` bound how many there are; `count` is how many there are at first, and stays unless `auto` is set or somebody scales.
    """

    name: str = Field(pattern=POOL_NAME)
    method: Method = "model"
    model: str = Field(
        default="",
        description="draft model of the methods that have one: a folder or a hub name; or what was trained",
    )
    layers: Layers = ()
    dtype: Dtype = "auto"
    device: Device = "auto"
    width: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="leaves expanded in one forward pass; default: as many as cost little more than one",
    )
    min: int = Field(default=0, ge=0, le=MOST_DRAFTERS)
    max: int = Field(default=MOST_DRAFTERS, ge=0, le=MOST_DRAFTERS)
    count: int = Field(default=1, ge=0, le=MOST_DRAFTERS)
    auto: bool = Field(
        default=False, description="between min and max by what one more drafter brings"
    )
    placement: Placement = Placement()

    @field_validator("name")
    @classmethod
    def free(cls, name: str) -> str:
        if name in ROLES:
            raise ValueError(
                f"{name!r} names actors that are no drafters: give the pool another name"
            )
        return name

    @model_validator(mode="after")
    def ordered(self) -> Self:
        if not self.min <= self.count <= self.max:
            raise ValueError(
                f"count {self.count} is not between min {self.min} and max {self.max}: change one of them"
            )
        return self

    def member(self, index: int) -> DrafterConfig:
        """The drafter NAME-`index`. The first `count` of them divide the pool's cores; those beyond sit beside them, in turn."""
        of = self.count or 1
        cores = share_of(self.placement.cores, index % of, of)
        return DrafterConfig(
            name=f"{self.name}-{index}",
            method=self.method,
            model=self.model,
            layers=self.layers,
            dtype=self.dtype,
            device=self.device,
            width=self.width,
            placement=self.placement.model_copy(update={"cores": cores}),
        )


class TlsConfig(Strict):
    """PEM files, on every node at the same path; under `security`, "{role}" in a path stands for target, drafter or gateway. Made by
    `outrider certs`."""

    ca: Path
    cert: Path
    key: Path


class GatewayConfig(Strict):
    """The OpenAI-compatible HTTP server: one on each of `nodes` (IP addresses; none: one, wherever Ray puts it)."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    nodes: tuple[str, ...] = ()
    served_model: str = Field(
        default="", description="name that clients ask for; default: the model's own"
    )
    api_keys: Path | None = Field(default=None, description="file of `NAME:KEY[:MODEL,...]` lines")
    tls: TlsConfig | None = None
    insecure: bool = Field(default=False, description="allow a public address without keys or TLS")


class LimitsConfig(Strict):
    """Of the gateway. What is beyond is refused early, never dropped later."""

    requests: int = Field(
        default=256, ge=1, description="under way at one time in one gateway; beyond: 503"
    )
    per_key: int = Field(default=64, ge=1, description="of one key at one time; beyond: 429")
    request_seconds: float = Field(
        default=600.0, gt=0, description="deadline of a request that names none"
    )
    strict: bool = Field(
        default=True, description="refuse unknown fields; else they are ignored and counted"
    )


class SecurityConfig(Strict):
    """Between actors. Without `tls` they talk in the clear: for a machine or a network of one's own."""

    tls: TlsConfig | None = None


class Deployment(Strict):
    """Everything that is served together."""

    target: TargetConfig
    pools: tuple[PoolConfig, ...] = ()
    gateway: GatewayConfig = GatewayConfig()
    limits: LimitsConfig = LimitsConfig()
    security: SecurityConfig = SecurityConfig()

    @field_validator("pools")
    @classmethod
    def distinct(cls, pools: tuple[PoolConfig, ...]) -> tuple[PoolConfig, ...]:
        twice = [name for name, count in Counter(pool.name for pool in pools).items() if count > 1]
        if twice:
            raise ValueError(f"name {twice[0]!r} is given twice: name each pool differently")
        return pools

    @model_validator(mode="after")
    def unmistakable(self) -> Self:
        for name in {pool.name for pool in self.pools} & {
            head.method for head in self.target.heads
        }:
            raise ValueError(f"name {name!r} is that of a head: name the pool differently")
        return self

    def served_model(self) -> str:
        """What clients ask for: as configured; else the model's name on the hub, or the last part of its folder's."""
        model = self.target.model
        return self.gateway.served_model or (
            Path(model).resolve().name if Path(model).is_dir() else model
        )

    def drafters(self) -> tuple[DrafterConfig, ...]:
        """Those that there are at first, pool after pool."""
        return tuple(pool.member(index) for pool in self.pools for index in range(pool.count))


def methods() -> list[str]:
    """Names of the drafting methods: the files in runtime/drafters."""
    return named_files(runtime.drafters.__path__)


def heads() -> list[str]:
    """Names of the heads: the files in runtime/heads."""
    return named_files(runtime.heads.__path__)


def named_files(folders: Iterable[str]) -> list[str]:
    return sorted(
        module.name.replace("_", "-")
        for module in pkgutil.iter_modules(folders)
        if module.name != "base"
    )


def module_of(method: str) -> str:
    """The file's name of a drafting method or a head."""
    return method.replace("-", "_")


def shipped(name: Literal["target", "draft"]) -> str:
    """Folder of a model that comes with the project."""
    return str(importlib.resources.files("models") / name)


def folder_of(head: HeadConfig) -> Path | None:
    """As configured, or of the head that comes with the project, trained for the target that does; None where none does."""
    folder = Path(head.folder or str(importlib.resources.files("models") / "heads" / head.method))
    return folder if head.folder or folder.is_dir() else None


def draft_of(drafter: DrafterConfig | PoolConfig) -> str:
    """The model, or the folder of what was trained, that it drafts with: as configured, or what comes with the project for its method."""
    folder = importlib.resources.files("models") / drafter.method
    return drafter.model or (str(folder) if folder.is_dir() else "")


def trained_as(folder: str) -> str:
    """The method that something was trained for; nothing for any other folder or name."""
    try:
        return str(json.loads((Path(folder) / "config.json").read_bytes())["method"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def head_of(draft: str) -> HeadConfig | None:
    """The head that is meant: by its name, or by a folder that was trained to be one. None for what is a drafter or a model."""
    if draft in heads():
        return HeadConfig(method=draft)
    method = trained_as(draft)
    return HeadConfig(method=method, folder=draft) if method in heads() else None


def drafter_of(draft: str) -> tuple[str, str, tuple[int, ...]]:
    """Method, model and layers of what is no head: a method's name, what was tuned or trained for one, or a model."""
    if layers := layers_of(draft):
        return "layer-skip", "", layers
    if draft in methods() and draft != "model":
        return draft, "", ()
    method = trained_as(draft)
    return method if method in methods() else "model", draft, ()


def layers_of(draft: str) -> tuple[int, ...]:
    """What `outrider tune layers` has written into a file; empty for anything else."""
    try:
        found = json.loads(Path(draft).read_bytes())
        layers = tuple(int(layer) for layer in found["layers"])
    except (OSError, ValueError, LookupError, TypeError):
        return ()
    return layers if found.get("method") == "layer-skip" else ()


def deployment(
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
    whole("drafters", drafters, 0, MOST_DRAFTERS)
    mounted = {draft: head for draft in drafts if (head := head_of(draft)) is not None}
    apart = [draft for draft in drafts if draft not in mounted]
    mine, *shares = (
        split_cores(sorted(os.sched_getaffinity(0)), len(apart))
        if local
        else [()] * (len(apart) + 1)
    )
    pools: list[PoolConfig] = []
    for draft, cores in zip(apart, shares, strict=True):
        method, model, layers = drafter_of(draft)
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


def pool_name(draft: str, taken: Container[str]) -> str:
    """The last part of a model's name, as far as a pool may be called so; with a number where it is taken already."""
    stem = re.sub(r"[^a-z0-9._-]+", "-", Path(draft).name.lower()).lstrip("._-")[:32] or "draft"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken and name not in ROLES)


def cache_folder() -> Path:
    """What this project keeps between its runs: beside the user's other caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outrider"


def memory_of(model: str, role: Literal["target", "drafter"], method: str = "") -> Path:
    """The file in which a target or a drafter keeps what it has learned of one model."""
    name = hashlib.sha256(
        f"{Path(model).resolve() if Path(model).is_dir() else model}\n{method}".encode()
    ).hexdigest()[:16]
    return cache_folder() / f"{role}-{name}.json"


def memory_of_drafter(config: DrafterConfig, target: str) -> Path:
    """As memory_of: what this kind of drafter has learned of this target."""
    return memory_of(
        target,
        "drafter",
        f"{config.method} {config.model}" + "".join(f" {layer}" for layer in config.layers),
    )


def read(file: Path) -> Deployment:
    """A deployment from a YAML file. Raises InvalidRequest that names the first wrong key or value."""
    try:
        return Deployment.model_validate(yaml.safe_load(file.read_text()))
    except FileNotFoundError as error:
        raise InvalidRequest(
            f"{file} does not exist: give the path of a deployment file", "config"
        ) from error
    except OSError as error:
        raise InvalidRequest(
            f"{file} cannot be read ({error.strerror}): give the path of a deployment file",
            "config",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"{file} is not YAML: {str(error).splitlines()[0]}", "config"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{file}: {where or 'content'}: {first['msg']}", "config") from error
