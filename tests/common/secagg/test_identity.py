"""Long-lived keys and the roster: what is signed holds for one name and one text, and nothing shows the key."""

from __future__ import annotations

import copy
import pickle
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.secagg.identity import PUBLIC_BYTES, SIGNATURE_BYTES, Identity, Roster
from tests.common.secagg.conftest import assert_hidden, texts_of

NORTH, SOUTH = Identity.generate("north"), Identity.generate("south")
ROSTER = Roster.of(NORTH, SOUTH)

statements = st.binary(max_size=100)


@given(statements)
def test_what_a_member_signed_is_verified_under_its_own_name_only(statement: bytes) -> None:
    signature = NORTH.sign(statement)
    assert len(signature) == SIGNATURE_BYTES
    assert ROSTER.verifies("north", signature, statement)
    assert not ROSTER.verifies("south", signature, statement)
    assert not ROSTER.verifies("west", signature, statement)
    assert not ROSTER.verifies("", signature, statement)


@given(statements, st.data())
def test_an_altered_statement_or_signature_is_not_verified(statement: bytes, data: st.DataObject) -> None:
    signature = NORTH.sign(statement)
    assert not ROSTER.verifies("north", signature, statement + b"\0")
    assert not ROSTER.verifies("north", flipped(signature, data.draw(st.integers(0, 511))), statement)
    if statement:
        bit = data.draw(st.integers(0, 8 * len(statement) - 1))
        assert not ROSTER.verifies("north", signature, flipped(statement, bit))
        assert not ROSTER.verifies("north", signature, statement[:-1])


def flipped(text: bytes, bit: int) -> bytes:
    return (int.from_bytes(text, "big") ^ 1 << bit).to_bytes(len(text), "big")


@pytest.mark.parametrize("signature", [b"", bytes(63), bytes(64), bytes(65), b"\xff" * 64])
def test_what_is_no_signature_is_not_verified(signature: bytes) -> None:
    assert not ROSTER.verifies("north", signature, b"statement")


def test_an_outsider_under_a_members_name_is_not_verified() -> None:
    assert not ROSTER.verifies("north", Identity.generate("north").sign(b"statement"), b"statement")


def test_signatures_are_those_of_rfc_8032() -> None:
    """Section 7.1, test 2: secret key, public key, message and signature."""
    secret = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    member = Identity("north", Ed25519PrivateKey.from_private_bytes(secret))
    signature = (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert member.public.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert member.sign(b"\x72").hex() == signature


def test_every_generated_identity_is_another() -> None:
    assert len({Identity.generate("north").public for _ in range(20)}) == 20
    assert len(NORTH.public) == PUBLIC_BYTES


def test_no_text_form_shows_the_key() -> None:
    secret = bytes(range(7, 39))
    member = Identity("north", Ed25519PrivateKey.from_private_bytes(secret))
    assert repr(member) == str(member) == f"{member}" == "Identity('north')"
    assert_hidden(texts_of(member) + repr(vars(member)), [secret])
    assert b64encode(secret).decode() not in texts_of(member)


@pytest.mark.parametrize(
    "take",
    [copy.copy, copy.deepcopy, *(lambda it, p=p: pickle.dumps(it, p) for p in range(pickle.HIGHEST_PROTOCOL + 1))],
)
def test_an_identity_is_neither_pickled_nor_copied(take: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="an identity is never pickled"):
        take(NORTH)
    with pytest.raises(TypeError, match="an identity is never pickled"):
        take({"inside": [NORTH]} if take is not copy.copy else NORTH)


# --- Roster ---------------------------------------------------------------------------------------------------------


def test_one_key_under_two_names_is_refused() -> None:
    with pytest.raises(ConfigError, match="found one key under two names"):
        Roster({"north": NORTH.public, "south": SOUTH.public, "west": NORTH.public})


@pytest.mark.parametrize("key", [b"", NORTH.public[:-1], NORTH.public + b"\0"], ids=len)
def test_a_key_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(ConfigError, match=f"expected a public key of 32 bytes for south, found {len(key)}"):
        Roster({"north": NORTH.public, "south": key})


def test_the_digest_changes_with_any_name_or_key_and_not_with_the_order() -> None:
    keys = {"north": NORTH.public, "south": SOUTH.public}
    others = [
        {"north": NORTH.public},
        {},
        {**keys, "west": bytes(32)},
        {"north": NORTH.public, "south ": SOUTH.public},
        {"south": NORTH.public, "north": SOUTH.public},
        *({**keys, name: flipped(key, bit)} for name, key in keys.items() for bit in (0, 100, 255)),
    ]
    assert len({Roster(found).digest() for found in [keys, *others]}) == len(others) + 1
    assert Roster(dict(reversed(keys.items()))).digest() == Roster(keys).digest() == ROSTER.digest()


def test_a_roster_does_not_change_with_what_it_was_made_of() -> None:
    keys = {"north": NORTH.public}
    roster = Roster(keys)
    keys["south"] = SOUTH.public
    assert set(roster.keys) == {"north"}
    with pytest.raises(TypeError):
        roster.keys["south"] = SOUTH.public  # type: ignore[index]


@pytest.mark.parametrize("again", [lambda it: pickle.loads(pickle.dumps(it)), copy.copy, copy.deepcopy])
def test_a_roster_comes_back_equal_from_a_pickle(again: Callable[[Roster], Roster]) -> None:
    found = again(ROSTER)
    assert found == ROSTER
    assert found.digest() == ROSTER.digest()
    assert found.verifies("south", SOUTH.sign(b"a"), b"a")
    assert found != Roster.of(NORTH)
