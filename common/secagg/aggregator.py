"""The coordinator's side of one attempt, as a state machine: it collects, checks what it can, adds, and unmasks.

Nothing that it holds tells a single vector: masked inputs are added as they arrive and forgotten, and of the secrets
that it can reconstruct each is one half of what hides a vector. It is not trusted to: members check for themselves.

An answer that is wrong raises `Refusal`, and costs only that member; too few left raises `AttemptFailed`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from common.errors import ConfigError, Refusal, SilotuneError
from common.fixed_point import Ring, RunningSum
from common.secagg import reasons, shamir
from common.secagg.attempt import COMMITMENT_BYTES, Attempt, key_list_digest
from common.secagg.identity import Roster
from common.secagg.masks import add_masks
from common.secagg.messages import (
    Consent,
    Consents,
    Inbox,
    KeyList,
    Keys,
    MaskedInput,
    Revealed,
    Sealed,
    Shares,
    Survivors,
)
from common.secagg.participant import mask_key_of, stream_key, verified_keys, verified_sealed
from common.secagg.sealing import SEED_BYTES, derive, is_public


class AttemptFailed(SilotuneError):
    """An attempt that gives no sum; nothing of any vector is known. It can be repeated with fresh keys."""


class Phase(enum.IntEnum):
    """What the aggregator collects."""

    KEYS = 0
    SHARES = 1
    MASKED_INPUT = 2
    CONSENTS = 3
    REVEALED = 4
    OVER = 5


class Aggregator:
    """One attempt at a sum of vectors [layout.length]. Memory for one vector, whatever the number of members."""

    def __init__(self, attempt: Attempt, roster: Roster) -> None:
        self.attempt = attempt
        self.phase = Phase.KEYS
        self._roster = roster
        self._keys: dict[str, Keys] = {}
        self._key_list = b""
        self._sealed: dict[str, Mapping[str, Sealed]] = {}  # by sender, until they are delivered
        self._pairs: dict[tuple[str, str], bytes] = {}  # by lower and higher name
        self._members: tuple[str, ...] = ()
        self._sum = RunningSum(attempt.layout)
        self._added: list[str] = []
        self._survivors: tuple[str, ...] = ()
        self._consents: dict[str, bytes] = {}
        self._revealed: dict[str, Mapping[str, bytes]] = {}

    # --- Keys -----------------------------------------------------------------------------------------------------

    def on_keys(self, name: str, message: Keys) -> None:
        """Takes a member's keys. Raises Refusal(keys_unverified) when they are not its own, or not fit for use."""
        self._turn(Phase.KEYS, message.plan, name in self._keys)
        taken = {part for entry in self._keys.values() for part in _parts(entry)}
        if (
            not (is_public(message.share_key) and is_public(message.mask_key))
            or len(message.commitment) != COMMITMENT_BYTES
            or message.share_key == message.mask_key
            or taken & set(_parts(message))
            or not verified_keys(self.attempt, self._roster, name, message)
        ):
            raise Refusal(reasons.KEYS_UNVERIFIED, f"keys of {name}")
        self._keys[name] = message

    def key_list(self) -> KeyList:
        """Everyone's keys, the same for all. Raises AttemptFailed when too few announced some."""
        self._close(Phase.KEYS, len(self._keys))
        self._keys = dict(sorted(self._keys.items()))
        self._key_list = key_list_digest(self.attempt, self._keys)
        return KeyList(self.attempt.plan, dict(self._keys))

    # --- Shares ---------------------------------------------------------------------------------------------------

    def on_shares(self, name: str, message: Shares) -> None:
        """Takes what a member sealed for all others. Raises Refusal(shares_unverified) for a missing, superfluous or
        unsigned part: whoever received such would have to leave the attempt.
        """
        self._turn(Phase.SHARES, message.plan, name in self._sealed)
        verified = all(
            verified_sealed(self.attempt, self._roster, self._key_list, self._keys, name, recipient, sealed)
            for recipient, sealed in message.sealed.items()
        )
        if set(message.sealed) != set(self._keys) - {name} or name not in self._keys or not verified:
            raise Refusal(reasons.SHARES_UNVERIFIED, f"shares of {name}")
        self._sealed[name] = message.sealed

    def inboxes(self) -> dict[str, Inbox]:
        """What each member of the shares has to receive. Raises AttemptFailed when too few sent theirs."""
        self._close(Phase.SHARES, len(self._sealed))
        self._members = tuple(sorted(self._sealed))
        boxes: dict[str, Inbox] = {}
        for recipient in self._members:
            sealed = {sender: self._sealed[sender][recipient] for sender in self._members if sender != recipient}
            boxes[recipient] = Inbox(self.attempt.plan, sealed)
            self._pairs |= {(sender, recipient): part.pair for sender, part in sealed.items() if part.pair}
        self._sealed.clear()
        return boxes

    # --- Masked input ---------------------------------------------------------------------------------------------

    def on_masked(self, name: str, message: MaskedInput) -> None:
        """Adds a member's masked vector to the sum. Raises Refusal(vector_differs) for one of another length."""
        self._turn(Phase.MASKED_INPUT, message.plan, name in self._added)
        if name not in self._members:
            raise Refusal(reasons.PHASE_WRONG, f"{name} had no part in the shares")
        try:
            self._sum.add_packed(message.vector)
        except ConfigError as error:
            raise Refusal(reasons.VECTOR_DIFFERS, f"masked input of {name}: {error}") from error
        self._added.append(name)

    def survivors(self) -> Survivors:
        """Whose vectors are in the sum. Raises AttemptFailed when these are too few."""
        self._close(Phase.MASKED_INPUT, len(self._added))
        self._survivors = tuple(sorted(self._added))
        # Only who dropped out needs to have pairs opened; there are few of those, and many pairs.
        left = set(self._survivors)
        self._pairs = {pair: sealed for pair, sealed in self._pairs.items() if not set(pair) <= left}
        return Survivors(self.attempt.plan, self._survivors)

    # --- Consistency ----------------------------------------------------------------------------------------------

    def on_consent(self, name: str, message: Consent) -> None:
        """Takes a survivor's signature. Raises Refusal(signatures_unverified) when it signs anything else."""
        self._turn(Phase.CONSENTS, message.plan, name in self._consents)
        statement = self.attempt.survivors_statement(self._key_list, self._survivors)
        if name not in self._survivors or not self._roster.verifies(name, message.signature, statement):
            raise Refusal(reasons.SIGNATURES_UNVERIFIED, f"consent of {name}")
        self._consents[name] = message.signature

    def consents(self) -> Consents:
        """The signatures, for those who gave one. Raises AttemptFailed when these are fewer than t."""
        self._close(Phase.CONSENTS, len(self._consents), self.attempt.terms.threshold)
        return Consents(self.attempt.plan, dict(sorted(self._consents.items())))

    # --- Unmasking ------------------------------------------------------------------------------------------------

    def on_revealed(self, name: str, message: Revealed) -> None:
        """Takes a member's shares. Raises Refusal(shares_unverified) unless there is a whole one for each name."""
        self._turn(Phase.REVEALED, message.plan, name in self._revealed)
        if (
            name not in self._consents
            or set(message.shares) != set(self._members)
            or any(len(share) != shamir.SHARE_BYTES for share in message.shares.values())
        ):
            raise Refusal(reasons.SHARES_UNVERIFIED, f"shares revealed by {name}")
        self._revealed[name] = message.shares

    def unmask(self) -> Ring:
        """The sum of the survivors' vectors, modulo 2^k, exactly; then everything of the attempt is forgotten.

        Where more than t members revealed their shares, one of them may have told false ones. Raises AttemptFailed when
        fewer than t did, or theirs open to false secrets.
        """
        terms = self.attempt.terms
        self._close(Phase.REVEALED, len(self._revealed), terms.threshold)
        for revealers in _candidates(sorted(self._revealed), terms.threshold):
            try:
                plus, minus = self._masks(revealers)
                break
            except ValueError as error:
                failure = str(error)
        else:
            self._forget()
            raise AttemptFailed(failure)
        total = self._sum.total()
        add_masks(total, plus, minus)
        total &= np.uint32(self.attempt.layout.ring_mask)
        self._forget()
        return total

    def _masks(self, revealers: Sequence[str]) -> tuple[list[bytes], list[bytes]]:
        """Keys of the streams to add and to subtract, from the shares of these. Raises ValueError for false ones."""
        weights = shamir.weights([self.attempt.point(name) for name in revealers])
        plus: list[bytes] = []
        minus: list[bytes] = []
        for name in self._members:
            try:
                secret = shamir.combine(weights, [self._revealed[revealer][name] for revealer in revealers])
                if name in self._survivors:
                    minus.append(self._self_stream(name, secret))
                else:
                    self._take_pairs(name, secret, plus, minus)
            except ValueError as error:
                raise ValueError(f"a secret of {name} cannot be reconstructed: {error}") from error
        return plus, minus

    def _self_stream(self, name: str, seed: bytes) -> bytes:
        if self.attempt.commitment(name, seed) != self._keys[name].commitment:
            raise ValueError("the seed is not the one it committed to")
        return stream_key(self.attempt, self._key_list, "self mask", seed, name)

    def _take_pairs(self, name: str, mask_seed: bytes, plus: list[bytes], minus: list[bytes]) -> None:
        """The masks that every survivor put on for a pair with `name`, who dropped out."""
        attempt = self.attempt
        key = mask_key_of(attempt, name, mask_seed)
        if key.public != self._keys[name].mask_key:
            raise ValueError("the seed is not the one its mask key follows from")
        for survivor in self._survivors:
            lower, higher = sorted((name, survivor))
            if lower == name:
                seed = derive(mask_seed, attempt.pair_statement(self._key_list, lower, higher))
            else:
                seed = key.unseal(self._pairs[lower, higher], attempt.pair_info(self._key_list, lower, higher))
            if len(seed) != SEED_BYTES:
                raise ValueError(f"the seed of its pair with {survivor} has {len(seed)} bytes")
            # The survivor added it as the lower of the two, and subtracted it as the higher.
            side = minus if lower == survivor else plus
            side.append(stream_key(attempt, self._key_list, "pairwise mask", seed, lower, higher))

    # --- Order ----------------------------------------------------------------------------------------------------

    def _turn(self, phase: Phase, plan: str, again: bool) -> None:
        """Raises Refusal for an answer of another attempt, too early or too late, or for the second time."""
        if plan != self.attempt.plan:
            raise Refusal(reasons.ATTEMPT_UNKNOWN, f"an answer to plan {plan!r:.80}")
        if self.phase is not phase or again:
            raise Refusal(reasons.PHASE_WRONG, f"an answer of phase {phase.name} in {self.phase.name}")

    def _close(self, phase: Phase, count: int, needed: int | None = None) -> None:
        if self.phase is not phase:
            raise AttemptFailed(f"the attempt is in phase {self.phase.name}, not {phase.name}")
        needed = self.attempt.terms.survivors if needed is None else needed
        if count < needed:
            self._forget()
            raise AttemptFailed(f"{count} of {len(self.attempt.cohort)} members are left, {needed} are needed")
        self.phase = Phase(phase + 1)

    def _forget(self) -> None:
        self.phase = Phase.OVER
        self._sum = RunningSum(replace(self.attempt.layout, parameters=0))
        for held in (self._keys, self._sealed, self._pairs, self._consents, self._revealed):
            held.clear()

    def __repr__(self) -> str:
        return f"Aggregator(attempt {self.attempt.attempt}, {self.phase.name})"


def _parts(keys: Keys) -> tuple[bytes, bytes, bytes]:
    return keys.share_key, keys.mask_key, keys.commitment


def _candidates(revealers: Sequence[str], threshold: int) -> Iterator[Sequence[str]]:
    """Sets of t revealers to try in turn: the first, then those without one of its members, while there are t."""
    yield revealers[:threshold]
    if len(revealers) > threshold:
        for liar in revealers[:threshold]:
            yield [name for name in revealers if name != liar][:threshold]
