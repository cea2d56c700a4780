"""A certificate names its role and its uses; unusable files are refused by name."""

import asyncio
import datetime
import ipaddress
import logging
import ssl
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID as Purpose

from actors.rpc.certificate_authority import CertificateAuthority, general_name
from actors.rpc.tls import (
    ROLES,
    read_credentials,
    require_role,
    role_uri,
    roles_in,
    warn_if_plaintext,
)
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
    assert caught.value.param == "tls"


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
    assert [record.getMessage() for record in caplog.records] == [
        "actors on 2 nodes talk without TLS: set certificates under security.tls,"
        " or isolate the network"
    ] * lines


def test_a_certificate_says_who_it_is_and_what_it_is_for(tls: TlsConfig) -> None:
    """Nothing in it lets a leaf sign others, or a website act as an actor."""
    signed = {
        name: x509.load_pem_x509_certificate(tls.ca.with_name(f"{name}.pem").read_bytes())
        for name in (*ROLES, "https", "ca")
    }
    authority = signed["ca"]
    (deployment,) = {
        str(attribute.value).removesuffix(" authority") for attribute in authority.subject
    }
    for name, certificate in signed.items():
        said = "authority" if name == "ca" else name
        assert certificate.subject.rfc4514_string() == f"CN={deployment} {said}"
        assert certificate.issuer == authority.subject
        certificate.verify_directly_issued_by(authority)
        assert isinstance(certificate.signature_hash_algorithm, hashes.SHA256)
        own = x509.SubjectKeyIdentifier.from_public_key(certificate.public_key())
        above = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
        assert extension(certificate, x509.SubjectKeyIdentifier).value == own
        assert not extension(certificate, x509.SubjectKeyIdentifier).critical
        by = extension(certificate, x509.AuthorityKeyIdentifier)
        assert isinstance(by.value, x509.AuthorityKeyIdentifier)
        assert (by.value.key_identifier, by.critical) == (above.digest, False)
        usage = extension(certificate, x509.KeyUsage).value
        assert usage == x509.KeyUsage(
            digital_signature=name != "ca",
            key_cert_sign=name == "ca",
            crl_sign=name == "ca",
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        if name == "ca":
            continue
        purposes = extension(certificate, x509.ExtendedKeyUsage)
        wanted = [Purpose.SERVER_AUTH] + [Purpose.CLIENT_AUTH] * (name != "https")
        assert (purposes.value, purposes.critical) == (x509.ExtendedKeyUsage(wanted), False)
        names = extension(certificate, x509.SubjectAlternativeName)
        expected: list[x509.GeneralName] = (
            [x509.IPAddress(ipaddress.ip_address(HOST))]
            if name == "https"
            else [
                x509.UniformResourceIdentifier(f"outrider://{name}/{deployment}"),
                x509.DNSName(f"{name}.outrider.internal"),
            ]
        )
        assert (names.value, names.critical) == (x509.SubjectAlternativeName(expected), False)


def test_a_name_is_an_address_or_a_host() -> None:
    assert general_name("::1") == x509.IPAddress(ipaddress.ip_address("::1"))
    assert general_name("gateway.example") == x509.DNSName("gateway.example")
    with pytest.raises(ValueError, match="A-label"):
        general_name("größe.example")


def test_a_key_is_written_as_it_is_read_and_belongs_to_its_certificate() -> None:
    signed = CertificateAuthority("ours", NOW, 30).role("drafter")
    assert signed.key.startswith(b"-----BEGIN PRIVATE KEY-----\n")
    key = serialization.load_pem_private_key(signed.key, password=None)
    certificate = x509.load_pem_x509_certificate(signed.certificate)
    assert key.public_key() == certificate.public_key()


class Caller:
    """A call whose certificate has these alternative names; `refused` is how it was ended."""

    def __init__(self, *names: bytes) -> None:
        self.names, self.refused = names, list[tuple[grpc.StatusCode, str]]()

    def auth_context(self) -> dict[str, tuple[bytes, ...]]:
        return {"x509_subject_alternative_name": self.names} if self.names else {}

    async def abort(self, code: grpc.StatusCode, message: str) -> None:
        self.refused.append((code, message))
        raise grpc.aio.AbortError


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([b"outrider://gateway/a"], None),
        ([b"\xff", b"outrider://drafter/a", b"outrider://gateway/a"], None),
        ([], "the caller is of no role"),
        ([b"gateway.outrider.internal"], "the caller is of no role"),
        ([b"outrider://target/a", b"outrider://drafter/a"], "the caller is drafter and target"),
    ],
)
def test_a_method_is_for_callers_of_its_role_alone(names: list[bytes], said: str | None) -> None:
    async def main() -> None:
        heard: list[tuple[object, object]] = []

        async def method(request: object, context: object) -> None:
            heard.append((request, context))

        caller = Caller(*names)
        guarded = require_role("gateway", method)
        if said is None:
            await guarded("request", caller)
            assert heard == [("request", caller)]
            return
        with pytest.raises(grpc.aio.AbortError):
            await guarded("request", caller)
        assert heard == []
        why = f"{said}: a certificate of role gateway is needed"
        assert caller.refused == [(grpc.StatusCode.PERMISSION_DENIED, why)]

    asyncio.run(main())


def test_a_certificate_of_several_roles_is_refused_by_their_names(
    tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.rpc.tls.roles_in", lambda names: frozenset({"target", "gateway"}))
    with pytest.raises(InvalidRequest, match="is for role gateway and target, not drafter") as said:
        read_credentials(tls, "drafter")
    assert said.value.param == "tls"


def test_a_certificate_expires_at_its_last_second(tmp_path: Path) -> None:
    ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=1)
    day = datetime.timedelta(days=1)
    valid = write_certificates(tmp_path / "valid", CertificateAuthority("a", ends - day, 1))
    read_credentials(valid, "target")
    passed = ends - datetime.timedelta(minutes=2) - day
    with pytest.raises(InvalidRequest, match="expired on") as said:
        read_credentials(
            write_certificates(tmp_path / "passed", CertificateAuthority("a", passed, 1)), "target"
        )
    assert said.value.param == "tls"
