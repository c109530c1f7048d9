"""The roster an institution trusts: its own card in it, never an older one, and not a bit of it edited."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from client import keys, trust
from client.home import ClientHome
from client.keys import Keys
from common.enrolment import (
    Address,
    Card,
    Contents,
    Member,
    SignedRoster,
    certificate_fingerprint,
    grouped,
    key_fingerprint,
)
from common.errors import ConfigError, StorageError
from common.private_files import write_private_json
from common.secagg.identity import Identity, Roster
from server.authority import authority_certificate

NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
WHEN = "2030-01-31T12:00:00Z"
COORDINATOR = Identity.generate("coordinator")


def authority() -> str:
    key = ec.generate_private_key(ec.SECP384R1())
    return authority_certificate(key, "oncology", NOW).public_bytes(Encoding.PEM).decode()


AUTHORITY = authority()


def card(name: str) -> Card:
    return Card.of(Identity.generate(name), ec.generate_private_key(ec.SECP384R1()).public_key())


NORTHGATE, SUMMIT = card("northgate"), card("summit")


@dataclass(frozen=True)
class Institution:
    home: ClientHome
    keys: Keys
    card: Card

    def contents(self, serial: int = 3, *others: Card, **said: Any) -> Contents:
        cards = sorted((self.card, *(others or (NORTHGATE,))), key=lambda shown: shown.name)
        parts: dict[str, Any] = {
            "federation": "oncology",
            "serial": serial,
            "written": WHEN,
            "coordinator": COORDINATOR.public,
            "address": Address("coordinator.example.org", 9443),
            "authority": AUTHORITY,
            "members": tuple(Member(shown, WHEN) for shown in cards),
            "bundles": ("ab" * 32,),
        }
        return Contents(**{**parts, **said})

    def roster(self, serial: int = 3, *others: Card, **said: Any) -> SignedRoster:
        return SignedRoster.of(self.contents(serial, *others, **said), COORDINATOR)

    def pin(self, roster: SignedRoster) -> trust.TrustedRoster:
        return trust.pin(self.home, roster, self.keys, NOW)


@pytest.fixture
def here(tmp_path: Path) -> Institution:
    home = ClientHome(tmp_path / "home")
    made = keys.init(home, "riverside", None)
    return Institution(home, keys.load(home, None), made)


def test_a_pinned_roster_gives_all_that_the_daemon_needs(here: Institution) -> None:
    roster = here.roster()
    pinned = here.pin(roster)
    assert pinned == trust.pinned(here.home) == trust.TrustedRoster(roster, WHEN)
    assert isinstance(pinned.secagg, Roster)
    assert dict(pinned.secagg.keys) == {"northgate": NORTHGATE.identity, "riverside": here.card.identity}
    assert str(pinned.address) == "coordinator.example.org:9443"
    assert (pinned.authority, pinned.coordinator) == (AUTHORITY, COORDINATOR.public)
    assert (pinned.federation, pinned.serial, pinned.bundles) == ("oncology", 3, ("ab" * 32,))
    assert pinned.cards["riverside"] == here.card
    assert pinned.fingerprint == roster.fingerprint
    assert stat.S_IMODE(here.home.roster.stat().st_mode) == 0o600


def test_without_a_trusted_roster_it_says_what_to_run(here: Institution) -> None:
    with pytest.raises(ConfigError, match="expected a trusted roster, found none; run: silotune-client trust ROSTER"):
        trust.pinned(here.home)


def test_a_roster_without_ones_own_card_is_refused(here: Institution) -> None:
    members = here.contents().members
    twin = Card.of(here.keys.identity, ec.generate_private_key(ec.SECP384R1()).public_key())
    namesake = card("riverside")
    for others, found in (
        ((members[0],), "no card of that name"),
        ((members[0], Member(twin, WHEN)), grouped(twin.fingerprint)),
        ((members[0], Member(namesake, WHEN)), grouped(namesake.fingerprint)),
    ):
        roster = here.roster(members=others)
        for call in (lambda roster=roster: trust.examine(here.home, roster, here.card), lambda r=roster: here.pin(r)):
            with pytest.raises(
                ConfigError, match=rf"\(riverside, {grouped(here.card.fingerprint)}\), found"
            ) as refused:
                call()
            assert found in str(refused.value)
    assert not here.home.roster.exists()


def test_trusting_anew_shows_what_changed(here: Institution) -> None:
    first = here.roster(3, NORTHGATE)
    assert trust.examine(here.home, first, here.card) == ("no roster was trusted before",)
    here.pin(first)
    assert trust.examine(here.home, first, here.card) == ()
    other = card("northgate")
    second = here.roster(
        5,
        other,
        SUMMIT,
        federation="cardiology",
        address=Address("10.0.0.1", 1),
        authority=authority(),
        bundles=(),
    )
    assert trust.examine(here.home, second, here.card) == (
        "federation: oncology -> cardiology",
        "address: coordinator.example.org:9443 -> 10.0.0.1:1",
        "serial: 3 -> 5",
        f"bundles: {'ab' * 32} -> none",
        "authority: another certificate",
        "added: summit",
        "changed keys: northgate",
    )
    assert trust.pinned(here.home).roster == first  # looking at another one trusts nothing
    assert here.pin(second).roster == trust.pinned(here.home).roster == second
    third = here.roster(6, SUMMIT)
    assert "removed: northgate" in trust.examine(here.home, third, here.card)


def test_a_roster_of_another_coordinator_is_told_first(here: Institution) -> None:
    here.pin(here.roster(7))
    other = Identity.generate("coordinator")
    roster = SignedRoster.of(here.contents(1, coordinator=other.public), other)
    assert trust.examine(here.home, roster, here.card) == (
        "coordinator: ANOTHER KEY signs this roster",
        "serial: 7 -> 1",
    )
    assert here.pin(roster).coordinator == other.public


def test_an_older_roster_is_refused(here: Institution) -> None:
    here.pin(here.roster(7))
    before = here.home.roster.read_bytes()
    with pytest.raises(ConfigError, match="expected serial number 7 or later, found 6, which is older"):
        here.pin(here.roster(6))
    assert here.home.roster.read_bytes() == before


def test_two_rosters_of_one_number_are_refused(here: Institution) -> None:
    here.pin(here.roster(7))
    for other in (here.roster(7, SUMMIT), here.roster(7, written="2030-01-31T12:00:01Z")):
        with pytest.raises(ConfigError, match="found another one of the same number"):
            here.pin(other)


def test_trusting_the_same_again_changes_nothing(here: Institution) -> None:
    here.pin(here.roster())
    before = here.home.roster.read_bytes()
    later = trust.pin(here.home, here.roster(), here.keys, NOW.replace(year=2031))
    assert later.since == WHEN
    assert here.home.roster.read_bytes() == before


# --- Edits -----------------------------------------------------------------------------------------------------------


def test_another_roster_in_its_place_is_refused(here: Institution) -> None:
    """Though the coordinator signed it, and this institution is in it."""
    here.pin(here.roster(3))
    said = json.loads(here.home.roster.read_text())
    newer = here.roster(4, SUMMIT).to_json()
    edits: list[object] = [newer, {**said, "roster": newer}]
    for edit in edits:
        here.home.roster.write_text(json.dumps(edit))
        with pytest.raises(ConfigError, match=r"roster\.json: .*expected"):
            trust.pinned(here.home)
        with pytest.raises(ConfigError, match="expected"):  # nor does a new one simply take its place
            here.pin(here.roster(5))


def test_a_pin_of_another_institution_is_refused(here: Institution, tmp_path: Path) -> None:
    other = ClientHome(tmp_path / "other")
    shown = keys.init(other, "summit", None)
    roster = here.roster(3, shown)
    trust.pin(other, roster, keys.load(other, None), NOW)
    write_private_json(here.home.roster, json.loads(other.roster.read_text()))
    with pytest.raises(ConfigError, match="expected it as this institution signed it, found it changed"):
        trust.pinned(here.home)


def test_no_byte_of_a_pinned_roster_can_change_it_unseen(here: Institution) -> None:
    pinned = here.pin(here.roster())
    whole = here.home.roster.read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        here.home.roster.write_bytes(damaged)
        try:
            found = trust.pinned(here.home)
        except ConfigError:
            continue
        assert found == pinned  # white space that changed its kind
    here.home.roster.write_bytes(whole)
    assert trust.pinned(here.home) == pinned


@pytest.mark.parametrize("field", ["form", "since", "roster", "signature"])
def test_every_field_of_the_pin_counts(here: Institution, field: str) -> None:
    here.pin(here.roster())
    said = json.loads(here.home.roster.read_text())
    for value in (None, True, 2, "2030-01-31T12:00:01Z", {}, "ab" * 64):
        here.home.roster.write_text(json.dumps({**said, field: value}))
        with pytest.raises(ConfigError, match=r"roster\.json: .*expected"):
            trust.pinned(here.home)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        pytest.param(lambda file: file.write_bytes(b""), ConfigError, id="empty"),
        pytest.param(lambda file: file.write_bytes(b"\xff" * 99), ConfigError, id="binary"),
        pytest.param(lambda file: file.open("wb").truncate(1 << 40), ConfigError, id="huge"),
        pytest.param(lambda file: file.chmod(0o644), ConfigError, id="open to others"),
        pytest.param(lambda file: (file.unlink(), file.mkdir(0o700)), ConfigError, id="a directory"),
        pytest.param(lambda file: file.rename(file.with_suffix(".kept")).unlink(), ConfigError, id="gone"),
    ],
)
def test_a_spoilt_pin_is_refused(here: Institution, spoil: Callable[[Path], object], error: type[Exception]) -> None:
    here.pin(here.roster())
    spoil(here.home.roster)
    with pytest.raises(error, match="expected"):
        trust.pinned(here.home)


def test_a_linked_pin_is_refused(here: Institution, tmp_path: Path) -> None:
    here.pin(here.roster())
    here.home.roster.rename(tmp_path / "elsewhere")
    here.home.roster.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="found a link"):
        trust.pinned(here.home)


def test_a_pin_that_cannot_be_written_leaves_the_old_one(here: Institution, monkeypatch: pytest.MonkeyPatch) -> None:
    first = here.pin(here.roster(3))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            here.pin(here.roster(4))
    assert trust.pinned(here.home) == first
    assert not list(here.home.root.glob(".*.partial"))


def test_a_card_that_was_exchanged_is_found_out(here: Institution) -> None:
    """Editing pin and card together gets past neither: the card must be in the roster, and fit the keys."""
    here.pin(here.roster())
    thief = Identity.generate("riverside")
    node = ec.generate_private_key(ec.SECP384R1())
    forged = Card.of(thief, node.public_key())
    write_private_json(here.home.card, forged.to_json(), replace=True)
    with pytest.raises(ConfigError, match="expected this institution's own card"):
        trust.pinned(here.home)
    members = (here.contents().members[0], Member(forged, WHEN))
    here.home.roster.unlink()
    trust.pin(here.home, here.roster(4, members=members), Keys(thief, node), NOW)
    with pytest.raises(ConfigError, match="expected the card of the keys in"):
        keys.load(here.home, None)


# --- What is shown ---------------------------------------------------------------------------------------------------


def test_everything_to_compare_is_shown(here: Institution) -> None:
    roster = here.roster(3, NORTHGATE, SUMMIT)
    shown = trust.fingerprints(roster)
    assert shown["members"] == {
        name: grouped(found.fingerprint)
        for name, found in (("northgate", NORTHGATE), ("riverside", here.card), ("summit", SUMMIT))
    }
    assert shown["coordinator"] == grouped(key_fingerprint(COORDINATOR.public))
    assert shown["authority"] == grouped(certificate_fingerprint(AUTHORITY))
    assert shown["roster"] == grouped(roster.fingerprint)
    text = "\n".join(trust.told(roster, "riverside"))
    for part in (*shown["members"].values(), shown["coordinator"], shown["authority"], shown["roster"]):
        assert part in text
    assert "riverside (this institution)" in text
    assert "northgate (this" not in text
    assert str(roster.contents.address) in text


def test_a_change_of_dates_alone_is_told() -> None:
    home = Institution(ClientHome(Path("nowhere")), None, card("riverside"))  # type: ignore[arg-type]
    one = home.roster()
    other = SignedRoster.of(replace(one.contents, written="2030-01-31T12:00:01Z"), COORDINATOR)
    assert trust.changes(one, other) == ("dates",)
    assert trust.changes(one, one) == ()
