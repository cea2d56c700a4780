"""What is started where. Checked here, at the edge; trusted inside. The only place that reads files or the machine's shape."""

import hashlib
import importlib.resources
import os
import pkgutil
from collections import Counter
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import runtime.drafters
from runtime.errors import InvalidRequest
from runtime.sampling import whole

Device = Literal["auto", "cpu", "cuda"]
MOST_DRAFTERS = 64
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Policy = Literal["living", "plain", "sync", "amusd", "pearl"]
LANES = ("target", "wire")  # of a trace; every other lane is a drafter's


class Strict(BaseModel):
    """Unknown keys are errors; values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Placement(Strict):
    """Where an actor runs: what it takes from Ray, and what it uses of the machine it lands on."""

    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    resources: dict[str, float] = {}
    node: str | None = Field(default=None, description="IP address of the node; default: Ray chooses")
    cores: tuple[int, ...] = Field(default=(), description="CPU cores to stay on; default: all")
    threads: int | None = Field(default=None, ge=1, description="torch threads; default: as many as cores")
    listen: str = Field(default="", description="IP address that its gRPC server binds; default: that of its Ray node")


class ScheduleConfig(Strict):
    """When the target verifies what (runtime/schedulers). The living tree is the product; the others are what it is compared with.

    `width`, `branches`, `passes` and `rows` shape the tree of `sync`; `passes` is also the gamma of `pearl`.
    """

    policy: Policy = "living"
    width: int = Field(default=1, ge=1, le=64)
    branches: int = Field(default=1, ge=1, le=64)
    passes: int = Field(default=4, ge=1, le=32)
    rows: int = Field(default=4, ge=1, le=64)


class TargetConfig(Strict):
    model: str
    dtype: Dtype = "auto"
    device: Device = "auto"
    schedule: ScheduleConfig = ScheduleConfig()
    kv_tokens: int | None = Field(default=None, ge=128, description="tokens that fit its KV memory; default: a quarter of what is free")
    replicas: int = Field(default=1, ge=0, le=64)
    placement: Placement = Placement()


class DrafterConfig(Strict):
    """`method` is a file in runtime/drafters; `model` the draft model of the methods that have one."""

    name: str
    method: str = "model"
    model: str = ""
    dtype: Dtype = "auto"
    device: Device = "auto"
    width: int | None = Field(
        default=None, ge=1, le=64, description="leaves expanded in one forward pass; default: as many as cost little more than one"
    )
    placement: Placement = Placement()

    @field_validator("name")
    @classmethod
    def free(cls, name: str) -> str:
        if name in LANES:
            raise ValueError(f"{name!r} has a meaning of its own in traces: give the drafter another name")
        return name

    @field_validator("method")
    @classmethod
    def known(cls, method: str) -> str:
        if method not in methods():
            raise ValueError(f"{method!r} is no drafting method: give one of {', '.join(methods())}")
        return method


class PoolConfig(Strict):
    """Drafters of one kind, as many as are wanted at the time. Its drafters are called NAME-0, NAME-1, ...

    `min` and `max` bound how many there are; `count` is how many there are at first, and stays unless `auto` is set or somebody scales.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,40}$")
    method: str = "model"
    model: str = ""
    dtype: Dtype = "auto"
    device: Device = "auto"
    width: int | None = Field(default=None, ge=1, le=64)
    min: int = Field(default=0, ge=0, le=MOST_DRAFTERS)
    max: int = Field(default=MOST_DRAFTERS, ge=0, le=MOST_DRAFTERS)
    count: int = Field(default=1, ge=0, le=MOST_DRAFTERS)
    auto: bool = Field(default=False, description="between min and max by what one more drafter brings")
    placement: Placement = Placement()


class TlsConfig(Strict):
    """PEM files, on every node at the same path. Made by `outrider certs`."""

    ca: Path
    cert: Path
    key: Path


class GatewayConfig(Strict):
    """The OpenAI-compatible HTTP server: one on each of `nodes` (IP addresses; none: one, wherever Ray puts it)."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    nodes: tuple[str, ...] = ()
    served_model: str = Field(default="", description="name that clients ask for; default: the model's own")
    api_keys: Path | None = Field(default=None, description="file of `NAME:KEY[:MODEL,...]` lines")
    tls: TlsConfig | None = None
    insecure: bool = Field(default=False, description="allow a public address without keys or TLS")


class LimitsConfig(Strict):
    """Of the gateway. What is beyond is refused early, never dropped later."""

    requests: int = Field(default=256, ge=1, description="under way at one time in one gateway; beyond: 503")
    per_key: int = Field(default=64, ge=1, description="of one key at one time; beyond: 429")
    request_seconds: float = Field(default=600.0, gt=0, description="deadline of a request that names none")
    strict: bool = Field(default=True, description="refuse unknown fields; else they are ignored and counted")


class SecurityConfig(Strict):
    """Between actors. Without `tls` they talk in the clear: for a machine or a network of one's own."""

    tls: TlsConfig | None = None


class Deployment(Strict):
    target: TargetConfig
    pools: tuple[PoolConfig, ...] = ()
    gateway: GatewayConfig = GatewayConfig()
    limits: LimitsConfig = LimitsConfig()
    security: SecurityConfig = SecurityConfig()
    drafters: tuple[DrafterConfig, ...] = ()

    @field_validator("drafters")
    @classmethod
    def distinct(cls, drafters: tuple[DrafterConfig, ...]) -> tuple[DrafterConfig, ...]:
        twice = [name for name, count in Counter(drafter.name for drafter in drafters).items() if count > 1]
        if twice:
            raise ValueError(f"name {twice[0]!r} is given twice: name each drafter differently")
        return drafters


def methods() -> list[str]:
    """Names of the drafting methods: the files in runtime/drafters."""
    return sorted(module.name for module in pkgutil.iter_modules(runtime.drafters.__path__) if module.name != "base")


def shipped(name: Literal["target", "draft"]) -> str:
    """Folder of a model that comes with the project."""
    return str(importlib.resources.files("models") / name)


def deployment(
    target: str, drafts: tuple[str, ...], drafters: int, dtype: Dtype, device: Device, local: bool, policy: Policy = "living"
) -> Deployment:
    """`drafters` actors for each of `drafts` (a method's name or a model), beside one target.

    With `local`, target and drafters share this machine's cores between them and listen on loopback alone.
    """
    listen = "127.0.0.1" if local else ""
    whole("drafters", drafters, 0, MOST_DRAFTERS)
    count = len(drafts) * drafters
    cores = split_cores(sorted(os.sched_getaffinity(0)), count) if local else [()] * (count + 1)
    found: list[DrafterConfig] = []
    alike: Counter[str] = Counter()  # folders of different models may end in the same name
    for draft in drafts:
        method, model = (draft, "") if draft in methods() and draft != "model" else ("model", draft)
        stem = Path(draft).name
        for _ in range(drafters):
            name = f"{stem}-{alike[stem]}"
            alike[stem] += 1
            place = Placement(cores=cores[len(found) + 1], listen=listen)
            found.append(DrafterConfig(name=name, method=method, model=model, dtype=dtype, device=device, placement=place))
    return Deployment(
        target=TargetConfig(
            model=target,
            dtype=dtype,
            device=device,
            schedule=ScheduleConfig(policy=policy),
            placement=Placement(cores=cores[0], listen=listen),
        ),
        drafters=tuple(found),
    )


def split_cores(cores: list[int], drafters: int) -> list[tuple[int, ...]]:
    """Cores of the target, then of each drafter: the target has half of them, the drafters share the rest in turn.

    With a single core all use it; without drafters the target has one half too, so that a comparison is fair.
    """
    half = max(1, len(cores) // 2)
    mine, rest = cores[:half], cores[half:] or cores
    shares = [tuple(rest[i::drafters]) or (rest[i % len(rest)],) for i in range(drafters)]
    return [tuple(mine), *shares]


def memory_of(model: str, role: Literal["target", "drafter"], method: str = "") -> Path:
    """The file in which a target or a drafter keeps what it has learned: of one model, beside the user's other caches."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    name = hashlib.sha256(f"{Path(model).resolve() if Path(model).is_dir() else model}\n{method}".encode()).hexdigest()[:16]
    return Path(base) / "outrider" / f"{role}-{name}.json"


def memory_of_drafter(config: DrafterConfig, target: str) -> Path:
    """As memory_of: what this kind of drafter has learned of this target."""
    return memory_of(target, "drafter", f"{config.method} {config.model}")


def read(file: Path) -> Deployment:
    """A deployment from a YAML file. Raises InvalidRequest that names the first wrong key or value."""
    try:
        return Deployment.model_validate(yaml.safe_load(file.read_text()))
    except FileNotFoundError as error:
        raise InvalidRequest(f"{file} does not exist: give the path of a deployment file", "config") from error
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read ({error.strerror}): give the path of a deployment file", "config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file} is not YAML: {str(error).splitlines()[0]}", "config") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{file}: {where or 'content'}: {first['msg']}", "config") from error
