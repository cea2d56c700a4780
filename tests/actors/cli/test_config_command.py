"""`outrider config` prints an example that names every field and checks a deployment file."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from runtime.config import Deployment
from tests.support.command import assert_one_error_line, outrider


def test_the_example_is_a_deployment_and_names_every_field(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outrider(monkeypatch, "config", "--example") == 0
    example = yaml.safe_load(capsys.readouterr().out)
    found = Deployment.model_validate(example)
    named: dict[type[BaseModel], set[str]] = {}
    name_fields(Deployment, example, named)
    assert {
        kind: set(kind.model_fields) - fields
        for kind, fields in named.items()
        if set(kind.model_fields) != fields
    } == {}
    assert found.security.tls is not None


def name_fields(kind: type[BaseModel], given: Any, named: dict[type[BaseModel], set[str]]) -> None:
    """Collects the fields of each model that the file names."""
    for one in given if isinstance(given, list) else [given] if given is not None else []:
        named.setdefault(kind, set()).update(one)
        for name, field in kind.model_fields.items():
            if (inner := model_in(field.annotation)) is not None:
                name_fields(inner, one.get(name), named)


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the model inside an annotation such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(
        (
            kind
            for part in getattr(annotation, "__args__", ())
            if (kind := model_in(part)) is not None
        ),
        None,
    )


def test_a_deployment_file_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("target: {model: big}\npools: [{name: a, method: ngram}]\n")
    assert outrider(monkeypatch, "config", file) == 0
    assert "target big, 1 replicas; pools: a (1 of ngram)" in capsys.readouterr().out
    assert outrider(monkeypatch, "config", file, "--json") == 0
    assert Deployment.model_validate(json.loads(capsys.readouterr().out)).pools[0].name == "a"
    file.write_text("target: {model: big, modle: x}")
    assert outrider(monkeypatch, "config", file) == 2
    assert_one_error_line("target.modle", capsys)
    assert outrider(monkeypatch, "config") == 2
    assert_one_error_line("--example", capsys)
