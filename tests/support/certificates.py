"""Writes certificates to files, serves over TLS, and calls what is served."""

import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from actors.rpc.certificate_authority import CertificateAuthority, SignedCertificate
from actors.rpc.client import GrpcLink, GrpcTarget
from actors.rpc.common import closing
from actors.rpc.server import DraftingService, TargetService, serve
from runtime.config import TlsConfig
from runtime.core.messages import Chunk, Request
from runtime.core.sampling_params import SamplingParams
from tests.contracts.link_contract import draft_for
from tests.support.fakes import HELLO, HOST, Feed, opening

NOW = datetime.datetime.now(datetime.UTC)
REQUEST = Request("s", (1, 2, 3), SamplingParams())
CHUNK = Chunk(("a",), (7,), ("",), "length")


def write_certificates(folder: Path, authority: CertificateAuthority) -> TlsConfig:
    """Writes the authority's certificates to files named as `outrider certs` names them."""
    folder.mkdir(exist_ok=True)
    (folder / "ca.pem").write_bytes(authority.certificate)
    signed: dict[str, SignedCertificate] = {
        **authority.roles(),
        "https": authority.https_server([HOST]),
    }
    for name, pair in signed.items():
        (folder / f"{name}.pem").write_bytes(pair.certificate)
        (folder / f"{name}-key.pem").write_bytes(pair.key)
    return TlsConfig(
        ca=folder / "ca.pem", cert=folder / "{role}.pem", key=folder / "{role}-key.pem"
    )


def presenting(tls: TlsConfig, name: str) -> TlsConfig:
    """Returns a configuration that presents this certificate for every role."""
    return tls.model_copy(
        update={"cert": tls.ca.parent / f"{name}.pem", "key": tls.ca.parent / f"{name}-key.pem"}
    )


@asynccontextmanager
async def served(
    service: DraftingService | TargetService, tls: TlsConfig | None
) -> AsyncIterator[str]:
    server, port = await serve([service], HOST, tls=tls)
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(None)


async def answered(address: str, tls: TlsConfig | None) -> list[Chunk]:
    target = GrpcTarget(address, tls)
    try:
        return [chunk async for chunk in target.generate(REQUEST)]
    finally:
        await target.close()


async def drafted(address: str, tls: TlsConfig | None) -> int:
    """Returns the number of nodes in the first draft."""
    async with closing(GrpcLink(address, HELLO, tls=tls).speculate(Feed(opening()))) as replies:
        return len((await draft_for(replies, "s")).tokens)
