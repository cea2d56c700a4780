"""Defines and validates a deployment: its models, drafters, schedule, gateway and placement.

Values are checked here, at the edge, and trusted everywhere else.
"""

from collections import Counter
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

from runtime.core import limits
from runtime.core.cpu_partition import share_of
from runtime.core.errors import InvalidRequest
from runtime.method_registry import drafting_methods, head_methods

Device = Literal["auto", "cpu", "cuda"]
MAX_DRAFTERS = 64
POOL_NAME = r"^[a-z0-9][a-z0-9._-]{0,40}$"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Policy = Literal["living", "plain", "sync", "amusd", "pearl"]
# Drafting methods whose model is a folder trained for this target
TRAINED_METHODS = frozenset({"block", "eagle", "s3d"})
LANES = ("target", "wire")  # trace lanes that do not belong to a drafter
ROLES = (*LANES, "controller", "gateway")  # names that a pool cannot have


class StrictModel(BaseModel):
    """Rejects unknown keys; instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Placement(StrictModel):
    """Says where an actor runs: the resources it reserves in Ray, and what it uses on its
    machine.
    """

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


class ScheduleConfig(StrictModel):
    """Selects the scheduling policy of a target (runtime/schedulers).

    `living` is the product; the other policies are baselines. `width`, `branches`, `passes` and
    `rows` shape the tree of `sync`; `passes` is also the gamma of `pearl`.
    """

    policy: Policy = "living"
    width: int = Field(default=1, ge=1, le=64)
    branches: int = Field(default=1, ge=1, le=64)
    passes: int = Field(default=4, ge=1, le=32)
    rows: int = Field(default=4, ge=1, le=64)


def check_head_method(method: str) -> str:
    if method not in head_methods():
        raise ValueError(f"unknown head {method!r}: give one of {', '.join(head_methods())}")
    return method


class HeadConfig(StrictModel):
    """Configures one head of a target.

    Heads are named METHOD-0, METHOD-1, ... `folder` holds the weights trained for this target; by
    default the bundled ones are used.
    """

    method: Annotated[
        str, AfterValidator(check_head_method), Field(description="a file in runtime/heads")
    ]
    folder: str = ""


class TargetConfig(StrictModel):
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


def check_method(method: str) -> str:
    if method not in drafting_methods():
        raise ValueError(
            f"unknown drafting method {method!r}: give one of {', '.join(drafting_methods())}"
        )
    return method


Method = Annotated[
    str, AfterValidator(check_method), Field(description="a file in runtime/drafters")
]


Layers = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    Field(
        description="of the target, for layer-skip (`outrider tune layers`); default: every second"
    ),
]


class DrafterConfig(StrictModel):
    """Configures one drafter.

    `model` is the draft model, for methods that have one, or the folder trained for this target.
    """

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
        description="leaves expanded in one forward pass; default: as many as cost little extra",
    )
    placement: Placement = Placement()

    @field_validator("name")
    @classmethod
    def free(cls, name: str) -> str:
        if name in LANES:
            raise ValueError(f"drafter name {name!r} is reserved in traces: give another name")
        return name


class PoolConfig(StrictModel):
    """Configures a pool of equal drafters, named NAME-0, NAME-1, ...

    The pool starts with `count` drafters. The number changes only by `outrider scale`, or with
    `auto` on, and stays between `min` and `max`.
    """

    name: str = Field(pattern=POOL_NAME)
    method: Method = "model"
    model: str = Field(
        default="",
        description="draft model (folder, .gguf file, name), or the folder trained for the method",
    )
    layers: Layers = ()
    dtype: Dtype = "auto"
    device: Device = "auto"
    width: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="leaves expanded in one forward pass; default: as many as cost little extra",
    )
    min: int = Field(default=0, ge=0, le=MAX_DRAFTERS)
    max: int = Field(default=MAX_DRAFTERS, ge=0, le=MAX_DRAFTERS)
    count: int = Field(default=1, ge=0, le=MAX_DRAFTERS)
    auto: bool = Field(
        default=False, description="between min and max by what one more drafter brings"
    )
    placement: Placement = Placement()

    @field_validator("name")
    @classmethod
    def free(cls, name: str) -> str:
        if name in ROLES:
            raise ValueError(f"pool name {name!r} is reserved: give another name")
        return name

    @model_validator(mode="after")
    def ordered(self) -> Self:
        if not self.min <= self.count <= self.max:
            raise ValueError(
                f"count {self.count} is not between min {self.min} and max {self.max}: "
                "change one of them"
            )
        return self

    def member(self, index: int) -> DrafterConfig:
        """Return the configuration of drafter NAME-`index`.

        The first `count` drafters divide the cores of the pool; later ones share these cores in
        rotation.
        """
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


class TlsConfig(StrictModel):
    """Names PEM files, at the same path on every node. `outrider certs` makes them.

    Under `security`, "{role}" in a path stands for target, drafter or gateway.
    """

    ca: Path
    cert: Path
    key: Path


Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^\s/?#@,*A-Z]+)$")]


class GatewayConfig(StrictModel):
    """Configures the OpenAI-compatible HTTP server.

    One gateway runs on each of `nodes` (IP addresses). Without `nodes` a single one runs, wherever
    Ray places it.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    nodes: tuple[str, ...] = ()
    served_model: str = Field(
        default="", description="name that clients ask for; default: the model's own"
    )
    api_keys: Path | None = Field(default=None, description="file of `NAME:KEY[:MODEL,...]` lines")
    tls: TlsConfig | None = None
    insecure: bool = Field(default=False, description="allow a public address without keys or TLS")
    cors_origins: tuple[Origin, ...] = Field(
        default=(), description='of web pages that may use it; "*": of all'
    )


class LimitsConfig(StrictModel):
    """Limits the load of a gateway. Requests beyond a limit are refused early, never
    dropped later.
    """

    requests: int = Field(
        default=256, ge=1, description="under way at one time in one gateway; beyond: 503"
    )
    per_key: int = Field(default=64, ge=1, description="of one key at one time; beyond: 429")
    prompts: int = Field(
        default=128, ge=1, le=limits.PROMPTS, description="of one completion; beyond: 400"
    )
    prompt_ids: int = Field(
        default=1 << 18,
        ge=1,
        le=limits.PROMPT_IDS,
        description="token ids in all prompts of one completion; beyond: 400",
    )
    choices: int = Field(
        default=limits.CHOICES, ge=1, le=limits.CHOICES, description="n of a prompt; beyond: 400"
    )
    prompt_logprobs: int = Field(
        default=1 << 18,
        ge=1,
        description="log-probabilities of prompts in one answer (echo): prompt tokens times"
        " 1 + logprobs, of all choices; beyond: 400",
    )
    logprobs: int = Field(
        default=1 << 20,
        ge=1,
        description="log-probabilities of outputs under way at one time in one gateway, which"
        " answers may have to hold: max_tokens times 1 + logprobs, of all choices; beyond: 503,"
        " and 400 if one request is",
    )
    request_seconds: float = Field(
        default=600.0, gt=0, description="deadline of a request that names none"
    )
    strict: bool = Field(
        default=True, description="refuse unknown fields; else they are ignored and counted"
    )


class SecurityConfig(StrictModel):
    """Secures the connections between actors.

    Without `tls` they talk in plain text, which suits a single machine or a private network.
    """

    tls: TlsConfig | None = None


class Deployment(StrictModel):
    """Describes everything that is served together."""

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
            raise ValueError(f"duplicate pool name {twice[0]!r}: name each pool differently")
        return pools

    @model_validator(mode="after")
    def unmistakable(self) -> Self:
        for name in {pool.name for pool in self.pools} & {
            head.method for head in self.target.heads
        }:
            raise ValueError(f"pool name {name!r} is the name of a head: give another name")
        return self

    def served_model(self) -> str:
        """Return the model name that clients request.

        It is the configured name, or else the model's name on the hub or the last part of its
        folder's path, or of its file's without the ending.
        """
        model = self.target.model
        path = Path(model)
        if self.gateway.served_model or not path.exists():
            return self.gateway.served_model or model
        return path.stem if path.is_file() else path.resolve().name

    def drafters(self) -> tuple[DrafterConfig, ...]:
        """Return the drafters that exist at the start, pool by pool."""
        return tuple(pool.member(index) for pool in self.pools for index in range(pool.count))


def load_deployment(file: Path) -> Deployment:
    """Read a deployment from a YAML file.

    Raises InvalidRequest, which names the first wrong key or value.
    """
    try:
        return Deployment.model_validate(yaml.safe_load(file.read_text("utf-8")))
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
            f"{file}: invalid YAML: {str(error).splitlines()[0]}", "config"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{file}: {where or 'content'}: {first['msg']}", "config") from error
