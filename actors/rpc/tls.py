"""Mutual TLS between actors: each proves its role by a certificate of the deployment's own
authority.

A certificate carries its role twice. A server checks the URI `outrider://ROLE/NAME` of its callers.
A client checks the DNS name `ROLE.outrider.internal` of its server, in place of a host name: actors
get new addresses with every start, so a host name would prove nothing. That is safe because the
authority signs only the roles of this deployment: the holder of a drafter's key can act as a
drafter, as it should, and as nothing else.
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
ALTERNATIVE_NAMES = "x509_subject_alternative_name"  # gRPC's name of the property
PEM_BYTES = 1 << 16

log = logging.getLogger(__name__)

Method = Callable[[Any, Any], Awaitable[None]]


def role_uri(role: Role, name: str) -> str:
    return f"{URI_SCHEME}{role}/{name}"


def role_host_name(role: Role) -> str:
    """Returns the host name that a client expects of a server of this role."""
    return f"{role}.outrider.internal"


def roles_in(names: Iterable[str]) -> frozenset[Role]:
    """Returns the roles among a certificate's alternative names."""
    said = {
        name.removeprefix(URI_SCHEME).partition("/")[0]
        for name in names
        if name.startswith(URI_SCHEME)
    }
    return frozenset(role for role in ROLES if role in said)


def channel(
    address: str, options: list[tuple[str, int]], tls: TlsConfig | None, own: Role, peer: Role
) -> grpc.aio.Channel:
    """Returns a channel as `own` to a server that must prove the role `peer`; insecure without
    `tls`.

    Raises InvalidRequest if the files cannot be used.
    """
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    ca, cert, key = read_credentials(tls, own)
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    return grpc.aio.secure_channel(
        address, credentials, [*options, ("grpc.ssl_target_name_override", role_host_name(peer))]
    )


def server_credentials(tls: TlsConfig, own: Role) -> grpc.ServerCredentials:
    """Returns credentials of a server that only accepts clients with a certificate of the same
    authority.

    The files are read again for every connection, so new ones take effect without a restart. Raises
    InvalidRequest if the files cannot be used.
    """

    used = read_credentials(tls, own)

    def configuration() -> grpc.ServerCertificateConfiguration:
        ca, cert, key = used
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """Returns None if nothing has changed.

        gRPC 1.85 ends the process (SIGSEGV) if a configuration is replaced during the handshake of
        another client.
        """
        nonlocal used
        try:
            found = read_credentials(tls, own)
        except InvalidRequest as error:
            log.warning("new certificates cannot be used, the old ones stay in use: %s", error)
            return None
        if found == used:
            return None
        used = found
        return configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(), renewed, require_client_authentication=True
    )


def require_role(role: Role, method: Method) -> Method:
    """Wraps a servicer's method to accept only callers whose certificate has this role.

    Others get PERMISSION_DENIED.
    """

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
    """Returns the authority's certificates, own certificate and own key, in PEM.

    "{role}" in a path is replaced by `own`. Raises InvalidRequest for what would otherwise only
    fail at the first handshake, without a visible reason: a file that is missing or not PEM, a key
    that does not match the certificate, a certificate of another role or an expired one.
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
            f"{ca}, {cert} or {key} is invalid ({error}): see `outrider certs`", "tls"
        ) from error
    if secret.public_key() != certificate.public_key():
        raise InvalidRequest(
            f"{key} is not the key of {cert}: give the two that were made together", "tls"
        )
    if own not in roles:
        said = " and ".join(sorted(roles)) or "none"
        raise InvalidRequest(
            f"{cert} is for role {said}, not {own}: write {{role}} into the path,"
            f" or give a certificate of it",
            "tls",
        )
    if certificate.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        raise InvalidRequest(
            f"{cert} expired on {certificate.not_valid_after_utc:%Y-%m-%d}:"
            " make new ones with `outrider certs`",
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
    """Logs a warning if actors of several nodes talk without TLS. An empty name is not a node."""
    count = len({node for node in nodes if node})
    if tls is None and count > 1:
        log.warning(
            "actors on %d nodes talk without TLS: set certificates under security.tls,"
            " or isolate the network",
            count,
        )
