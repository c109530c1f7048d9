"""Encryption between members: whoever it is sealed for, for that purpose, reads it; nobody reads anything else."""

from __future__ import annotations

import copy
import hashlib
import hmac
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from common.secagg.sealing import OVERHEAD, PUBLIC_BYTES, SEED_BYTES, PrivateKey, derive, seal
from tests.common.secagg.conftest import assert_hidden, texts_of

SEED = bytes(range(32))
KEY = PrivateKey(SEED, b"for tests")
OTHER = PrivateKey(bytes(32), b"for tests")
SEALED = seal(b"what two members share", KEY.public, b"info")


@given(st.binary(max_size=300), st.binary(max_size=100))
def test_what_is_sealed_comes_back(plaintext: bytes, info: bytes) -> None:
    sealed = seal(plaintext, KEY.public, info)
    assert len(sealed) == len(plaintext) + OVERHEAD
    assert KEY.unseal(sealed, info) == plaintext
    if len(plaintext) >= 8:
        assert plaintext not in sealed


def refuses(key: PrivateKey, sealed: bytes, info: bytes) -> None:
    with pytest.raises(ValueError, match="sealed for another recipient or purpose, or altered on the way"):
        key.unseal(sealed, info)


def test_another_recipient_or_purpose_reads_nothing() -> None:
    refuses(OTHER, SEALED, b"info")
    refuses(PrivateKey(SEED, b"another statement"), SEALED, b"info")
    for info in (b"", b"inf", b"info\0", b"INFO"):
        refuses(KEY, SEALED, info)


def test_every_byte_counts() -> None:
    for place in range(len(SEALED)):
        refuses(KEY, SEALED[:place] + bytes([SEALED[place] ^ 1 << place % 8]) + SEALED[place + 1 :], b"info")


def test_what_is_cut_short_or_longer_is_refused() -> None:
    for length in range(0, len(SEALED), 7):
        refuses(KEY, SEALED[:length], b"info")
    for length in (1, 16, OVERHEAD - 1, OVERHEAD, OVERHEAD + 1):
        refuses(KEY, SEALED[:length] if length < len(SEALED) else SEALED + b"\0", b"info")
    refuses(KEY, SEALED + b"\0", b"info")
    refuses(KEY, b"\0" + SEALED, b"info")
    refuses(KEY, SEALED[1:], b"info")


def test_a_part_of_one_and_a_part_of_another_is_refused() -> None:
    again = seal(b"what two members share", KEY.public, b"info")
    for cut in (1088, 1120):
        refuses(KEY, SEALED[:cut] + again[cut:], b"info")


def test_sealing_twice_has_nothing_in_common() -> None:
    sealed = [seal(b"same", KEY.public, b"info") for _ in range(20)]
    assert len(set(sealed)) == 20
    assert len({text[:1088] for text in sealed}) == len({text[1088:1120] for text in sealed}) == 20
    assert len({text[1120:] for text in sealed}) == 20


def test_the_same_seed_and_statement_give_the_same_key() -> None:
    assert PrivateKey(bytearray(SEED), b"for tests").public == KEY.public
    assert PrivateKey(SEED, b"for tests").unseal(SEALED, b"info") == b"what two members share"
    assert len({KEY.public, OTHER.public, PrivateKey(SEED, b"for test").public}) == 3


def test_a_public_key_is_both_public_keys_one_after_the_other() -> None:
    material = derive(SEED, b"for tests", 96)
    mlkem = MLKEM768PrivateKey.from_seed_bytes(material[:64]).public_key().public_bytes_raw()
    x25519 = X25519PrivateKey.from_private_bytes(material[64:]).public_key().public_bytes_raw()
    assert (len(mlkem), len(x25519)) == (1184, 32)
    assert KEY.public == mlkem + x25519
    assert len(KEY.public) == PUBLIC_BYTES == 1216


@pytest.mark.parametrize(
    "public",
    [
        b"",
        KEY.public[:-1],
        KEY.public + b"\0",
        KEY.public[:1184],
        KEY.public[1184:],
        bytes(PUBLIC_BYTES),
        b"\xff" * 1184 + KEY.public[1184:],  # coefficients above the modulus
        KEY.public[:1184] + bytes(32),  # a point of low order: everyone would know the shared secret
        KEY.public[:1184] + b"\x01" + bytes(31),
    ],
    ids=lambda public: f"{len(public)} bytes, {public[:1].hex()}..{public[-1:].hex()}",
)
def test_what_is_no_public_key_is_refused(public: bytes) -> None:
    with pytest.raises(ValueError):
        seal(b"secret", public, b"info")


@pytest.mark.parametrize("half", [slice(0, 1184), slice(1184, 1216)], ids=["ML-KEM", "X25519"])
def test_both_key_exchanges_are_needed(half: slice) -> None:
    """Who holds the secret of one half of the public key, but not of the other, reads nothing."""
    mixed = bytearray(KEY.public)
    mixed[half] = OTHER.public[half]
    sealed = seal(b"secret", bytes(mixed), b"info")
    refuses(KEY, sealed, b"info")
    refuses(OTHER, sealed, b"info")


def test_derivation_is_hkdf_of_rfc_5869() -> None:
    """Written out from its section 2, with the hash's own zeros for salt."""
    for length in (1, 32, 33, 96):
        extracted = hmac.digest(bytes(32), SEED, hashlib.sha256)
        found, block = b"", b""
        for count in range(1, -(-length // 32) + 1):
            block = hmac.digest(extracted, block + b"statement" + bytes([count]), hashlib.sha256)
            found += block
        assert derive(SEED, b"statement", length) == found[:length]
    assert len(derive(SEED, b"statement")) == SEED_BYTES


def test_no_text_form_shows_a_private_key() -> None:
    material = derive(SEED, b"for tests", 96)
    assert repr(KEY) == "PrivateKey()"
    assert_hidden(texts_of(KEY) + repr(vars(KEY)), [SEED, material, material[:64], material[64:]])
    with pytest.raises(ValueError) as caught:
        KEY.unseal(SEALED[:-1], b"info")
    assert_hidden(texts_of(caught.value) + texts_of(caught.value.__cause__), [SEED, material])


@pytest.mark.parametrize("take", [pickle.dumps, copy.deepcopy])
def test_a_private_key_is_not_pickled(take: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        take(KEY)
