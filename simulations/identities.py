"""Signing keys for institutions that a simulation plays: drawn at its start, kept in memory, gone with it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.secagg.canonical import canonical
from common.secagg.identity import Identity, Roster
from common.secagg.sealing import derive


@dataclass(frozen=True)
class SimulatedIdentities:
    """An identity for every name, all from one secret of 32 bytes, so that what travels to an actor stays short."""

    names: tuple[str, ...]
    secret: bytes = field(repr=False)

    @classmethod
    def fresh(cls, names: tuple[str, ...]) -> SimulatedIdentities:
        """New ones, from the operating system's generator."""
        return cls(names, secrets.token_bytes(32))

    def identity(self, name: str) -> Identity:
        seed = derive(self.secret, canonical("simulated identity", name))
        return Identity(name, Ed25519PrivateKey.from_private_bytes(seed))

    def roster(self) -> Roster:
        """Everybody's public keys."""
        return _roster(self)


@lru_cache(maxsize=4)
def _roster(identities: SimulatedIdentities) -> Roster:
    return Roster.of(*(identities.identity(name) for name in identities.names))
