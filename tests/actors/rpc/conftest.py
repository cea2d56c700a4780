"""Fixtures for the RPC tests."""

import pytest

from actors.rpc.certificate_authority import CertificateAuthority
from runtime.config import TlsConfig
from tests.support.certificates import NOW, write_certificates


@pytest.fixture
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    """Writes the certificates of one deployment and returns their paths.

    Each test has its own, which takes milliseconds: `make mutants` tries a mutant of the authority
    on those tests alone that have called it.
    """
    return write_certificates(
        tmp_path_factory.mktemp("certs"), CertificateAuthority("ours", NOW, 30)
    )
