"""Secrets of an attempt: in no log, file, text or exception, of what leaves one half, and overwritten at its end."""

from __future__ import annotations

import logging
from base64 import b64encode
from dataclasses import dataclass

import numpy as np
import pytest

from common.messages import STORAGE_FAILED, Refused
from common.secagg import shamir
from common.secagg.messages import Revealed, Survivors
from common.secagg.participant import Phase
from common.wire import to_wire
from tests.client.secure.attacks import (
    by_an_outsider,
    by_member,
    consents,
    delivered,
    forged,
    lied_about,
    outsider,
    sealed_shares,
    survivors,
)
from tests.client.secure.conftest import ABC, ABCD, A, D, Halves
from tests.federations import PARAMETERS, Federation


def forms(secret: bytes) -> list[bytes]:
    """A secret as it might stand somewhere: raw, in hex, in base64 at any place in a longer text, or as numbers."""
    found = [secret, secret.hex().encode(), secret.hex().upper().encode(), repr(secret)[2:-1].encode()]
    for offset in range(3):
        text = b64encode(bytes(offset) + secret)
        found.append(text[4 if offset else 0 : len(text) // 4 * 4 - 4])
    numbers = list(secret)
    return [*found, ", ".join(map(str, numbers)).encode(), str(int.from_bytes(secret, "big")).encode()]


def contains(text: bytes, secret: bytes) -> bool:
    return any(form in text for form in forms(secret))


@dataclass
class Known:
    """Everything of a member that must not be found anywhere."""

    seeds: list[bytes]
    shares: list[bytes]
    update: list[bytes]
    signing: bytes

    @classmethod
    def of(cls, federation: Federation, name: str) -> Known:
        member = federation.member(name)
        assert member._session is not None
        hidden = member._session.participant._secrets
        vector = member._session.vector
        size = shamir.SHARE_BYTES
        pieces = [vector[at : at + 4] for at in range(0, PARAMETERS - 3, 4)]
        return cls(
            seeds=[bytes(seed) for seed in (hidden.share_seed, hidden.mask_seed, hidden.self_seed)],
            shares=[bytes(part) for held in hidden.shares.values() for part in (held[:size], held[size:])],
            update=[piece.tobytes() for piece in pieces]
            + [text for piece in pieces for text in (", ".join(map(str, piece)).encode(), str(piece)[1:-1].encode())],
            signing=federation.identities[name]._key.private_bytes_raw(),
        )

    def everything(self) -> list[bytes]:
        return [*self.seeds, *self.shares, *self.update, self.signing]


def everything_written(federation: Federation, caplog: pytest.LogCaptureFixture) -> bytes:
    """All files below the members' homes, and all lines of all logs with their tracebacks."""
    formatter = logging.Formatter("%(name)s %(message)s")
    logged = "\n".join(formatter.format(record) for record in caplog.records)
    files = b"".join(f.name.encode() + f.read_bytes() for f in federation.root.rglob("*") if f.is_file())
    return files + logged.encode()


def test_no_log_no_file_no_text_form_and_no_exception_shows_a_secret(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Over attacks in every phase, a round with a dropout and a crash, with every log at its most talkative."""
    caplog.set_level(logging.DEBUG)
    known: set[bytes] = set()
    shown: list[str] = []

    def look(*names: str) -> None:
        for name in names:
            known.update(Known.of(federation, name).everything())
            member = federation.member(name)
            assert member._session is not None
            participant = member._session.participant
            held = (member, member._session, participant, participant._secrets, federation.identities[name])
            shown.extend([*map(repr, held), *map(str, held), repr(federation.seats[name])])

    unreadable = delivered(A, by_member(D, A, shares=lambda c, s: sealed_shares(c, D, A, bytes(131))))
    forgery = delivered(A, forged("outsider"))
    for attack in (lied_about(outsider), forgery, unreadable, survivors(A), consents(by_an_outsider)):
        federation.spent += 10
        _, victim, lie = attack(federation)
        look(*ABCD)
        assert isinstance(federation.ask(victim, lie), Refused)
    last = federation.coordinator(federation.plan(2, ABC, first=4))
    last.masked()
    look(*ABC)
    assert last.sum().tobytes() == federation.total(last.plan, ABC).tobytes()
    crash = federation.coordinator(federation.plan(3, ABC, first=4))
    named = crash.masked()
    look(*ABC)
    federation.marks(A).unlink()
    assert federation.ask(A, named) == Refused(STORAGE_FAILED, A)
    shown.extend(repr(reply) for _, reply in federation.sent)
    written = everything_written(federation, caplog) + "\n".join(shown).encode()
    assert b"Traceback" in written
    assert b"marks.json" in written
    assert len(known) > 200
    assert not [secret for secret in known if contains(written, secret)]


def test_the_search_for_secrets_would_find_one() -> None:
    secret = bytes(range(40, 72))
    encoded = b64encode(secret), b64encode(b"ab" + secret + b"c"), secret.hex().encode(), repr(secret).encode()
    for text in (secret, *encoded, str(list(secret)).encode()):
        assert contains(b"something " + text + b" more", secret)
    assert not contains(b64encode(bytes(100)), secret)


def test_of_all_that_leaves_a_member_only_one_half_of_its_shares_is_a_secret(federation: Federation) -> None:
    coordinator = federation.coordinator()
    coordinator.masked(without=(D,))
    known = {name: Known.of(federation, name) for name in ABC}
    halves = {name: Halves.of(federation.member(name)) for name in ABC}
    coordinator.sum()
    revealed = {name: reply for name, reply in federation.sent if isinstance(reply, Revealed)}
    wires = [to_wire(reply) for _, reply in federation.sent if not isinstance(reply, Revealed)]
    sent = b"".join(wire.text.encode() + b"".join(a.tobytes() for a in wire.arrays.values()) for wire in wires)
    for name in ABC:
        assert not [secret for secret in known[name].everything() if contains(sent, secret)]
        other = [halves[name].of_mask_seed[n] for n in ABC] + [halves[name].of_self_seed[D]]
        assert not [share for share in other if contains(to_wire(revealed[name]).text.encode(), share)]
        assert not [seed for seed in known[name].seeds if contains(to_wire(revealed[name]).text.encode(), seed)]


@pytest.mark.parametrize("end", ["sum", "refusal", "next attempt"])
def test_secrets_are_overwritten_when_the_attempt_ends(end: str, federation: Federation) -> None:
    coordinator = federation.coordinator()
    coordinator.masked()
    session = federation.member(A)._session
    assert session is not None
    hidden = session.participant._secrets
    buffers = [hidden.share_seed, hidden.mask_seed, hidden.self_seed, *hidden.shares.values()]
    assert all(any(buffer) for buffer in buffers)
    if end == "sum":
        coordinator.sum()
    elif end == "refusal":
        federation.ask(A, Survivors(coordinator.plan.digest(), (A,)))
    else:
        federation.announce(A, federation.plan(2))
    assert not any(any(buffer) for buffer in buffers)
    assert session.participant.phase is Phase.OVER


def test_in_deployment_no_attempt_can_be_taken_out_of_a_member_or_put_into_one(federation: Federation) -> None:
    federation.coordinator().shares()
    with pytest.raises(RuntimeError, match="only in a simulation"):
        federation.member(A).snapshot()
    with pytest.raises(RuntimeError, match="only in a simulation"):
        federation.member(A).restore(("", np.zeros(0, np.uint32), np.zeros(0, np.float32)))
