"""What is refused of the messages of secure aggregation, phase by phase."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.messages import INTERNAL_ERROR, STORAGE_FAILED
from common.secagg import reasons
from common.secagg.attempt import key_list_digest
from common.secagg.messages import Consents, Inbox, KeyList, Sealed, Survivors
from tests.client.border.changes import full_disk, restart, write
from tests.client.border.conftest import MARK, NOBODY, Border, Case, Make, refuses
from tests.client.conftest import NAMES
from tests.client.guarded import ME, OTHERS

STEPS = (KeyList, Inbox, Survivors, Consents)


def first_of(found: Iterable[str]) -> str:
    return next(name for name in found if name != ME)


def without_me(listed: KeyList) -> KeyList:
    return replace(listed, keys={name: found for name, found in listed.keys.items() if name != ME})


def swapped(listed: KeyList) -> KeyList:
    one, other = OTHERS
    return replace(listed, keys={**listed.keys, one: listed.keys[other], other: listed.keys[one]})


def alone(listed: KeyList) -> KeyList:
    return replace(listed, keys={ME: listed.keys[ME]})


def false_sealed(box: Inbox) -> Inbox:
    sender = first_of(box.sealed)
    return replace(box, sealed={**box.sealed, sender: replace(box.sealed[sender], signature=bytes(64))})


def closed_sealed(border: Border, box: Inbox) -> Inbox:
    """A member seals rubbish, and signs it."""
    sender, attempt = first_of(box.sealed), border.attempt.plan.attempt
    listed = key_list_digest(attempt, border.attempt.listed.keys)
    honest = box.sealed[sender]
    said = attempt.sealed_statement(listed, sender, ME, bytes(1268), honest.pair)
    rubbish = Sealed(bytes(1268), honest.pair, border.place.identities[sender].sign(said))
    return replace(box, sealed={**box.sealed, sender: rubbish})


def consented_otherwise(border: Border) -> None:
    """The marks say that it consented to another set."""
    marks = json.loads(border.place.marks.read_text())
    for one in marks["sums"].values():
        one["survivors"] = [ME, MARK]
    border.place.marks.write_text(json.dumps(marks))


def another_vector(border: Border) -> None:
    secure = border.member.secure
    assert secure is not None
    assert secure._session is not None
    secure._session.vector = np.zeros(11, np.uint32)


def exhausted(border: Border) -> None:
    """Memory ends in the middle of a phase."""
    secure = border.member.secure
    assert secure is not None
    assert secure._session is not None

    def never(*_: Any) -> Any:
        raise MemoryError(f"{MARK} in {border.place.records}")

    for name in ("on_key_list", "on_inbox", "on_survivors", "on_consents"):
        border.patches.setattr(secure._session.participant, name, never)


def in_an_attempt(asked: type[Any]) -> list[Case]:
    """What every later message of an attempt can meet."""
    wrong = {KeyList: Inbox, Inbox: KeyList, Survivors: Consents, Consents: Survivors}[asked]
    early: dict[type[Any], Any] = {
        KeyList: lambda b: KeyList(b.attempt.plan.digest(), {}),
        Inbox: lambda b: Inbox(b.attempt.plan.digest(), {}),
        Survivors: lambda b: Survivors(b.attempt.plan.digest(), NAMES),
        Consents: lambda b: Consents(b.attempt.plan.digest(), {}),
    }
    return [
        Case("of another plan", asked, reasons.ATTEMPT_UNKNOWN, change=lambda b, r: replace(r, plan=NOBODY)),
        Case(
            "after a restart",
            asked,
            reasons.ATTEMPT_UNKNOWN,
            damage=restart,
        ),
        Case(
            "another message in its turn",
            wrong,
            reasons.PHASE_WRONG,
            # The honest request of `wrong` is made and not sent; one of `asked` is, out of turn.
            change=lambda b, r: early[asked](b),
        ),
        Case(
            "again after a refusal",
            asked,
            reasons.ATTEMPT_OVER,
            damage=lambda b: b.ask(early[wrong](b)),
        ),
        Case("the end of memory", asked, INTERNAL_ERROR, damage=exhausted),
        Case(
            "without a part in secure aggregation",
            asked,
            reasons.ATTEMPT_UNKNOWN,
            damage=lambda b: setattr(b, "member", replace(b.member, secure=None)),
        ),
    ]


IN_ATTEMPTS = [
    *(case for asked in STEPS for case in in_an_attempt(asked)),
    Case("keys without its own", KeyList, reasons.TOO_FEW_LEFT, change=lambda b, r: without_me(r)),
    Case("keys of others swapped", KeyList, reasons.KEYS_UNVERIFIED, change=lambda b, r: swapped(r)),
    Case("its own keys alone", KeyList, reasons.TOO_FEW_LEFT, change=lambda b, r: alone(r)),
    Case("a false signature", Inbox, reasons.SHARES_UNVERIFIED, change=lambda b, r: false_sealed(r)),
    Case("nothing that opens", Inbox, reasons.SHARES_UNREADABLE, change=closed_sealed),
    Case("nobody's shares", Inbox, reasons.TOO_FEW_LEFT, change=lambda b, r: replace(r, sealed={})),
    Case("a vector of another length", Inbox, reasons.VECTOR_DIFFERS, damage=another_vector),
    Case("a stranger", Survivors, reasons.SURVIVORS_UNKNOWN, change=lambda b, r: replace(r, names=(ME, "mallory"))),
    Case("itself alone", Survivors, reasons.TOO_FEW_LEFT, change=lambda b, r: replace(r, names=(ME,))),
    Case("a second set", Survivors, reasons.SURVIVORS_DIFFER, damage=consented_otherwise),
    Case("marks in pieces", Survivors, STORAGE_FAILED, damage=lambda b: write(b.place.marks)),
    Case("marks that are gone", Survivors, STORAGE_FAILED, damage=lambda b: b.place.marks.unlink()),
    Case("a full disk", Survivors, STORAGE_FAILED, damage=full_disk),
    Case("no signatures", Consents, reasons.SIGNATURES_UNVERIFIED, change=lambda b, r: replace(r, signatures={})),
    Case(
        "a false signature",
        Consents,
        reasons.SIGNATURES_UNVERIFIED,
        change=lambda b, r: replace(r, signatures={**r.signatures, OTHERS[0]: bytes(64)}),
    ),
    Case(
        "the same again",
        Consents,
        reasons.ATTEMPT_OVER,
        change=lambda b, r: (b.ask(r), r)[1],
    ),
]


@pytest.mark.parametrize("case", IN_ATTEMPTS, ids=str)
def test_a_refusal_is_a_reason_code_and_nothing_else(case: Case, border: Make) -> None:
    refuses(case, border)
