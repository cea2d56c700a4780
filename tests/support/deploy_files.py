"""Lists and reads the files of deploy/."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
CLUSTERS = sorted((DEPLOY / "ray").glob("*.yaml"))
SCRIPTS = ("again", "certify", "keys", "leave", "node")
EXAMPLES = sorted((DEPLOY / "examples").glob("*.yaml"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def by_name(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", files, ids=lambda file: file.stem)


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    return content
