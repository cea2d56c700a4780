"""A certificate names its role and its uses; unusable files are refused by name."""

import asyncio
import datetime
import logging
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from actors.rpc.certificate_authority import CertificateAuthority
from actors.rpc.tls import ROLES, read_credentials, role_uri, roles_in, warn_if_plaintext
from runtime.config import TlsConfig
from runtime.core.errors import InvalidRequest
from tests.support.certificates import NOW, write_certificates
from tests.support.fakes import HOST


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"cert": "nowhere.pem"},
            r"nowhere\.pem cannot be read \(No such file or directory\): give",
        ),
        ({"ca": "noise.pem"}, "noise.pem, .* is invalid"),
        ({"cert": "noise.pem"}, "is invalid"),
        ({"key": "noise.pem"}, "is invalid"),
        ({"key": "{role}.pem"}, "is invalid"),
        ({"key": "drafter-key.pem"}, r"drafter-key\.pem is not the key of .*target\.pem: give"),
        (
            {"cert": "gateway.pem", "key": "gateway-key.pem"},
            "is for role gateway, not target: write {role} into the path",
        ),
        ({"cert": "https.pem", "key": "https-key.pem"}, "is for role none, not target"),
        ({"cert": "ca.pem"}, "is invalid"),
    ],
)
def test_unusable_files_are_named_in_the_error(
    files: dict[str, str], message: str, tls: TlsConfig
) -> None:
    folder = tls.ca.parent
    (folder / "noise.pem").write_text("noise")
    with pytest.raises(InvalidRequest, match=message) as caught:
        read_credentials(
            tls.model_copy(update={name: folder / file for name, file in files.items()}), "target"
        )
    assert "\n" not in str(caught.value)


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    past = write_certificates(
        tmp_path, CertificateAuthority("past", NOW - datetime.timedelta(days=40), 30)
    )
    with pytest.raises(InvalidRequest, match=r"expired on \d{4}-\d\d-\d\d: make new ones"):
        read_credentials(past, "drafter")


def test_roles_are_read_from_uris_alone() -> None:
    names = [
        role_uri("target", "a"),
        "outrider://gateway/b",
        "drafter.outrider.internal",
        "https://x/outrider://drafter/c",
        "outrider://root/d",
    ]
    assert roles_in(names) == {"target", "gateway"}
    assert (
        roles_in(["outrider://Target/a", "outrider:/target", "", "outrider://targets/a"]) == set()
    )


def extension(
    certificate: x509.Certificate, kind: type[x509.ExtensionType]
) -> x509.Extension[x509.ExtensionType]:
    return certificate.extensions.get_extension_for_class(kind)


def test_certificates_have_the_right_extensions_and_validity(tls: TlsConfig) -> None:
    signed = {
        name: x509.load_pem_x509_certificate(tls.ca.with_name(f"{name}.pem").read_bytes())
        for name in (*ROLES, "https", "ca")
    }
    assert len({certificate.serial_number for certificate in signed.values()}) == 5
    for name, certificate in signed.items():
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert key.curve.name == "secp256r1"
        basic, usage = (
            extension(certificate, x509.BasicConstraints),
            extension(certificate, x509.KeyUsage),
        )
        assert basic.critical
        assert usage.critical
        assert basic.value == x509.BasicConstraints(
            ca=name == "ca", path_length=0 if name == "ca" else None
        )
        assert isinstance(usage.value, x509.KeyUsage)
        assert (usage.value.key_cert_sign, usage.value.digital_signature) == (
            name == "ca",
            name != "ca",
        )
        assert NOW - datetime.timedelta(hours=2) < certificate.not_valid_before_utc < NOW
        assert certificate.not_valid_after_utc == NOW.replace(microsecond=0) + datetime.timedelta(
            days=30
        )


def test_a_browser_trusts_the_gateway_certificate(tls: TlsConfig) -> None:
    async def main() -> None:
        own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own.load_cert_chain(tls.ca.with_name("https.pem"), tls.ca.with_name("https-key.pem"))
        theirs = ssl.create_default_context(cafile=tls.ca)
        theirs.verify_flags |= ssl.VERIFY_X509_STRICT
        server = await asyncio.start_server(lambda _, writer: writer.close(), HOST, 0, ssl=own)
        port = server.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection(HOST, port, ssl=theirs)
        writer.close()
        with pytest.raises(ssl.SSLCertVerificationError, match="match"):
            await asyncio.open_connection(
                HOST, port, ssl=theirs, server_hostname="elsewhere.example"
            )
        server.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("nodes", "lines"), [(["a", "b", "a"], 1), (["a", "a"], 0), (["", "b"], 0), ([], 0)]
)
def test_several_nodes_without_tls_log_one_warning(
    nodes: list[str], lines: int, tls: TlsConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_if_plaintext(nodes, tls)
        assert caplog.records == []
        warn_if_plaintext(nodes, None)
    assert len(caplog.records) == lines
