"""Which node is which member: by the enrolled key alone."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from common.enrolment import Card, SignedRoster
from common.secagg.identity import Identity
from server import nodes
from server.operator import NodeRecord
from tests.deployments import signed_roster


def card(name: str) -> Card:
    return Card.of(Identity.generate(name), ec.generate_private_key(ec.SECP384R1()).public_key())


def record(number: int, name: str, found: Card) -> NodeRecord:
    return NodeRecord(number, name, public_key_to_bytes(nodes.node_key(found)))


@pytest.fixture(scope="module")
def cards() -> dict[str, Card]:
    return {name: card(name) for name in ("alder", "birch", "cedar")}


@pytest.fixture(scope="module")
def roster(cards: dict[str, Card]) -> SignedRoster:
    return signed_roster(cards["alder"], cards["birch"])


def test_a_node_is_who_its_key_says_whatever_it_was_registered_as(roster: SignedRoster, cards: dict[str, Card]) -> None:
    found = [
        record(1, "birch", cards["alder"]),
        record(2, "alder", cards["birch"]),
        record(3, "alder", cards["cedar"]),
    ]
    assert nodes.names(roster, found) == {1: "alder", 2: "birch"}


def test_changes_are_what_is_missing_and_what_is_too_much(roster: SignedRoster, cards: dict[str, Card]) -> None:
    here, stranger = record(1, "alder", cards["alder"]), record(3, "alder", cards["cedar"])
    assert nodes.changes(roster, [here, stranger]) == nodes.Changes((cards["birch"],), (stranger,))
    assert nodes.changes(roster, [here, record(2, "birch", cards["birch"])]) == nodes.Changes((), ())
    assert nodes.changes(roster, []) == nodes.Changes((cards["alder"], cards["birch"]), ())


def test_a_member_with_a_new_key_is_registered_and_its_old_one_shut_out(cards: dict[str, Card]) -> None:
    old, new = cards["alder"], card("alder")
    found = record(1, "alder", old)
    assert nodes.changes(signed_roster(new), [found]) == nodes.Changes((new,), (found,))
    assert nodes.names(signed_roster(new), [found]) == {}
