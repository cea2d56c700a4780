"""In its actor, the gateway reaches targets by gRPC with keys and TLS, and its log is silent."""

import datetime
import logging
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from actors.fleet.fleet_state import Fleet, TargetState
from actors.gateway.actor import Gateway
from actors.openai.served_model import load_served_model
from actors.rpc.certificate_authority import CertificateAuthority
from actors.rpc.loop_thread import LoopThread
from actors.rpc.server import TargetService
from actors.rpc.server import serve as serve_grpc
from runtime.config import Deployment, GatewayConfig, LimitsConfig, TargetConfig, TlsConfig
from runtime.core.errors import InvalidRequest, Unavailable
from tests.support.gateway import toy_target
from tests.support.harness import HANG_S
from tests.support.pair import SHIPPED

KEY = "a-key-that-is-long-enough"
SECRET = "a prompt that nobody may read"


@dataclass
class Behind:
    """A target on a port of its own, and what a controller would say of it."""

    address: str
    fleet: Fleet
    told: threading.Event


@pytest.fixture(scope="module")
def behind() -> Iterator[Behind]:
    network = LoopThread("target")
    target, _ = toy_target()

    async def begin() -> Any:
        target.start()
        return await serve_grpc([TargetService(target)], "127.0.0.1")

    async def end() -> None:
        await server.stop(0)
        await target.stop()

    server, port = network.run(begin())
    state = TargetState("target-0", f"127.0.0.1:{port}", 0, "ready", 0, None, "")
    yield Behind(
        state.address, Fleet("m", "shipped", "0", (state,), (), (), (), 0), threading.Event()
    )
    network.run(end())
    network.stop()


def plan(config: GatewayConfig, limits: LimitsConfig | None = None) -> Deployment:
    return Deployment(
        target=TargetConfig(model=str(SHIPPED)), gateway=config, limits=limits or LimitsConfig()
    )


@contextmanager
def started(config: GatewayConfig, look: Any) -> Iterator[Gateway]:
    gateway = Gateway(plan(config), look)
    gateway.start()
    try:
        yield gateway
    finally:
        gateway.stop()


def ready(gateway: Gateway) -> None:
    until = time.monotonic() + HANG_S
    while not gateway.service.ready and time.monotonic() < until:
        time.sleep(0.01)


def test_an_unexpected_error_does_not_end_the_watch(
    behind: Behind, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("actors.gateway.actor.FLEET_POLL_PERIOD_S", 0.01)
    said: list[Exception] = [KeyError("a fault of ours"), Unavailable("no answer")]

    def look() -> Fleet:
        if said:
            raise said.pop(0)
        return behind.fleet

    with started(GatewayConfig(port=0), look) as gateway:
        ready(gateway)
        assert gateway.service.ready
    assert "the fleet cannot be updated: KeyError" in caplog.text


def test_from_the_url_to_the_target_and_back_in_secret(
    behind: Behind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With keys and TLS, the log names no request, key or address at the active level."""
    authority = CertificateAuthority("outrider", datetime.datetime.now(datetime.UTC), 1)
    site = authority.https_server(["localhost", "127.0.0.1"])
    for name, data in {
        "ca": authority.certificate,
        "cert": site.certificate,
        "key": site.key,
        "keys": f"me:{KEY}".encode(),
    }.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(0o600)
    tls = TlsConfig(ca=tmp_path / "ca", cert=tmp_path / "cert", key=tmp_path / "key")
    config = GatewayConfig(
        host="0.0.0.0", port=0, served_model="shipped", api_keys=tmp_path / "keys", tls=tls
    )
    with caplog.at_level(logging.INFO), started(config, lambda: behind.fleet) as gateway:
        ready(gateway)
        assert gateway.url.startswith("https://")
        url = f"https://127.0.0.1:{gateway.url.rpartition(':')[2]}/v1"
        with openai.OpenAI(
            base_url=url, api_key=KEY, max_retries=0, http_client=trusting(tmp_path / "ca")
        ) as client:
            whole = client.completions.create(model="shipped", prompt=SECRET, max_tokens=12, seed=3)
            streamed = client.completions.create(
                model="shipped", prompt=SECRET, max_tokens=12, seed=3, stream=True
            )
            assert (
                "".join(event.choices[0].text for event in streamed) == whole.choices[0].text != ""
            )
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model="shipped", prompt=SECRET, max_tokens=10**6)
        with (
            openai.OpenAI(
                base_url=url,
                api_key=f"{KEY}x",
                max_retries=0,
                http_client=trusting(tmp_path / "ca"),
            ) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.completions.create(model="shipped", prompt=SECRET)
    for word in (
        SECRET,
        whole.choices[0].text.strip(),
        KEY,
        "127.0.0.1",
        behind.address,
        str(tmp_path),
    ):
        assert word not in "".join(
            record.getMessage()
            for record in caplog.records
            if not record.name.startswith(("httpx", "openai"))
        )


def trusting(ca: Path) -> Any:
    return openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=ca))


def test_a_drained_gateway_says_so_and_stops(behind: Behind) -> None:
    with started(GatewayConfig(port=0, served_model="shipped"), lambda: behind.fleet) as gateway:
        ready(gateway)
        gateway.drain()
        with (
            openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as client,
            pytest.raises(openai.InternalServerError) as found,
        ):
            client.completions.create(model="shipped", prompt="x")
        assert found.value.code == "draining"


def test_without_a_controller_it_serves_nothing_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = threading.Event()

    def look() -> Fleet:
        asked.set()
        raise Unavailable("the controller does not answer")

    with started(GatewayConfig(port=0), look) as gateway:
        assert asked.wait(HANG_S)
        assert not gateway.service.ready
    assert "the controller does not answer" in caplog.text


def test_it_does_not_start_open_to_others() -> None:
    for config in (GatewayConfig(host="0.0.0.0"), GatewayConfig(api_keys=Path("/no/such/file"))):
        with pytest.raises(InvalidRequest):
            Gateway(plan(config), lambda: Fleet("", "", "", (), (), (), (), 0)).start()


def test_what_is_known_of_the_model() -> None:
    found = load_served_model(plan(GatewayConfig()), 5)
    assert (found.name, found.vocabulary, found.created) == ("target", 4096, 5)
    assert load_served_model(plan(GatewayConfig(served_model="mine")), 5).name == "mine"
