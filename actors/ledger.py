"""What a controller must know of its fleet after its own restart. Kept in Ray's key-value store: it lives as long as the actors do."""

from dataclasses import dataclass

from pydantic import TypeAdapter

from actors.roster import Member
from runtime.config import Deployment

KEY = b"outrider-fleet"


@dataclass(frozen=True, slots=True)
class Ledger:
    """`lives`: how many each name has had, so that no incarnation comes twice."""

    deployment: Deployment
    counts: dict[str, int]
    members: tuple[Member, ...]
    lives: dict[str, int]
    replaced: int


FORMAT = TypeAdapter(Ledger)


def encode(ledger: Ledger) -> bytes:
    return FORMAT.dump_json(ledger)


def decode(data: bytes) -> Ledger:
    return FORMAT.validate_json(data)
