"""One attempt at a sum: what every statement that is signed in it, and every key that is derived in it, is bound to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from common.errors import ConfigError
from common.fixed_point import Layout
from common.secagg.canonical import Value, canonical
from common.secagg.messages import Keys
from common.secagg.terms import Terms

COMMITMENT_BYTES = 32


@dataclass(frozen=True)
class Attempt:
    """run, round, attempt: which one; attempts count through a run, so no two have the same number.

    plan: digest of the plan, which every member received. cohort: names in order, at most `terms.members`. layout: form
    of the vectors.

    Raises ConfigError for a cohort that is not in order, has a name twice, or does not fit the terms.
    """

    run: str
    round: int
    attempt: int
    plan: str
    cohort: tuple[str, ...]
    terms: Terms
    layout: Layout

    def __post_init__(self) -> None:
        if list(self.cohort) != sorted(set(self.cohort)):
            raise ConfigError(f"expected a cohort of different names in order, found {', '.join(self.cohort)}")
        if not self.terms.survivors <= len(self.cohort) <= self.terms.members:
            raise ConfigError(
                f"expected a cohort of {self.terms.survivors} to {self.terms.members} members, found {len(self.cohort)}"
            )

    def statement(self, purpose: str, *fields: Value) -> bytes:
        """What is signed, or bound to a key or a ciphertext, for one purpose in this attempt and no other."""
        return canonical(purpose, self.run, self.round, self.attempt, self.plan, *fields)

    def point(self, name: str) -> int:
        """The point at which `name` holds its shares."""
        return self.cohort.index(name) + 1

    # What each signature says. Both sides write it by these functions, so that it cannot differ.

    def keys_statement(self, name: str, keys: Keys) -> bytes:
        """Signed by a member over the keys that it announces."""
        return self.statement("keys", name, keys.share_key, keys.mask_key, keys.commitment)

    def sealed_statement(self, key_list: bytes, sender: str, recipient: str, shares: bytes, pair: bytes) -> bytes:
        """Signed by a sender over what it sealed for one recipient."""
        return self.statement("sealed", key_list, sender, recipient, shares, pair)

    def survivors_statement(self, key_list: bytes, survivors: Iterable[str]) -> bytes:
        """Signed by a survivor over the one set of names whose sum may be revealed."""
        return self.statement("survivors", key_list, tuple(survivors))

    # What each derived secret is bound to.

    def commitment(self, name: str, self_seed: bytes) -> bytes:
        """What a member says of its self-mask seed before anyone may see it: 32 bytes that fit no other seed."""
        return hashlib.sha256(self.statement("self seed", name, self_seed)).digest()

    def pair_statement(self, key_list: bytes, lower: str, higher: str) -> bytes:
        """Binds a pair's seed to both names and, by the list of keys, to both mask keys."""
        return self.statement("pair seed", key_list, lower, higher)

    def shares_info(self, key_list: bytes, sender: str, recipient: str) -> bytes:
        """Binds sealed shares to who may have sealed them, for whom, and under which keys."""
        return self.statement("seal shares", key_list, sender, recipient)

    def pair_info(self, key_list: bytes, sender: str, recipient: str) -> bytes:
        """Binds a sealed pair seed likewise."""
        return self.statement("seal pair seed", key_list, sender, recipient)


def key_list_digest(attempt: Attempt, keys: Mapping[str, Keys]) -> bytes:
    """SHA-256 over all names, keys and signatures; who was shown another list computes another digest."""
    entries = tuple(
        (name, entry.share_key, entry.mask_key, entry.commitment, entry.signature)
        for name, entry in sorted(keys.items())
    )
    return hashlib.sha256(attempt.statement("key list", entries)).digest()
