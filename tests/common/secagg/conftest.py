"""Whole attempts, played step by step and kept, so that a test can take any moment of one and change what comes."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import Refusal
from common.fixed_point import Layout, Ring, encode
from common.secagg import reasons
from common.secagg.aggregator import Aggregator
from common.secagg.attempt import Attempt, key_list_digest
from common.secagg.identity import Identity, Roster
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
    ToMember,
)
from common.secagg.participant import Participant, Phase, restore_in_simulation, snapshot_for_simulation
from common.secagg.sealing import seal
from common.secagg.terms import Terms, smallest_cohort, threshold

NAMES = ("alder", "birch", "cedar", "elm", "fir", "gum", "holly", "ivy", "juniper")
IDENTITIES = {name: Identity.generate(name) for name in NAMES}
ROSTER = Roster.of(*IDENTITIES.values())
PARAMETERS = 50
PHASES = (Phase.KEY_LIST, Phase.INBOX, Phase.SURVIVORS, Phase.CONSENTS)


def make_attempt(
    cohort: int | tuple[str, ...] = 5,
    colluders: int = 1,
    smallest: int | None = None,
    members: int | None = None,
    t: int | None = None,
    parameters: int = PARAMETERS,
    number: int = 1,
    run: str = "run-1",
    plan: str = "",
) -> Attempt:
    """An attempt of the first names of the roster; where nothing is said, with the least that is safe."""
    names = NAMES[:cohort] if isinstance(cohort, int) else cohort
    members = len(names) if members is None else members
    terms = Terms(
        members, colluders, t or threshold(members, colluders), smallest or max(smallest_cohort(colluders), 3)
    )
    return Attempt(
        run, 2, number, plan or f"plan of attempt {number}", names, terms, Layout(parameters, members, 1.0, 16, 4)
    )


def make_vector(attempt: Attempt, seed: int) -> Ring:
    rng = np.random.default_rng(seed)
    update = rng.normal(0, 0.3, attempt.layout.parameters).astype(np.float32)
    return encode(update, 3, {"train_tokens": seed}, attempt.layout, rng)


def plain_sum(vectors: Iterable[Ring], layout: Layout) -> Ring:
    """The sum modulo 2^k as Python's own integers give it."""
    total = np.sum([vector.astype(object) for vector in vectors], axis=0) % 2**layout.ring_bits
    return total.astype(np.uint32)


@dataclass
class Held:
    """What a member holds, as a simulation may see it: the secrets that a test needs to check what others say."""

    share_seed: bytes
    mask_seed: bytes
    self_seed: bytes
    shares: dict[str, bytes]  # by the name whose secrets they are of: of the self-mask seed, then of the mask seed


def held_by(snapshot: str) -> Held:
    state = json.loads(snapshot)
    share_seed, mask_seed, self_seed = (b64decode(seed) for seed in state["seeds"])
    return Held(share_seed, mask_seed, self_seed, {name: b64decode(both) for name, both in state["shares"].items()})


@dataclass
class Played:
    """One attempt, with every message of it, and every member as it was before each message that came to it."""

    attempt: Attempt
    vectors: dict[str, Ring]
    before: dict[Phase, dict[str, str]] = field(default_factory=dict)  # snapshots by who waits for that message
    keys: dict[str, Keys] = field(default_factory=dict)
    key_list: KeyList = field(default_factory=lambda: KeyList("", {}))
    shares: dict[str, Shares] = field(default_factory=dict)
    inboxes: dict[str, Inbox] = field(default_factory=dict)
    masked: dict[str, MaskedInput] = field(default_factory=dict)
    survivors: Survivors = field(default_factory=lambda: Survivors("", ()))
    consent: dict[str, Consent] = field(default_factory=dict)
    consents: Consents = field(default_factory=lambda: Consents("", {}))
    revealed: dict[str, Revealed] = field(default_factory=dict)
    total: Ring = field(default_factory=lambda: np.zeros(0, np.uint32))

    def member(self, name: str, waits_for: Phase) -> Participant:
        """That member as it was when it waited for that message."""
        return restore_in_simulation(self.before[waits_for][name], self.attempt, IDENTITIES[name], ROSTER)

    def message(self, name: str, phase: Phase) -> ToMember:
        """What came to `name` in that phase."""
        match phase:
            case Phase.KEY_LIST:
                return self.key_list
            case Phase.INBOX:
                return self.inboxes[name]
            case Phase.SURVIVORS:
                return self.survivors
            case _:
                return self.consents

    def give(self, member: Participant, message: ToMember) -> Any:
        return give(member, message, self.vectors[member.name])

    @property
    def digest(self) -> bytes:
        """Of the list of keys."""
        return key_list_digest(self.attempt, self.key_list.keys)

    def held(self, name: str) -> Held:
        """What that member held once it had everyone's shares; of one without, what it held before."""
        for phase in (Phase.SURVIVORS, Phase.INBOX, Phase.KEY_LIST):
            if name in self.before[phase]:
                return held_by(self.before[phase][name])
        raise KeyError(name)

    def secrets(self) -> list[bytes]:
        """Every secret of every member."""
        found = []
        for name in self.before[Phase.KEY_LIST]:
            held = self.held(name)
            found += [held.share_seed, held.mask_seed, held.self_seed]
            found += [share for both in held.shares.values() for share in (both[:66], both[66:])]
        return found

    def sealed_by(
        self, sender: str, recipient: str, shares: bytes | None = None, pair: bytes | None = None, *, raw: bool = False
    ) -> Sealed:
        """What a member who lies, but signs, may seal: any contents; `raw`: any ciphertexts."""
        attempt, entry, good = self.attempt, self.key_list.keys[recipient], self.shares[sender].sealed[recipient]
        if shares is None:
            shares = good.shares
        elif not raw:
            shares = seal(shares, entry.share_key, attempt.shares_info(self.digest, sender, recipient))
        if pair is None:
            pair = good.pair
        elif not raw:
            pair = seal(pair, entry.mask_key, attempt.pair_info(self.digest, sender, recipient))
        statement = attempt.sealed_statement(self.digest, sender, recipient, shares, pair)
        return Sealed(shares, pair, IDENTITIES[sender].sign(statement))


def give(member: Participant, message: ToMember, vector: Ring) -> Any:
    """Hands a member any message; it consents to whatever set it can."""
    match message:
        case KeyList():
            return member.on_key_list(message)
        case Inbox():
            return member.on_inbox(message, vector)
        case Survivors():
            return member.on_survivors(message, lambda names: None)
        case Consents():
            return member.on_consents(message)


def play(
    attempt: Attempt,
    vectors: Mapping[str, Ring],
    silent: Mapping[str, str] | None = None,
    change: Callable[[str, Any], Any] = lambda name, answer: answer,
) -> Played:
    """Plays an attempt to its end.

    silent: by name, the first thing that this member does not say: keys, shares, masked, consent or revealed.
    change: what becomes of an answer on its way; a member that lies.
    Raises what the aggregator raises; what was said until then stands in the error's `played`.
    """
    silent, vectors = dict(silent or {}), dict(vectors)
    played = Played(attempt, vectors, {phase: {} for phase in PHASES})
    aggregator = Aggregator(attempt, ROSTER)
    members = {name: Participant(attempt, IDENTITIES[name], ROSTER, simulated=True) for name in attempt.cohort}

    def speaking(kind: str, among: Iterable[str]) -> Iterator[str]:
        for name in list(among):
            if silent.get(name) == kind:
                del members[name]
            elif name in members:
                yield name

    def keep(phase: Phase) -> None:
        played.before[phase] = {name: snapshot_for_simulation(member) for name, member in members.items()}

    try:
        keep(Phase.KEY_LIST)
        for name in speaking("keys", attempt.cohort):
            played.keys[name] = change(name, members[name].keys())
            aggregator.on_keys(name, played.keys[name])
        played.key_list = aggregator.key_list()
        for name in speaking("shares", played.keys):
            played.shares[name] = change(name, members[name].on_key_list(played.key_list))
            aggregator.on_shares(name, played.shares[name])
        keep(Phase.INBOX)
        played.inboxes = aggregator.inboxes()
        for name in speaking("masked", played.shares):
            played.masked[name] = change(name, members[name].on_inbox(played.inboxes[name], vectors[name]))
            aggregator.on_masked(name, played.masked[name])
        keep(Phase.SURVIVORS)
        played.survivors = aggregator.survivors()
        for name in speaking("consent", played.masked):
            played.consent[name] = change(name, members[name].on_survivors(played.survivors, lambda names: None))
            aggregator.on_consent(name, played.consent[name])
        keep(Phase.CONSENTS)
        played.consents = aggregator.consents()
        for name in speaking("revealed", played.consent):
            played.revealed[name] = change(name, members[name].on_consents(played.consents))
            aggregator.on_revealed(name, played.revealed[name])
        played.total = aggregator.unmask()
    except Exception as error:
        error.played, error.aggregator = played, aggregator  # type: ignore[attr-defined]
        raise
    return played


@pytest.fixture(scope="session")
def played() -> Played:
    """Five members, of whom elm falls silent after the shares: both kinds of secrets are revealed."""
    attempt = make_attempt(5)
    vectors = {name: make_vector(attempt, seed) for seed, name in enumerate(attempt.cohort)}
    return play(attempt, vectors, {"elm": "masked"})


def collector(played: Played, until: str) -> Aggregator:
    """The coordinator of that attempt when it collects `until`: keys, shares, masked, consent or revealed."""
    found = Aggregator(played.attempt, ROSTER)
    for kind, said, take, close in (
        ("keys", played.keys, found.on_keys, found.key_list),
        ("shares", played.shares, found.on_shares, found.inboxes),
        ("masked", played.masked, found.on_masked, found.survivors),
        ("consent", played.consent, found.on_consent, found.consents),
        ("revealed", played.revealed, found.on_revealed, found.unmask),
    ):
        if kind == until:
            return found
        for name, message in said.items():
            take(name, message)  # type: ignore[operator]
        close()
    return found


# --- What nobody may show -------------------------------------------------------------------------------------------


def written(secret: bytes) -> set[str]:
    """Every way in which bytes are likely to be written down."""
    return {
        repr(secret)[2:-1],
        secret.decode("latin-1"),
        secret.hex(),
        secret.hex().upper(),
        b64encode(secret).decode().rstrip("="),
        str(int.from_bytes(secret, "big")),
        str(int.from_bytes(secret, "little")),
        ", ".join(map(str, secret)),
        " ".join(map(str, secret)),
    }


def assert_hidden(text: str, secrets: Iterable[bytes]) -> None:
    for secret in secrets:
        assert any(secret), "wiped, so this would show nothing"
        for form in written(secret):
            assert form not in text


def texts_of(found: object) -> str:
    return "\n".join((repr(found), str(found), f"{found}", f"{found!a}", f"{[found]} { ({'a': found}) }"))


# --- Refusals -------------------------------------------------------------------------------------------------------


def refused(call: Callable[[], object]) -> str:
    """The reason of the refusal that `call` must raise."""
    with pytest.raises(Refusal) as caught:
        call()
    assert caught.value.reason in reasons.REASONS
    return caught.value.reason


def assert_ends(played: Played, member: Participant, message: ToMember, reason: str) -> None:
    """The member refuses for that reason, wipes its secrets, shows none of them, and answers nothing more."""
    hidden = member._secrets
    before = held_by(snapshot_for_simulation(member))
    shares = list(hidden.shares.values())
    with pytest.raises(Refusal) as caught:
        played.give(member, message)
    assert caught.value.reason == reason
    secrets = [before.share_seed, before.mask_seed, before.self_seed, *before.shares.values()]
    assert_hidden(texts_of(caught.value) + texts_of(caught.value.__cause__) + texts_of(member), secrets)
    assert_wiped(member)
    assert not any(any(share) for share in shares)
    for phase in PHASES:
        assert refused(lambda phase=phase: played.give(member, played.message(member.name, phase))) == (
            reasons.ATTEMPT_OVER
        )
    assert refused(member.keys) == reasons.ATTEMPT_OVER


def assert_wiped(member: Participant) -> None:
    hidden = member._secrets
    assert member.phase is Phase.OVER
    for seed in (hidden.share_seed, hidden.mask_seed, hidden.self_seed):
        assert seed == bytes(32)
    assert not hidden.shares


def everything_in(found: object, seen: set[int] | None = None) -> Iterator[bytes | NDArray[Any]]:
    """All bytes and arrays that an object reaches."""
    seen = set() if seen is None else seen
    if id(found) in seen:
        return
    seen.add(id(found))
    if isinstance(found, (bytes, bytearray)):
        yield bytes(found)
    elif isinstance(found, np.ndarray):
        yield found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from everything_in(key, seen)
            yield from everything_in(value, seen)
    elif isinstance(found, (list, tuple, set, frozenset)):
        for part in found:
            yield from everything_in(part, seen)
    elif hasattr(found, "__dict__"):
        yield from everything_in(vars(found), seen)
