"""Which of the SuperLink's nodes is which member: decided by the enrolled key, never by what a node says of itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from common.enrolment import Card, SignedRoster
from server.operator import NodeRecord


@dataclass(frozen=True)
class Changes:
    """What makes the registered nodes those of a roster."""

    register: tuple[Card, ...]
    unregister: tuple[NodeRecord, ...]


def names(roster: SignedRoster, nodes: Iterable[NodeRecord]) -> Mapping[int, str]:
    """Names of the members by their nodes' numbers; a node whose key is not on the roster has none."""
    known = {_pem(card): name for name, card in roster.cards.items()}
    return {node.number: known[node.key] for node in nodes if node.key in known}


def changes(roster: SignedRoster, nodes: Iterable[NodeRecord]) -> Changes:
    """What is to be registered and unregistered, so that the roster's node keys and no others take part."""
    found = tuple(nodes)
    keys = {node.key for node in found}
    listed = {_pem(card) for card in roster.cards.values()}
    return Changes(
        register=tuple(card for card in roster.cards.values() if _pem(card) not in keys),
        unregister=tuple(node for node in found if node.key not in listed),
    )


def node_key(card: Card) -> ec.EllipticCurvePublicKey:
    """The key on a card, which is of this kind: the card has checked it."""
    key = load_ssh_public_key(card.node.encode("ascii"))
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


@cache
def _pem(card: Card) -> bytes:
    """A key as the SuperLink lists it."""
    return node_key(card).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
