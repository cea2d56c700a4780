"""How actors tell each other where they are."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Peer:
    """A drafter to talk to. Another incarnation of the same name is another life, at another address."""

    name: str
    address: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Place:
    """Of a running actor: its server, its process, and the Ray node it is on ("" without Ray)."""

    address: str
    pid: int
    node: str


def own_host() -> str:
    """The address that other actors reach this process at: its Ray node's, or loopback without Ray."""
    import ray
    from ray.util import get_node_ip_address

    return get_node_ip_address() if ray.is_initialized() else "127.0.0.1"


def own_place(address: str) -> Place:
    import ray

    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return Place(address, os.getpid(), node)
