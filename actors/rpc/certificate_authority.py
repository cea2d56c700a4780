"""A certificate authority for one deployment.

It signs a certificate for each role and one for the gateway, and then its key is discarded.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID as Purpose
from cryptography.x509.oid import NameOID

from actors.rpc.tls import ROLES, Role, role_host_name, role_uri

CLOCK_SKEW = datetime.timedelta(hours=1)  # the clocks of nodes may be behind this one by as much


@dataclass(frozen=True, slots=True)
class SignedCertificate:
    """A certificate and its key, in PEM."""

    certificate: bytes
    key: bytes


class CertificateAuthority:
    """Signs certificates that are valid from `now` for `days`. Its key is never written or
    exposed.
    """

    def __init__(self, name: str, now: datetime.datetime, days: int) -> None:
        self.name, self.begins, self.ends = (
            name,
            now - CLOCK_SKEW,
            now + datetime.timedelta(days=days),
        )
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = common_name(f"{name} authority")
        self._certificate = (
            self._builder(subject, subject, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(key_usage(signs=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def certificate(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def role(self, role: Role) -> SignedCertificate:
        """Returns an actor's certificate, for both its server and its clients."""
        names = [
            x509.UniformResourceIdentifier(role_uri(role, self.name)),
            x509.DNSName(role_host_name(role)),
        ]
        return self._signed(
            f"{self.name} {role}", names, [Purpose.SERVER_AUTH, Purpose.CLIENT_AUTH]
        )

    def roles(self) -> dict[str, SignedCertificate]:
        return {role: self.role(role) for role in ROLES}

    def https_server(self, hosts: Sequence[str]) -> SignedCertificate:
        """Returns the certificate of the gateway's HTTPS server, for these names and addresses.

        It has no role, so actors do not accept it.
        """
        return self._signed(
            f"{self.name} https", [general_name(host) for host in hosts], [Purpose.SERVER_AUTH]
        )

    def _signed(
        self,
        subject: str,
        names: Sequence[x509.GeneralName],
        purposes: Sequence[x509.ObjectIdentifier],
    ) -> SignedCertificate:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            self._builder(common_name(subject), self._certificate.subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        secret = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return SignedCertificate(certificate.public_bytes(serialization.Encoding.PEM), secret)

    def _builder(
        self, subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.begins)
            .not_valid_after(self.ends)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )


def common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def general_name(host: str) -> x509.GeneralName:
    """Returns the host as a subject name. Raises ValueError for a name that no certificate
    can hold.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def key_usage(signs: bool) -> x509.KeyUsage:
    """Returns the key usage of an authority, which signs certificates, or of a leaf's key."""
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
