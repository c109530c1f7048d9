"""Long-lived signing keys, and the list of names and keys that everyone agreed on.

Ed25519 (RFC 8032). The roster does not come from the coordinator of a run: each institution has it from elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import ConfigError
from common.secagg.canonical import canonical

PUBLIC_BYTES, SIGNATURE_BYTES = 32, 64


class Identity:
    """An institution's name with its private signing key, which no text form and no pickle of it shows."""

    def __init__(self, name: str, key: Ed25519PrivateKey) -> None:
        self.name = name
        self._key = key

    @classmethod
    def generate(cls, name: str) -> Identity:
        """A new one, from the operating system's generator."""
        return cls(name, Ed25519PrivateKey.generate())

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, statement: bytes) -> bytes:
        """A signature of 64 bytes."""
        return self._key.sign(statement)

    def __repr__(self) -> str:
        return f"Identity({self.name!r})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("an identity is never pickled: its private key stays in this process")


@dataclass(frozen=True)
class Roster:
    """Public signing keys (32 bytes) by name.

    Raises ConfigError for a key that is none, and when two names share one: they would be one member with two votes.
    """

    keys: Mapping[str, bytes]

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", MappingProxyType(dict(sorted(self.keys.items()))))
        for name, key in self.keys.items():
            if len(key) != PUBLIC_BYTES:
                raise ConfigError(f"roster: expected a public key of {PUBLIC_BYTES} bytes for {name}, found {len(key)}")
        if len(set(self.keys.values())) < len(self.keys):
            raise ConfigError("roster: expected a key of its own for every name, found one key under two names")

    @classmethod
    def of(cls, *identities: Identity) -> Roster:
        """The roster of these."""
        return cls({identity.name: identity.public for identity in identities})

    def digest(self) -> str:
        """SHA-256 over all names and keys."""
        return hashlib.sha256(canonical("roster", tuple(self.keys.items()))).hexdigest()

    def verifies(self, name: str, signature: bytes, statement: bytes) -> bool:
        """Whether `name` is on the roster and signed `statement`."""
        try:
            Ed25519PublicKey.from_public_bytes(self.keys[name]).verify(signature, statement)
        except (KeyError, ValueError, InvalidSignature):
            return False
        return True

    def __reduce__(self) -> tuple[type[Roster], tuple[dict[str, bytes]]]:
        return Roster, (dict(self.keys),)
