"""Encryption from member to member: HPKE (RFC 9180) with a key exchange that also withstands a quantum computer.

The suite is ML-KEM-768 with X25519 (whoever breaks one of the two has still the other before him), HKDF-SHA256 and
AES-256-GCM. HPKE tells nobody who wrote: anyone can encrypt to a public key, so senders sign what they seal.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SEED_BYTES = 32
_MLKEM_PUBLIC, _X25519_PUBLIC = 1184, 32
_MLKEM_SEED, _X25519_SEED = 64, 32
PUBLIC_BYTES = _MLKEM_PUBLIC + _X25519_PUBLIC
OVERHEAD = 1088 + 32 + 16  # bytes by which a sealed text is longer: both key exchanges and the tag

_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def derive(seed: bytes | bytearray, statement: bytes, length: int = SEED_BYTES) -> bytes:
    """`length` bytes from a uniform seed of 32 bytes, bound to `statement` (HKDF-SHA256, RFC 5869)."""
    return HKDF(SHA256(), length, salt=None, info=statement).derive(bytes(seed))


class PrivateKey:
    """A key pair derived from a seed of 32 bytes, so that whoever has the seed has the key. No text form shows it."""

    def __init__(self, seed: bytes | bytearray, statement: bytes) -> None:
        material = derive(seed, statement, _MLKEM_SEED + _X25519_SEED)
        mlkem = MLKEM768PrivateKey.from_seed_bytes(material[:_MLKEM_SEED])
        x25519 = X25519PrivateKey.from_private_bytes(material[_MLKEM_SEED:])
        self._key = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()

    def unseal(self, sealed: bytes, info: bytes) -> bytes:
        """What `seal` was given. Raises ValueError when it was sealed for another key or info, or altered."""
        try:
            return _SUITE.decrypt(sealed, self._key, info=info)
        except (InvalidTag, ValueError) as error:
            raise ValueError("it was sealed for another recipient or purpose, or altered on the way") from error

    def __repr__(self) -> str:
        return "PrivateKey()"


def is_public(key: bytes) -> bool:
    """Whether something can be sealed to `key`."""
    try:
        seal(b"", key, b"")
    except ValueError:
        return False
    return True


def seal(plaintext: bytes, public: bytes, info: bytes) -> bytes:
    """Encrypts to a public key of 1216 bytes. Raises ValueError for a key that is none."""
    if len(public) != PUBLIC_BYTES:
        raise ValueError(f"expected a public key of {PUBLIC_BYTES} bytes, found {len(public)}")
    mlkem = MLKEM768PublicKey.from_public_bytes(public[:_MLKEM_PUBLIC])
    x25519 = X25519PublicKey.from_public_bytes(public[_MLKEM_PUBLIC:])
    return _SUITE.encrypt(plaintext, MLKEM768X25519PublicKey(mlkem, x25519), info=info)
