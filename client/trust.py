"""The roster that this institution trusts: compared by people over another channel, then pinned.

The pinned copy carries a signature of the institution's own identity. Whoever edits it without that key is found out:
here while the card is the institution's, and by `keys.load` when the card was changed too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from client.home import ClientHome
from client.keys import Keys, card
from common.enrolment import (
    FORM,
    ROSTER_LIMIT,
    Address,
    Card,
    SignedRoster,
    certificate_fingerprint,
    check_authority,
    fields,
    grouped,
    hexadecimal,
    key_fingerprint,
    parse_json,
    timestamp,
    within,
)
from common.errors import ConfigError
from common.private_files import (
    locked,
    read_private,
    write_private_json,
)
from common.secagg.canonical import canonical
from common.secagg.identity import SIGNATURE_BYTES, Roster

_AGAIN = "run `silotune-client trust ROSTER` again, and compare the fingerprints over another channel"


@dataclass(frozen=True)
class TrustedRoster:
    """A roster that this institution pinned, and when (UTC)."""

    roster: SignedRoster
    since: str

    @property
    def federation(self) -> str:
        return self.roster.contents.federation

    @property
    def serial(self) -> int:
        return self.roster.contents.serial

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the whole roster."""
        return self.roster.fingerprint

    @property
    def address(self) -> Address:
        """Where the coordinator is reached."""
        return self.roster.contents.address

    @property
    def authority(self) -> str:
        """The certificate (PEM), and the only one, that may vouch for that address."""
        return self.roster.contents.authority

    @property
    def coordinator(self) -> bytes:
        """The coordinator's public identity key, which signs published adapters."""
        return self.roster.contents.coordinator

    @property
    def bundles(self) -> tuple[str, ...]:
        """SHA-256 of the application bundles that the coordinator may send; the policy has its own list."""
        return self.roster.contents.bundles

    @property
    def cards(self) -> Mapping[str, Card]:
        """Every member's card by name."""
        return self.roster.cards

    @property
    def secagg(self) -> Roster:
        """Names and identity keys for secure aggregation."""
        return self.roster.secagg


def pinned(home: ClientHome) -> TrustedRoster:
    """The roster that was trusted.

    Raises ConfigError when none is, when it is not as it was pinned, and when this institution's card is not in it as
    it is now; StorageError when it cannot be read.
    """
    own = card(home)
    if not home.roster.exists():
        raise ConfigError(f"{home.roster}: expected a trusted roster, found none; run: silotune-client trust ROSTER")
    return within(home.roster, lambda: _verified(parse_json(read_private(home.roster, ROSTER_LIMIT)), own))


def examine(home: ClientHome, roster: SignedRoster, own: Card) -> tuple[str, ...]:
    """What trusting this roster would change, one line each; none when it is trusted already.

    Raises ConfigError when this institution's own card is not in it exactly, when it is older than the trusted one, and
    when it is another one of the same serial number.
    """
    _check_own(roster, own)
    if not home.roster.exists():
        return ("no roster was trusted before",)
    before = pinned(home).roster
    if before.contents.coordinator == roster.contents.coordinator:
        trusted, offered = before.contents.serial, roster.contents.serial
        if offered < trusted:
            raise ConfigError(
                f"roster: expected serial number {trusted} or later, found {offered}, which is older than the trusted"
                " one; ask the coordinator for its present roster"
            )
        if offered == trusted and before.fingerprint != roster.fingerprint:
            raise ConfigError(
                f"roster: expected the trusted roster of serial number {trusted}, found another one of the same number;"
                " ask the coordinator why it signed two"
            )
    return changes(before, roster)


def pin(home: ClientHome, roster: SignedRoster, keys: Keys, now: datetime) -> TrustedRoster:
    """Trusts the roster from now on. Raises as `examine` does, and StorageError when it cannot be written."""
    own = Card.of(keys.identity, keys.node.public_key())
    with locked(home.root):
        if not examine(home, roster, own):
            return pinned(home)
        trusted = TrustedRoster(roster, timestamp(now))
        pin_file = {
            "form": FORM,
            "since": trusted.since,
            "roster": roster.to_json(),
            "signature": keys.identity.sign(_statement(trusted, own)).hex(),
        }
        write_private_json(home.roster, pin_file, replace=True)
    return trusted


def changes(before: SignedRoster, after: SignedRoster) -> tuple[str, ...]:
    """How two rosters differ, one line each; a change of their numbers alone is one as well."""
    old, new = before.contents, after.contents
    told = []
    if old.coordinator != new.coordinator:
        told.append("coordinator: ANOTHER KEY signs this roster")
    for what, was, now in (
        ("federation", old.federation, new.federation),
        ("address", str(old.address), str(new.address)),
        ("serial", str(old.serial), str(new.serial)),
        ("bundles", ", ".join(old.bundles) or "none", ", ".join(new.bundles) or "none"),
    ):
        if was != now:
            told.append(f"{what}: {was} -> {now}")
    if old.authority != new.authority:
        told.append("authority: another certificate")
    cards, others = before.cards, after.cards
    told += [f"added: {name}" for name in others if name not in cards]
    told += [f"removed: {name}" for name in cards if name not in others]
    told += [f"changed keys: {name}" for name in others if name in cards and cards[name] != others[name]]
    if not told and before.fingerprint != after.fingerprint:
        told.append("dates")
    return tuple(told)


def fingerprints(roster: SignedRoster) -> dict[str, Any]:
    """All that people compare, by what it is of."""
    contents = roster.contents
    return {
        "federation": contents.federation,
        "serial": contents.serial,
        "written": contents.written,
        "address": str(contents.address),
        "roster": grouped(roster.fingerprint),
        "coordinator": grouped(key_fingerprint(contents.coordinator)),
        "authority": grouped(certificate_fingerprint(contents.authority)),
        "authority_expires": timestamp(check_authority(contents.authority).not_valid_after_utc),
        "bundles": list(contents.bundles),
        "members": {name: grouped(shown.fingerprint) for name, shown in roster.cards.items()},
    }


def told(roster: SignedRoster, own: str) -> tuple[str, ...]:
    """The same as lines, the member `own` marked."""
    shown = fingerprints(roster)
    return (
        f"federation   {shown['federation']}, serial {shown['serial']}, written {shown['written']}",
        f"address      {shown['address']}",
        f"roster       {shown['roster']}",
        f"coordinator  {shown['coordinator']}",
        f"authority    {shown['authority']} until {shown['authority_expires']}",
        *(f"bundle       {grouped(bundle)}" for bundle in shown["bundles"]),
        f"members      {len(shown['members'])}",
        *(
            f"  {name}{' (this institution)' if name == own else ''}\n             {fingerprint}"
            for name, fingerprint in shown["members"].items()
        ),
    )


def _statement(trusted: TrustedRoster, own: Card) -> bytes:
    return canonical(
        "trusted roster", FORM, own.name, trusted.since, trusted.roster.contents.statement(), trusted.roster.signature
    )


def _check_own(roster: SignedRoster, own: Card) -> None:
    found = roster.cards.get(own.name)
    if found != own:
        what = "no card of that name" if found is None else f"one with the fingerprint {grouped(found.fingerprint)}"
        raise ConfigError(
            f"roster: expected this institution's own card ({own.name}, {grouped(own.fingerprint)}), found {what}; give"
            " the coordinator card.json, and ask it for a roster with it"
        )


def _verified(value: object, own: Card) -> TrustedRoster:
    found = fields(value, {"form": int, "since": str, "roster": dict, "signature": str}, "trusted roster")
    trusted = TrustedRoster(SignedRoster.from_json(found["roster"]), found["since"])
    signature = hexadecimal(found["signature"], SIGNATURE_BYTES, "trusted roster: signature")
    _check_own(trusted.roster, own)
    if not trusted.secagg.verifies(own.name, signature, _statement(trusted, own)):
        raise ConfigError(
            "trusted roster: expected it as this institution signed it, found it changed; find out who did, move the"
            f" file away, then {_AGAIN}"
        )
    return trusted
