"""Cards and rosters that verify or are refused."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from common import enrolment
from common.config import InstitutionConfig
from common.config_rules import RULES
from common.enrolment import (
    CARD_LIMIT,
    Address,
    Card,
    Contents,
    Member,
    SignedRoster,
    check_authority,
    check_fingerprint,
    check_host,
    check_name,
    grouped,
    read_card,
    read_roster,
    ungrouped,
)
from common.errors import ConfigError, StorageError
from common.private_files import (
    read_file,
)
from common.secagg.identity import Identity, Roster
from server.authority import authority_certificate

NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
WHEN = "2030-01-31T12:00:00Z"


def card(name: str) -> Card:
    return Card.of(Identity.generate(name), ec.generate_private_key(ec.SECP384R1()).public_key())


def authority() -> str:
    key = ec.generate_private_key(ec.SECP384R1())
    return authority_certificate(key, "oncology", NOW).public_bytes(Encoding.PEM).decode()


COORDINATOR = Identity.generate("coordinator")
CARD = card("riverside")
CONTENTS = Contents(
    federation="oncology",
    serial=7,
    written=WHEN,
    coordinator=COORDINATOR.public,
    address=Address("coordinator.example.org", 9443),
    authority=authority(),
    members=tuple(Member(card(name), WHEN) for name in ("lakeside", "northgate", "riverside")),
    bundles=("ab" * 32, "cd" * 32),
)
ROSTER = SignedRoster.of(CONTENTS, COORDINATOR)


def written(directory: Path, value: object) -> Path:
    file = directory / "given.json"
    file.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return file


def changed(value: object) -> object:
    """Something of the same type that is different."""
    match value:
        case str():
            return "a" + value[1:] if value[:1] != "a" else "b" + value[1:]
        case int():
            return value + 1
        case dict():
            return {key: changed(part) if key == "name" else part for key, part in value.items()}
        case list():
            return value[1:]
    raise AssertionError(value)


# --- Words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "0", "riverside", "st-mary_2", "x" * 64])
def test_names_of_institutions_are_accepted(name: str) -> None:
    assert check_name(name) == name
    assert RULES["data.institutions"].holds([InstitutionConfig(name=name)])


@pytest.mark.parametrize(
    "name", ["", "A", "-a", "_a", "a b", "a\n", "a/b", "..", "é", "coordinator", "pooled", "\x1b[1m"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected as an institution's name") as refused:
        check_name(name)
    assert "\x1b" not in str(refused.value)
    assert not RULES["data.institutions"].holds([InstitutionConfig(name=name)])


def test_a_very_long_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 64"):
        check_name("x" * 65)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("Coordinator.Example.org", "coordinator.example.org"),
        ("localhost", "localhost"),
        ("my_service", "my_service"),
        ("10.0.0.1", "10.0.0.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
    ],
)
def test_hosts_are_written_in_one_way(text: str, host: str) -> None:
    assert check_host(text) == host == check_host(host)


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "a..b", "a.", "*.example.org", "https://a", "a:1", "[::1]", "300.1.2.3", "1.2.3", "fe80::1%eth0"),
        *("é.org", "a b", "a/b", "-a", "x" * 64, ".".join(["x" * 60] * 5), "a\nb", "a\0"),
    ],
)
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a host name"):
        check_host(text)


def test_fingerprints_are_read_however_they_are_grouped() -> None:
    digest = CARD.fingerprint
    assert grouped(digest) == " ".join(re.findall("....", digest))
    assert len(grouped(digest).split()) == 16
    for text in (digest, grouped(digest), digest.upper(), ":".join(re.findall("..", digest)), f" {digest}\n"):
        assert ungrouped(text) == digest
    for text in ("", digest[:-1], digest + "0", "g" + digest[1:], digest[:16]):
        with pytest.raises(ConfigError, match="64 hexadecimal digits"):
            ungrouped(text)


def test_addresses_are_written_as_flower_takes_them() -> None:
    assert str(Address("a.org", 443)) == "a.org:443"
    assert str(Address("::1", 443)) == "[::1]:443"
    for host, port in (("A.org", 1), ("a b", 1), ("a", 0), ("a", 65536), ("a", -1)):
        with pytest.raises(ConfigError, match="expected"):
            Address(host, port)


# --- Cards -----------------------------------------------------------------------------------------------------------


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_card(written(tmp_path, CARD.to_json())) == CARD
    assert set(CARD.to_json()) == {"form", "name", "identity_key", "node_key", "signature"}


def test_fingerprints_speak_of_name_and_both_keys() -> None:
    identity, node = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()).public_key()
    one = Card.of(Identity("a", identity), node)
    others = [
        Card.of(Identity("b", identity), node),
        Card.of(Identity.generate("a"), node),
        Card.of(Identity("a", identity), ec.generate_private_key(ec.SECP384R1()).public_key()),
    ]
    assert Card.of(Identity("a", identity), node) == one
    assert len({shown.fingerprint for shown in (one, *others)}) == 4


@pytest.mark.parametrize("field", ["form", "name", "identity_key", "node_key", "signature"])
def test_a_card_with_a_changed_field_is_refused(tmp_path: Path, field: str) -> None:
    said = CARD.to_json()
    for value in (changed(said[field]), None, [], True, 1.5, ""):
        with pytest.raises(ConfigError, match="expected"):
            read_card(written(tmp_path, {**said, field: value}))
    with pytest.raises(ConfigError, match="expected the keys"):
        read_card(written(tmp_path, {key: value for key, value in said.items() if key != field}))


def test_no_bit_of_a_card_can_change_it_unseen(tmp_path: Path) -> None:
    whole = json.dumps(CARD.to_json()).encode()
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            with suppress(ConfigError):
                assert Card.from_json(enrolment.parse_json(bytes(damaged))) == CARD  # white space that changed its kind


def test_a_card_for_another_s_key_is_refused() -> None:
    """Who does not hold the identity key cannot enrol it under a name or with a node of their own."""
    other = card("lakeside")
    for forged in ({"name": "lakeside"}, {"node": other.node}, {"identity": other.identity}):
        with pytest.raises(ConfigError, match="expected a signature of its own identity key"):
            replace(CARD, **forged)


def node_line(key: Any) -> str:
    line: str = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return line


@pytest.mark.parametrize(
    "node",
    [
        node_line(ec.generate_private_key(ec.SECP256R1())),
        node_line(Ed25519PrivateKey.generate()),
        f"{CARD.node} somebody@somewhere",
        f" {CARD.node}",
        f"{CARD.node}\n{CARD.node}",
        CARD.node.split()[1],
        "ecdsa-sha2-nistp384 é",
        "",
    ],
    ids=range(8),
)
def test_node_keys_of_other_kinds_are_refused(node: str) -> None:
    with pytest.raises(ConfigError, match="expected an ECDSA P-384 key"):
        replace(CARD, node=node)


def test_a_card_of_another_form_names_both(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected form 1, found 2; both sides need the same version"):
        read_card(written(tmp_path, {**CARD.to_json(), "form": 2}))


# --- Rosters ---------------------------------------------------------------------------------------------------------


def test_a_roster_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = read_roster(written(tmp_path, ROSTER.to_json()))
    assert found == ROSTER
    assert found.secagg.keys == {member.card.name: member.card.identity for member in CONTENTS.members}
    assert isinstance(found.secagg, Roster)
    assert found.fingerprint == ROSTER.fingerprint


@pytest.mark.parametrize("field", sorted(ROSTER.to_json()))
def test_a_roster_with_a_changed_field_is_refused(tmp_path: Path, field: str) -> None:
    said = ROSTER.to_json()
    for value in (changed(said[field]), None, True, 1.5, {}, "é\ud800"):
        with pytest.raises(ConfigError, match="expected"):
            read_roster(written(tmp_path, {**said, field: value}))
    with pytest.raises(ConfigError, match="expected the keys"):
        read_roster(written(tmp_path, {key: value for key, value in said.items() if key != field}))


@pytest.mark.parametrize("field", ["name", "identity_key", "node_key", "signature", "form"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_roster_with_a_changed_card_is_refused(tmp_path: Path, place: int, field: str) -> None:
    said = ROSTER.to_json()
    shown = said["members"][place]["card"]
    shown[field] = changed(shown[field])
    with pytest.raises(ConfigError, match="expected"):
        read_roster(written(tmp_path, said))


def test_a_roster_whose_cards_are_exchanged_is_refused(tmp_path: Path) -> None:
    """Each card is right by itself: the coordinator's signature is over which ones, and when they came."""
    said = ROSTER.to_json()
    for members in (
        said["members"][::-1],
        said["members"][1:],
        [*said["members"], {"card": card("summit").to_json(), "enrolled": WHEN}],
        [{**said["members"][0], "enrolled": "2030-01-31T12:00:01Z"}, *said["members"][1:]],
        [{"card": card("lakeside").to_json(), "enrolled": WHEN}, *said["members"][1:]],
    ):
        with pytest.raises(ConfigError, match="expected"):
            read_roster(written(tmp_path, {**said, "members": members}))


def test_no_byte_of_a_roster_can_change_it_unseen() -> None:
    whole = json.dumps(ROSTER.to_json()).encode()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        with suppress(ConfigError):
            assert SignedRoster.from_json(enrolment.parse_json(bytes(damaged))) == ROSTER


@given(st.binary(max_size=200))
def test_whatever_bytes_there_are_they_are_refused_in_plain_words(data: bytes) -> None:
    for read in (Card.from_json, SignedRoster.from_json):
        with pytest.raises(ConfigError, match="expected"):
            read(enrolment.parse_json(data))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(sorted(ROSTER.to_json())),
)
def test_whatever_a_field_holds_it_is_refused_in_plain_words(value: object, field: str) -> None:
    said = ROSTER.to_json()
    if value != said[field] or type(value) is not type(said[field]):
        with pytest.raises(ConfigError, match="expected"):
            SignedRoster.from_json({**said, field: value})


def test_signed_by_another_key_it_is_another_coordinator_s() -> None:
    forger = Identity.generate("coordinator")
    with pytest.raises(ConfigError, match="expected a signature of the coordinator's key"):
        SignedRoster.of(CONTENTS, forger)
    forged = SignedRoster.of(replace(CONTENTS, coordinator=forger.public), forger)
    assert forged.fingerprint != ROSTER.fingerprint
    check_fingerprint(ROSTER, grouped(ROSTER.fingerprint))
    with pytest.raises(ConfigError, match=rf"expected the fingerprint {grouped(ROSTER.fingerprint)}, found"):
        check_fingerprint(forged, ROSTER.fingerprint)


def twin(**forged: Any) -> Card:
    """A card of the first member's key or node under another name, which only that member could sign."""
    identity, node = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()).public_key()
    parts = {"identity": identity, "node": node, **forged}
    return Card.of(Identity("a-twin", parts["identity"]), parts["node"])


def test_two_members_never_share_a_name_or_a_key() -> None:
    """Not even when the coordinator signs it."""
    identity, node = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()).public_key()
    one = Card.of(Identity("b", identity), node)
    own = Ed25519PrivateKey.generate()
    cases: list[tuple[str, tuple[Card, ...]]] = [
        ("name", (card("b"), one)),
        ("identity key", (twin(identity=identity), one)),
        ("node key", (twin(node=node), one)),
        ("identity key", (twin(identity=own),)),
    ]
    for what, cards in cases:
        with pytest.raises(ConfigError, match=f"expected for everyone a {what} of their own"):
            replace(
                CONTENTS,
                coordinator=Identity("coordinator", own).public,
                members=tuple(Member(shown, WHEN) for shown in cards),
            )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("federation", "An Open Federation"),
        ("federation", ""),
        ("serial", 0),
        ("serial", -1),
        ("serial", 1 << 63),
        ("written", "2030-01-31T12:00:00"),
        ("written", "2030-02-31T12:00:00Z"),
        ("written", "2030-1-31T12:00:00Z"),
        ("coordinator", b"short"),
        ("authority", ""),
        ("authority", "no certificate"),
        ("authority", CONTENTS.authority + CONTENTS.authority),
        ("authority", "a remark\n" + CONTENTS.authority),
        ("bundles", ("AB" * 32,)),
        ("bundles", ("ab",)),
        ("bundles", ("ab" * 32, "ab" * 32)),
        ("members", CONTENTS.members[::-1]),
        ("members", (replace(CONTENTS.members[0], enrolled="yesterday"),)),
    ],
)
def test_what_a_coordinator_cannot_mean_is_refused_although_it_signs(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="expected"):
        SignedRoster.of(replace(CONTENTS, **{field: value}), COORDINATOR)


def test_a_server_s_certificate_is_no_authority() -> None:
    from server.authority import server_certificate

    key = ec.generate_private_key(ec.SECP384R1())
    root = authority_certificate(key, "oncology", NOW)
    leaf = server_certificate(root, key, key.public_key(), ["a.org"], NOW)
    with pytest.raises(ConfigError, match="of an authority"):
        check_authority(leaf.public_bytes(Encoding.PEM).decode())


# --- Bad files -------------------------------------------------------------------------------------------------------

DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00\xff" * 100, id="binary"),
        pytest.param("{}".encode("utf-16"), id="utf-16"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"' + b"x" * 9000 + b'"', id="a long text"),
        pytest.param(DEEP[:4000] + DEEP[-4000:], id="deep"),
        pytest.param(b"1" * 10_000, id="a long number"),
        pytest.param(b'{"form": NaN}', id="NaN"),
        pytest.param(b'{"form": 1, "form": 1}', id="a key twice"),
        pytest.param(json.dumps(CARD.to_json()).encode()[:-1], id="cut"),
        pytest.param(json.dumps(CARD.to_json()).encode() * 2, id="twice"),
    ],
)
def test_files_that_are_no_card_are_refused(tmp_path: Path, data: bytes) -> None:
    file = written(tmp_path, data)
    for read in (read_card, read_roster):
        with pytest.raises(ConfigError, match=rf"^{re.escape(str(file))}: .*expected") as refused:
            read(file)
        assert len(str(refused.value)) < 500


def test_huge_files_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    with file.open("wb") as handle:
        handle.truncate(1 << 40)
    with pytest.raises(ConfigError, match=f"expected at most {CARD_LIMIT} bytes"):
        read_card(file)


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "loop"):
        with pytest.raises(ConfigError, match="expected a plain file"):
            read_file(path, 10)
    for path in (tmp_path / "missing", tmp_path / "pipe" / "below"):
        with pytest.raises(StorageError, match="cannot be read"):
            read_file(path, 10)


def test_times_are_in_utc() -> None:
    assert enrolment.timestamp(NOW + timedelta(seconds=0.9)) == WHEN
    assert enrolment.timestamp(NOW.astimezone(timezone(timedelta(hours=5)))) == WHEN
