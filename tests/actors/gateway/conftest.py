"""Fixtures for the gateway tests."""

from collections.abc import Iterator

import pytest

from actors.gateway.api_keys import ApiKeys
from tests.support.gateway import Running, Scripted, never, serving
from tests.support.raw_http import KEY, OTHER_KEY


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> ApiKeys:
    """Makes one key for all models and one for another model."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"all:{KEY}\nsome:{OTHER_KEY}:another-model\n")
    file.chmod(0o600)
    return ApiKeys(file)


@pytest.fixture(scope="module")
def gateway(keys: ApiKeys) -> Iterator[Running]:
    """Serves a target that never answers, and at the end waits until no connection is left."""
    with serving(Scripted(never), keys=keys) as running:
        yield running
        running.eventually(lambda: not running.connections())
