"""Mutual TLS between actors: who may talk to whom, proved by certificates of a certificate authority of the deployment's own.

A certificate carries its role twice. The URI `outrider://ROLE/NAME` is what a server asks its callers for. The DNS name
`ROLE.outrider.internal` is what a client asks its server for, in place of a host name: actors are reached by addresses that change
with every start, so a name of the host would prove nothing. That is safe because the authority signs nothing but this deployment's
roles: whoever holds a drafter's key can pose as a drafter, as its holder should, and as nothing else.
"""

import datetime
import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from runtime.config import TlsConfig
from runtime.core.errors import InvalidRequest

Role = Literal["target", "drafter", "gateway"]
ROLES: tuple[Role, ...] = get_args(Role)
URI_SCHEME = "outrider://"
ALTERNATIVE_NAMES = (
    "x509_subject_alternative_name"  # gRPC's name for what a peer's certificate is made out to
)
PEM_BYTES = 1 << 16

log = logging.getLogger(__name__)

Method = Callable[[Any, Any], Awaitable[None]]


def role_uri(role: Role, name: str) -> str:
    return f"{URI_SCHEME}{role}/{name}"


def role_host_name(role: Role) -> str:
    """What a client takes the name of its server to be, whatever address it is at."""
    return f"{role}.outrider.internal"


def roles_in(names: Iterable[str]) -> frozenset[Role]:
    """Roles among the names that a certificate is made out to."""
    said = {
        name.removeprefix(URI_SCHEME).partition("/")[0]
        for name in names
        if name.startswith(URI_SCHEME)
    }
    return frozenset(role for role in ROLES if role in said)


def channel(
    address: str, options: list[tuple[str, int]], tls: TlsConfig | None, own: Role, peer: Role
) -> grpc.aio.Channel:
    """A connection as `own` to a server that must prove to be a `peer`; in the clear without `tls`.

    Raises InvalidRequest for files that cannot be used.
    """
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    ca, cert, key = read_credentials(tls, own)
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    return grpc.aio.secure_channel(
        address, credentials, [*options, ("grpc.ssl_target_name_override", role_host_name(peer))]
    )


def server_credentials(tls: TlsConfig, own: Role) -> grpc.ServerCredentials:
    """Of a server that lets in only who shows a certificate of the same authority. Raises InvalidRequest as `channel`.

    The files are read again for every connection: new ones are used from then on, without a restart.
    """

    used = read_credentials(tls, own)

    def configuration() -> grpc.ServerCertificateConfiguration:
        ca, cert, key = used
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """None where nothing is new: gRPC 1.85 ends the process (SIGSEGV) where one is replaced during the handshake of another caller."""
        nonlocal used
        try:
            found = read_credentials(tls, own)
        except InvalidRequest as error:
            log.warning("the certificates of before stay in use: %s", error)
            return None
        if found == used:
            return None
        used = found
        return configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(), renewed, require_client_authentication=True
    )


def require_role(role: Role, method: Method) -> Method:
    """The method of a servicer, for callers whose certificate says that they are a `role`: PERMISSION_DENIED for all others."""

    async def guarded(request: Any, context: Any) -> None:
        names = (
            name.decode("utf-8", "replace")
            for name in context.auth_context().get(ALTERNATIVE_NAMES, ())
        )
        found = roles_in(names)
        if role not in found:
            said = " and ".join(sorted(found)) or "of no role"
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"the caller is {said}: a certificate of role {role} is needed",
            )
        await method(request, context)

    return guarded


def read_credentials(tls: TlsConfig, own: Role) -> tuple[bytes, bytes, bytes]:
    """Certificates of the authority, own certificate, own key, in PEM. "{role}" in a path stands for `own`.

    Raises InvalidRequest for what would only fail at the first handshake, where nobody sees why: a file that is missing or no PEM, a
    key of another certificate, a certificate of another role or one that has run out.
    """
    ca, cert, key = (Path(str(path).replace("{role}", own)) for path in (tls.ca, tls.cert, tls.key))
    found = read_pem(ca), read_pem(cert), read_pem(key)
    try:
        x509.load_pem_x509_certificates(found[0])
        certificate = x509.load_pem_x509_certificate(found[1])
        secret = serialization.load_pem_private_key(found[2], password=None)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        roles = roles_in(names.get_values_for_type(x509.UniformResourceIdentifier))
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
        raise InvalidRequest(
            f"{ca}, {cert} or {key} is not what it should be ({error}): see `outrider certs`", "tls"
        ) from error
    if secret.public_key() != certificate.public_key():
        raise InvalidRequest(
            f"{key} is not the key of {cert}: give the two that were made together", "tls"
        )
    if own not in roles:
        said = " and ".join(sorted(roles)) or "none"
        raise InvalidRequest(
            f"{cert} is for role {said}, not {own}: write {{role}} into the path, or give a certificate of it",
            "tls",
        )
    if certificate.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        raise InvalidRequest(
            f"{cert} ran out on {certificate.not_valid_after_utc:%Y-%m-%d}: make new ones with `outrider certs`",
            "tls",
        )
    return found


def read_pem(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(PEM_BYTES)
    except OSError as error:
        raise InvalidRequest(
            f"{file} cannot be read ({error.strerror}): give a PEM file that lies on every node",
            "tls",
        ) from error


def warn_if_plaintext(nodes: Iterable[str], tls: TlsConfig | None) -> None:
    """One line in the log where actors of several nodes talk in the clear. An empty name is no node of a cluster."""
    count = len({node for node in nodes if node})
    if tls is None and count > 1:
        log.warning(
            "actors on %d nodes talk without TLS: name certificates under security.tls, or keep the network to yourself",
            count,
        )
