"""Fixtures of the target's tests."""

import pytest

from tests.contracts.link_contract import TRANSPORTS, Attach


@pytest.fixture(params=TRANSPORTS)
def attach(request: pytest.FixtureRequest) -> Attach:
    return TRANSPORTS[request.param]
