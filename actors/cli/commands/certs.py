"""`outrider certs`: creates the TLS certificates of a deployment."""

import datetime
import os
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from runtime.core.errors import InvalidRequest
from runtime.core.sampling_params import check_int

NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,40}")
HOST = re.compile(r"[A-Za-z0-9:*][A-Za-z0-9:.*-]{0,252}")
HTTPS = "https"

INSTRUCTIONS = """\
Created {count} files in {folder}, valid until {until}. Add to the deployment file:

security:
  tls: {{ca: {folder}/ca.pem, cert: "{folder}/{{role}}.pem", key: "{folder}/{{role}}-key.pem"}}
gateway:
  tls: {{ca: {folder}/ca.pem, cert: {folder}/https.pem, key: {folder}/https-key.pem}}

Copy the files to the same path on every node. A node with drafters only needs ca.pem and the two
files of the drafter. HTTPS clients verify the gateway with ca.pem. The key of the authority was not
saved, so nobody can sign with it; to renew the certificates, create a new folder.
"""


def certs(
    folder: Annotated[Path, typer.Argument(help="new or empty folder for the certificates")],
    days: Annotated[int, typer.Option(help="days of validity")] = 365,
    name: Annotated[
        str, typer.Option(help="name of the deployment in the certificates")
    ] = "outrider",
    host: Annotated[
        list[str] | None,
        typer.Option(help="host name or IP address of the gateway for HTTPS clients (repeatable)"),
    ] = None,
) -> None:
    """Create a certificate authority and certificates for each role and the gateway's HTTPS."""
    from actors.rpc.certificate_authority import CertificateAuthority  # grpc is slow to import

    check_int("days", days, 1, 3650)
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"name {name[:64]!r} is invalid: give up to 41 lower-case letters, digits, dots and "
            "dashes",
            "name",
        )
    hosts = host or ["localhost", "127.0.0.1", "::1"]
    for given in hosts:
        if not HOST.fullmatch(given):
            raise InvalidRequest(
                f"host {given[:64]!r} is not a host name or IP address: give the host in the URL "
                "of clients",
                "host",
            )
    authority = CertificateAuthority(name, datetime.datetime.now(datetime.UTC), days)
    files = {"ca.pem": authority.certificate}
    for stem, signed in {**authority.roles(), HTTPS: authority.https_server(hosts)}.items():
        files |= {f"{stem}.pem": signed.certificate, f"{stem}-key.pem": signed.key}
    write_files(folder, files)
    text = INSTRUCTIONS.format(
        count=len(files), folder=folder.absolute(), until=f"{authority.ends:%Y-%m-%d}"
    )
    Console(soft_wrap=True, highlight=False, markup=False).print(text, end="")


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Writes files that only their owner can read.

    Raises InvalidRequest if the folder is not empty: nothing is overwritten.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InvalidRequest(
                f"{folder} is not empty: give a new folder, since certificates are not overwritten",
                "folder",
            )
        folder.chmod(0o700)
        for name, content in files.items():
            with os.fdopen(
                os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
            ) as file:
                file.write(content)
    except OSError as error:
        raise InvalidRequest(
            f"cannot write {folder} ({error.strerror}): give another folder", "folder"
        ) from error
