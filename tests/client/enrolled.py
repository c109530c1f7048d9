"""An institution that is ready for a run: keys, policy, data file, records and a pinned roster, in a directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from client import keys, trust
from client.home import ClientHome
from client.keys import Keys
from common.bundle import bundle_digest
from common.enrolment import Address, Card, Contents, Member, SignedRoster
from common.records import Record, write_jsonl
from common.secagg.identity import Identity
from server.authority import authority_certificate
from tests.client.conftest import make_records

WHEN = "2030-01-31T12:00:00Z"
DATA_SET = "notes"


@dataclass(frozen=True)
class Enrolled:
    """The institution's home, and the coordinator that it trusts."""

    home: ClientHome
    keys: Keys
    coordinator: Identity
    records: Path


def authority_pem(key: ec.EllipticCurvePrivateKey, now: datetime | None = None) -> str:
    made = authority_certificate(key, "oncology", now or datetime.now(UTC))
    return made.public_bytes(Encoding.PEM).decode()


def roster_of(coordinator: Identity, card: Card, authority: str, address: Address, serial: int = 1) -> SignedRoster:
    """A roster with three more members."""
    others = [
        Card.of(Identity.generate(name), ec.generate_private_key(ec.SECP384R1()).public_key())
        for name in ("birch", "cedar", "dogwood")
    ]
    cards = sorted([card, *others], key=lambda found: found.name)
    members = tuple(Member(found, WHEN) for found in cards)
    return SignedRoster.of(
        Contents("oncology", serial, WHEN, coordinator.public, address, authority, members, (bundle_digest(),)),
        coordinator,
    )


def enrol(
    root: Path,
    base_model: str,
    records: Sequence[Record] | None = None,
    passphrase: bytes | None = None,
    authority: str = "",
    address: Address | None = None,
) -> Enrolled:
    """Makes one with the name alder."""
    file = root / "records.jsonl"
    write_jsonl(file, records or make_records(60, "alder"))
    home = ClientHome(root / "home")
    card = keys.init(home, "alder", passphrase, base_model, {DATA_SET: file})
    own, coordinator = keys.load(home, passphrase), Identity.generate("coordinator")
    authority = authority or authority_pem(ec.generate_private_key(ec.SECP384R1()))
    roster = roster_of(coordinator, card, authority, address or Address("coordinator.example.org", 9443))
    trust.pin(home, roster, own, datetime.now(UTC))
    return Enrolled(home, own, coordinator, file)
