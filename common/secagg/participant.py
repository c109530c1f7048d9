"""A member's side of one attempt, as a state machine: one method for each message that comes, in one order only.

What it guarantees against a coordinator that colludes with up to T members, and lies: of this member's vector the
coordinator learns only its part in one sum over at least `terms.survivors` names. For that it
- uses fresh keys, and takes others' keys only under their signatures by the roster that the member itself holds;
- accepts shares only from whom they claim to come, under the very list of keys that it was shown itself;
- puts its vector under its own mask and one for each pair;
- consents to one survivor set, and reveals only after t members consented to the same one;
- reveals, once, exactly one of the two secrets of each name.

Whatever it refuses ends the attempt for it: its secrets are wiped, and it answers nothing more but a reason code.
"""

from __future__ import annotations

import enum
import json
import secrets
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import numpy as np

from common.errors import Refusal
from common.fixed_point import Ring, pack
from common.secagg import reasons, shamir
from common.secagg.attempt import Attempt, key_list_digest
from common.secagg.identity import Identity, Roster
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
from common.secagg.sealing import SEED_BYTES, PrivateKey, derive, seal


class Phase(enum.Enum):
    """Which message a participant waits for."""

    KEY_LIST = "key list"
    INBOX = "inbox"
    SURVIVORS = "survivors"
    CONSENTS = "consents"
    OVER = "nothing: the attempt is over"


@dataclass
class _Secrets:
    """What must not outlive the attempt. Held in byte arrays, which can be overwritten; bytes of Python cannot."""

    share_seed: bytearray = field(default_factory=lambda: bytearray(secrets.token_bytes(SEED_BYTES)), repr=False)
    mask_seed: bytearray = field(default_factory=lambda: bytearray(secrets.token_bytes(SEED_BYTES)), repr=False)
    self_seed: bytearray = field(default_factory=lambda: bytearray(secrets.token_bytes(SEED_BYTES)), repr=False)
    # By name: this member's shares of that name's self-mask seed and mask seed, one after the other.
    shares: dict[str, bytearray] = field(default_factory=dict, repr=False)

    def wipe(self) -> None:
        for secret in (self.share_seed, self.mask_seed, self.self_seed, *self.shares.values()):
            secret[:] = bytes(len(secret))
        self.shares.clear()


class Participant:
    """One member in one attempt. Not for two threads at once; whoever owns it holds a lock.

    simulated: whether `snapshot_for_simulation` may take its secrets out of this process; never in deployment.
    """

    def __init__(self, attempt: Attempt, identity: Identity, roster: Roster, simulated: bool = False) -> None:
        self.attempt = attempt
        self.phase = Phase.KEY_LIST
        self.simulated = simulated
        self._identity = identity
        self._roster = roster
        self._secrets = _Secrets()
        self._keys: Mapping[str, Keys] = {}
        self._key_list = b""  # digest of the list of keys
        self._members: tuple[str, ...] = ()  # who took part in the shares, this member included
        self._survivors: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self._identity.name

    def keys(self) -> Keys:
        """The signed public keys of this attempt; the same whenever it is asked.

        Raises Refusal(attempt_over) once its secrets are wiped: keys that follow from zeros would be anyone's.
        """
        if self.phase is Phase.OVER:
            raise Refusal(reasons.ATTEMPT_OVER, "this attempt ended here")
        attempt, mine = self.attempt, self._secrets
        unsigned = Keys(
            plan=attempt.plan,
            share_key=self._share_key().public,
            mask_key=self._mask_key().public,
            commitment=attempt.commitment(self.name, bytes(mine.self_seed)),
            signature=b"",
        )
        return _signed(unsigned, self._identity.sign(attempt.keys_statement(self.name, unsigned)))

    def on_key_list(self, message: KeyList) -> Shares:
        """Verifies everyone's keys and seals for each other member its shares and, for higher names, the pair's seed.

        Raises Refusal(keys_unverified) for a name outside the cohort, a signature that the roster does not confirm, a
        key that two names share, or a list in which this member's own keys are not its own; too_few_left.
        """
        with self._in(Phase.KEY_LIST, message.plan):
            self._require_enough(len(message.keys))
            self._check_keys(message.keys)
            self._keys = dict(message.keys)
            self._key_list = key_list_digest(self.attempt, self._keys)
            sealed = self._seal()
            self.phase = Phase.INBOX
            return Shares(self.attempt.plan, sealed)

    def on_inbox(self, message: Inbox, vector: Ring) -> MaskedInput:
        """Takes in the others' shares and answers with `vector` [layout.length], uint32, under all masks.

        Raises Refusal(shares_unverified) for a sender that has no key, a missing or superfluous part, or a signature
        that is not the sender's under this very list of keys; shares_unreadable for what cannot be opened;
        vector_differs for a vector of another length; too_few_left.
        """
        with self._in(Phase.INBOX, message.plan):
            senders = sorted(message.sealed)
            self._require_enough(len(senders) + 1)
            for sender in senders:
                self._check_sealed(sender, message.sealed[sender])
            plus = [self._stream_key("self mask", self._secrets.self_seed, self.name)]
            minus: list[bytes] = []
            mask_key, share_key = self._mask_key(), self._share_key()
            for sender in senders:
                seed = self._open(sender, message.sealed[sender], share_key, mask_key)
                lower, higher = sorted((self.name, sender))
                side = plus if lower == self.name else minus
                side.append(self._stream_key("pairwise mask", seed, lower, higher))
            if vector.shape != (self.attempt.layout.length,):
                raise Refusal(reasons.VECTOR_DIFFERS, f"a vector of {vector.shape}, the layout has another length")
            masked = vector.copy()
            add_masks(masked, plus, minus)
            self._members = tuple(sorted((self.name, *senders)))
            self.phase = Phase.SURVIVORS
            masked &= np.uint32(self.attempt.layout.ring_mask)
            return MaskedInput(self.attempt.plan, pack(masked, self.attempt.layout.ring_bits))

    def on_survivors(self, message: Survivors, commit: Callable[[tuple[str, ...]], None]) -> Consent:
        """Consents to the survivor set.

        commit: called with the set before it is signed; it must keep it for good, and raise when this member consented
        to another set for the same run and global adapter.
        Raises Refusal(survivors_unknown) for a set that is not in order, without this member, or with a name that had
        no part in the shares; too_few_left; and what `commit` raises.
        """
        with self._in(Phase.SURVIVORS, message.plan):
            names = message.names
            if list(names) != sorted(set(names)) or self.name not in names or not set(names) <= set(self._members):
                raise Refusal(reasons.SURVIVORS_UNKNOWN, f"survivors {names!r:.400}, members {self._members}")
            self._require_enough(len(names))
            commit(names)
            self._survivors = names
            self.phase = Phase.CONSENTS
            return Consent(self.attempt.plan, self._identity.sign(self._survivors_statement()))

    def on_consents(self, message: Consents) -> Revealed:
        """Reveals one share for each member: a survivor's of its self-mask seed, anyone else's of its mask seed.

        Then the attempt is over, and its secrets are wiped. Raises Refusal(signatures_unverified) unless at least t
        survivors, and nobody else, signed the very set that this member signed.
        """
        with self._in(Phase.CONSENTS, message.plan):
            statement = self._survivors_statement()
            for name, signature in message.signatures.items():
                if name not in self._survivors or not self._roster.verifies(name, signature, statement):
                    raise Refusal(reasons.SIGNATURES_UNVERIFIED, f"{name!r:.200} did not sign the same survivors")
            if len(message.signatures) < self.attempt.terms.threshold:
                raise Refusal(
                    reasons.SIGNATURES_UNVERIFIED,
                    f"{len(message.signatures)} consents, the threshold is {self.attempt.terms.threshold}",
                )
            size = shamir.SHARE_BYTES
            revealed = {
                name: bytes(self._secrets.shares[name][:size] if name in self._survivors else held[size:])
                for name, held in self._secrets.shares.items()
            }
            self.wipe()
            return Revealed(self.attempt.plan, revealed)

    def wipe(self) -> None:
        """Ends the attempt here: overwrites its secrets and answers nothing more."""
        self._secrets.wipe()
        self.phase = Phase.OVER

    # --- Checks ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _in(self, phase: Phase, plan: str) -> Iterator[None]:
        """Runs a step if it is that phase's turn; whatever goes wrong in it ends the attempt.

        A message of another plan is none of this attempt's, and changes nothing in it.
        """
        if plan != self.attempt.plan:
            raise Refusal(reasons.ATTEMPT_UNKNOWN, f"a message of plan {plan!r:.80}")
        if self.phase is Phase.OVER:
            raise Refusal(reasons.ATTEMPT_OVER, "this attempt ended here")
        try:
            if self.phase is not phase:
                raise Refusal(reasons.PHASE_WRONG, f"expected {self.phase.value}, found {phase.value}")
            yield
        except BaseException:
            self.wipe()
            raise

    def _require_enough(self, count: int) -> None:
        if count < self.attempt.terms.survivors:
            raise Refusal(reasons.TOO_FEW_LEFT, f"{count} members are left, expected {self.attempt.terms.survivors}")

    def _check_keys(self, keys: Mapping[str, Keys]) -> None:
        if keys.get(self.name) != self.keys():
            raise Refusal(reasons.KEYS_UNVERIFIED, "the list does not hold this member's own keys")
        for name, entry in keys.items():
            if not verified_keys(self.attempt, self._roster, name, entry):
                raise Refusal(reasons.KEYS_UNVERIFIED, f"keys of {name!r:.200} are not signed by who the roster names")
        parts = [part for entry in keys.values() for part in (entry.share_key, entry.mask_key, entry.commitment)]
        if len(set(parts)) < len(parts):
            raise Refusal(reasons.KEYS_UNVERIFIED, "one key came twice")

    def _check_sealed(self, sender: str, sealed: Sealed) -> None:
        if sender == self.name or not verified_sealed(
            self.attempt, self._roster, self._key_list, self._keys, sender, self.name, sealed
        ):
            raise Refusal(reasons.SHARES_UNVERIFIED, f"what came from {sender!r:.200} is not its own, or not for here")

    # --- Secrets --------------------------------------------------------------------------------------------------

    def _share_key(self) -> PrivateKey:
        return PrivateKey(self._secrets.share_seed, self.attempt.statement("share key", self.name))

    def _mask_key(self) -> PrivateKey:
        return mask_key_of(self.attempt, self.name, self._secrets.mask_seed)

    def _pair_seed(self, lower: str, higher: str) -> bytes:
        return derive(self._secrets.mask_seed, self.attempt.pair_statement(self._key_list, lower, higher))

    def _stream_key(self, purpose: str, seed: bytes | bytearray, *names: str) -> bytes:
        return stream_key(self.attempt, self._key_list, purpose, seed, *names)

    def _survivors_statement(self) -> bytes:
        return self.attempt.survivors_statement(self._key_list, self._survivors)

    def _seal(self) -> dict[str, Sealed]:
        """Splits both secrets among all names of the list, keeps its own part, and seals the others'."""
        attempt, mine = self.attempt, self._secrets
        points = len(attempt.cohort)
        self_shares = shamir.split(mine.self_seed, attempt.terms.threshold, points)
        mask_shares = shamir.split(mine.mask_seed, attempt.terms.threshold, points)
        sealed: dict[str, Sealed] = {}
        for name, entry in self._keys.items():
            both = self_shares[attempt.point(name) - 1] + mask_shares[attempt.point(name) - 1]
            if name == self.name:
                mine.shares[name] = bytearray(both)
                continue
            pair = b""
            try:
                shares = seal(both, entry.share_key, attempt.shares_info(self._key_list, self.name, name))
                if self.name < name:
                    info = attempt.pair_info(self._key_list, self.name, name)
                    pair = seal(self._pair_seed(self.name, name), entry.mask_key, info)
            except ValueError as error:
                raise Refusal(reasons.KEYS_UNVERIFIED, f"a key of {name} is none: {error}") from error
            statement = attempt.sealed_statement(self._key_list, self.name, name, shares, pair)
            sealed[name] = Sealed(shares, pair, self._identity.sign(statement))
        return sealed

    def _open(self, sender: str, sealed: Sealed, share_key: PrivateKey, mask_key: PrivateKey) -> bytes:
        """Keeps the sender's shares and returns the seed of the pair."""
        attempt = self.attempt
        try:
            both = share_key.unseal(sealed.shares, attempt.shares_info(self._key_list, sender, self.name))
            if len(both) != 2 * shamir.SHARE_BYTES:
                raise ValueError(f"expected two shares, found {len(both)} bytes")
            if self.name < sender:
                seed = self._pair_seed(self.name, sender)
            else:
                seed = mask_key.unseal(sealed.pair, attempt.pair_info(self._key_list, sender, self.name))
            if len(seed) != SEED_BYTES:
                raise ValueError(f"expected a seed of {SEED_BYTES} bytes, found {len(seed)}")
        except ValueError as error:
            raise Refusal(reasons.SHARES_UNREADABLE, f"what {sender} sealed cannot be opened: {error}") from error
        self._secrets.shares[sender] = bytearray(both)
        return seed

    def __repr__(self) -> str:
        return f"Participant({self.name!r}, attempt {self.attempt.attempt}, waits for {self.phase.value})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a participant is never pickled: the secrets of a round stay in one process")


def _signed(keys: Keys, signature: bytes) -> Keys:
    return Keys(keys.plan, keys.share_key, keys.mask_key, keys.commitment, signature)


# --- What both sides compute ---------------------------------------------------------------------------------------


def verified_keys(attempt: Attempt, roster: Roster, name: str, keys: Keys) -> bool:
    """Whether `name` is invited and announced these keys for this attempt."""
    return (
        name in attempt.cohort
        and keys.plan == attempt.plan
        and roster.verifies(name, keys.signature, attempt.keys_statement(name, keys))
    )


def verified_sealed(
    attempt: Attempt,
    roster: Roster,
    key_list: bytes,
    keys: Mapping[str, Keys],
    sender: str,
    recipient: str,
    sealed: Sealed,
) -> bool:
    """Whether `sender` sealed this for `recipient` under that list of keys, with a pair seed if it is its to choose."""
    statement = attempt.sealed_statement(key_list, sender, recipient, sealed.shares, sealed.pair)
    return (
        sender in keys
        and bool(sealed.pair) == (sender < recipient)
        and roster.verifies(sender, sealed.signature, statement)
    )


def mask_key_of(attempt: Attempt, name: str, mask_seed: bytes | bytearray) -> PrivateKey:
    """The key pair that follows from a mask seed."""
    return PrivateKey(mask_seed, attempt.statement("mask key", name))


def stream_key(attempt: Attempt, key_list: bytes, purpose: str, seed: bytes | bytearray, *names: str) -> bytes:
    """The key of a mask's stream: of a `self mask` of one name, or of the `pairwise mask` of two."""
    return derive(seed, attempt.statement(purpose, key_list, *names))


# --- Simulation ----------------------------------------------------------------------------------------------------


def snapshot_for_simulation(participant: Participant) -> str:
    """All of a simulated participant's state, secrets included, for an engine that plays it in another process next.

    The one function that takes round secrets out of a participant. Raises RuntimeError for one that is not simulated.
    """
    if not participant.simulated:
        raise RuntimeError("round secrets leave a process only in a simulation")
    hidden = participant._secrets
    state = {
        "phase": participant.phase.name,
        "seeds": [b64encode(seed).decode() for seed in (hidden.share_seed, hidden.mask_seed, hidden.self_seed)],
        "shares": {name: b64encode(held).decode() for name, held in hidden.shares.items()},
        "keys": {
            name: {part: b64encode(value).decode() for part, value in asdict(keys).items() if part != "plan"}
            for name, keys in participant._keys.items()
        },
        "members": participant._members,
        "survivors": participant._survivors,
    }
    return json.dumps(state)


def restore_in_simulation(snapshot: str, attempt: Attempt, identity: Identity, roster: Roster) -> Participant:
    """The participant that `snapshot_for_simulation` saw."""
    state = json.loads(snapshot)
    found = Participant(attempt, identity, roster, simulated=True)
    found.phase = Phase[state["phase"]]
    seeds = (bytearray(b64decode(seed)) for seed in state["seeds"])
    shares = {name: bytearray(b64decode(held)) for name, held in state["shares"].items()}
    share_seed, mask_seed, self_seed = seeds
    found._secrets = _Secrets(share_seed, mask_seed, self_seed, shares)
    found._keys = {
        name: Keys(attempt.plan, **{part: b64decode(value) for part, value in keys.items()})
        for name, keys in state["keys"].items()
    }
    found._key_list = key_list_digest(attempt, found._keys) if found._keys else b""
    found._members, found._survivors = tuple(state["members"]), tuple(state["survivors"])
    return found
