"""The addresses by which actors find each other."""

import ipaddress
import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A drafter's address. Another incarnation of a name is another process at another address."""

    name: str
    address: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class ActorLocation:
    """The address of a running actor's server, its process id, and its Ray node (""
    without Ray).
    """

    address: str
    pid: int
    node: str


def own_host() -> str:
    """Returns the address at which others reach this process: its Ray node's, else loopback."""
    import ray
    from ray.util import get_node_ip_address

    return get_node_ip_address() if ray.is_initialized() else "127.0.0.1"


def own_location(address: str) -> ActorLocation:
    """Returns the location of this process, whose server listens at `address`."""
    import ray

    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return ActorLocation(address, os.getpid(), node)


def is_loopback(host: str) -> bool:
    """Tells whether the host, an IP address or a name, is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
