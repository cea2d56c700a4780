"""What is started where: from flags, and from a file that a stranger may have written."""

import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from runtime.config import (
    Deployment,
    GatewayConfig,
    HeadConfig,
    Placement,
    PoolConfig,
    TargetConfig,
    load_deployment,
)
from runtime.core.cpu_partition import split_cores
from runtime.core.errors import InvalidRequest
from runtime.deployment_builder import build_deployment
from runtime.method_registry import drafting_methods, head_methods
from runtime.model_paths import (
    bundled_model,
    default_drafts,
    head_folder,
)


def named(*drafts: str, drafters: int = 1) -> list[str]:
    return [
        drafter.name
        for drafter in build_deployment(
            "t", drafts, drafters, "auto", "cpu", local=False
        ).drafters()
    ]


def test_the_methods_are_the_files() -> None:
    assert {"model", "ngram", "noisy"} <= set(drafting_methods())
    assert "base" not in drafting_methods()


def test_the_heads_are_the_files_and_sit_on_the_target(tmp_path: Path) -> None:
    assert {"ngram-head", "token-recycling", "medusa", "hidden-transfer"} <= set(head_methods())
    trained, model = tmp_path / "trained", tmp_path / "model"
    for folder, config in ((trained, {"method": "medusa"}), (model, {"model_type": "llama"})):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    made = build_deployment(
        "big",
        ("token-recycling", "small", str(trained), "medusa", str(model)),
        2,
        "auto",
        "cpu",
        local=True,
    )
    assert made.target.named_heads() == {
        "token-recycling-0": HeadConfig(method="token-recycling"),
        "medusa-0": HeadConfig(method="medusa", folder=str(trained)),
        "medusa-1": HeadConfig(method="medusa"),
    }
    assert [pool.name for pool in made.pools] == ["small", "model"]
    assert head_folder(HeadConfig(method="token-recycling")) is None
    assert head_folder(HeadConfig(method="medusa", folder="x")) == Path("x")


def test_a_pool_is_not_called_as_a_head_is() -> None:
    mounted = TargetConfig(model="t", heads=(HeadConfig(method="medusa"),))
    with pytest.raises(ValidationError, match="'medusa' is the name of a head"):
        Deployment(target=mounted, pools=(PoolConfig(name="medusa", method="ngram"),))
    made = build_deployment("big", ("medusa", "org/medusa"), 1, "auto", "cpu", local=False)
    assert [pool.name for pool in made.pools] == ["medusa-2"]
    with pytest.raises(ValidationError, match="unknown head 'ngram'"):
        HeadConfig(method="ngram")


def test_a_draft_is_a_method_or_a_model() -> None:
    made = build_deployment(
        "big", ("ngram", "org/small", "model"), 1, "float32", "cpu", local=False
    )
    assert made.target == TargetConfig(model="big", dtype="float32", device="cpu")
    assert [(drafter.name, drafter.method, drafter.model) for drafter in made.drafters()] == [
        ("ngram-0", "ngram", ""),
        ("small-0", "model", "org/small"),
        ("model-0", "model", "model"),
    ]
    assert {(drafter.dtype, drafter.device) for drafter in made.drafters()} == {("float32", "cpu")}


def test_names_are_distinct_whatever_is_asked_for() -> None:
    assert named("small", drafters=3) == ["small-0", "small-1", "small-2"]
    assert named("small", "small") == ["small-0", "small-2-0"]
    assert named("a/small", "b/small", drafters=2) == [
        "small-0",
        "small-1",
        "small-2-0",
        "small-2-1",
    ]
    assert named("small", "small-2", "b/small") == ["small-0", "small-2-0", "small-3-0"]
    assert named("Org/Big_Model v2", "target", "___", drafters=1) == [
        "big_model-v2-0",
        "target-2-0",
        "draft-0",
    ]
    assert named() == []


def test_on_one_machine_the_cores_are_shared_and_nothing_listens_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1, 2, 0})
    made = build_deployment("big", ("small", "ngram"), 1, "auto", "auto", local=True)
    assert [
        made.target.placement.cores,
        *(drafter.placement.cores for drafter in made.drafters()),
    ] == [(0, 1), (2,), (3,)]
    assert {
        made.target.placement.listen,
        *(drafter.placement.listen for drafter in made.drafters()),
    } == {"127.0.0.1"}
    spread = build_deployment("big", ("small",), 2, "auto", "auto", local=False)
    assert {made.target.placement.num_cpus, *(pool.placement.num_cpus for pool in made.pools)} == {
        0
    }
    assert [spread.target.placement, *(drafter.placement for drafter in spread.drafters())] == [
        Placement()
    ] * 3


@pytest.mark.parametrize(
    ("cores", "pools", "shares"),
    [
        ([0], 1, [(0,), (0,)]),
        ([0, 1], 0, [(0,)]),
        ([0, 1], 1, [(0,), (1,)]),
        ([0, 1], 3, [(0,), (1,), (1,), (1,)]),
        ([4, 5, 6, 7], 2, [(4, 5), (6,), (7,)]),
        ([0, 1, 2, 3, 4, 5, 6, 7], 3, [(0, 1, 2, 3), (4, 7), (5,), (6,)]),
    ],
)
def test_split_cores(cores: list[int], pools: int, shares: list[tuple[int, ...]]) -> None:
    assert split_cores(cores, pools) == shares


@pytest.mark.parametrize(
    ("cores", "count", "shares"),
    [
        ((), 2, [(), (), ()]),
        ((4, 5, 6, 7), 3, [(4, 7), (5,), (6,), (4, 7)]),
        ((4,), 2, [(4,), (4,), (4,)]),
        ((4, 5), 0, [(4, 5), (4, 5)]),
    ],
)
def test_the_members_of_a_pool_divide_its_cores_and_those_beyond_its_count_sit_beside_them(
    cores: tuple[int, ...], count: int, shares: list[tuple[int, ...]]
) -> None:
    pool = PoolConfig(
        name="small",
        model="m",
        width=3,
        dtype="float32",
        count=count,
        placement=Placement(cores=cores, num_gpus=0.5),
    )
    members = [pool.member(index) for index in range(len(shares))]
    assert [member.placement.cores for member in members] == shares
    assert [member.name for member in members] == [f"small-{index}" for index in range(len(shares))]
    assert {
        (member.model, member.width, member.dtype, member.placement.num_gpus) for member in members
    } == {("m", 3, "float32", 0.5)}


def test_what_clients_ask_for(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert Deployment(target=TargetConfig(model=str(tmp_path / "mine"))).served_model() == "mine"
    assert Deployment(target=TargetConfig(model="org/big")).served_model() == "org/big"
    assert (
        Deployment(
            target=TargetConfig(model="org/big"), gateway=GatewayConfig(served_model="other")
        ).served_model()
        == "other"
    )


def test_the_shipped_pair_lies_in_the_project() -> None:
    for name in ("target", "draft"):
        assert (Path(bundled_model(name)) / "tokenizer.json").is_file()


GOOD = """
target:
  model: big
  dtype: float32
  placement: {num_gpus: 0.5, resources: {fast: 1}, cores: [0, 1]}
pools:
  - {name: a, model: small, width: 8, count: 2, min: 1, max: 4, auto: true}
  - {name: b, method: ngram, placement: {node: 10.0.0.7, listen: 10.0.0.7, threads: 2}}
"""


def test_a_deployment_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(GOOD)
    assert load_deployment(file) == Deployment(
        target=TargetConfig(
            model="big",
            dtype="float32",
            placement=Placement(num_gpus=0.5, resources={"fast": 1.0}, cores=(0, 1)),
        ),
        pools=(
            PoolConfig(name="a", model="small", width=8, count=2, min=1, max=4, auto=True),
            PoolConfig(
                name="b",
                method="ngram",
                placement=Placement(node="10.0.0.7", listen="10.0.0.7", threads=2),
            ),
        ),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "content"),
        ("- 1", "content"),
        ("target: {model: big", "invalid YAML"),
        ("\x00", "invalid YAML"),
        ("pools: []", "target: Field required"),
        ("target: {model: big, dtyp: float32}", "target.dtyp: Extra inputs"),
        ("target: {model: big, dtype: float64}", "target.dtype: Input should be"),
        ("target: {model: big, placement: {num_cpus: -1}}", "target.placement.num_cpus"),
        ("target: {model: big}\npools: [{name: a, width: 0}]", "pools.0.width"),
        (
            "target: {model: big}\npools: [{name: a, method: telepathy}]",
            "unknown drafting method 'telepathy': give one of",
        ),
        ("target: {model: big}\npools: [{name: a}, {name: a}]", "duplicate pool name 'a'"),
        (
            "target: {model: big}\npools: [{name: target}]",
            "pool name 'target' is reserved",
        ),
        ("target: {model: big}\npools: [{name: A b}]", "pools.0.name"),
        (
            "target: {model: big}\npools: [{name: a, min: 2}]",
            "count 1 is not between min 2 and max 64",
        ),
        ("target: {model: big}\npools: [{name: a, count: 65}]", "pools.0.count"),
        ("target: {model: big}\ndrafters: [{name: a}]", "drafters: Extra inputs"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        load_deployment(file)
    assert says in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.param == "config"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="does not exist"):
        load_deployment(tmp_path / "none.yaml")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_deployment(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"target: \xff")
    with pytest.raises(InvalidRequest, match="invalid YAML"):
        load_deployment(tmp_path / "latin.yaml")


def test_values_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Placement().cores = (1,)  # type: ignore[misc]


def test_what_drafts_for_a_target_by_default(tmp_path: Path) -> None:
    assert default_drafts(None) == default_drafts(bundled_model("target"))
    assert default_drafts(None) == (bundled_model("draft"),)
    for target in (str(tmp_path), "smollm2-135m"):
        assert default_drafts(target) == ("ngram-head", "token-recycling")
