"""Cards and rosters that verify or are refused, and files that are their owner's alone."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
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
from common.errors import ConfigError, SilotuneError, StorageError
from common.private_files import (
    check_new_passphrase,
    keep_curve_key,
    keep_identity_key,
    locked,
    private_directory,
    read_curve_key,
    read_file,
    read_identity_key,
    read_passphrase,
    read_private,
    sweep,
    write_private,
)
from common.secagg.identity import Identity, Roster
from server.authority import authority_certificate

NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
WHEN = "2030-01-31T12:00:00Z"
SECRET = b"correct horse battery staple"


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


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


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


# --- Private files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def wide_open() -> Iterator[None]:
    """A user who lets everyone read new files."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.usefixtures("wide_open")
def test_private_files_are_private_from_their_first_byte_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    opened = os.open

    def watched(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        handle = opened(path, flags, *arguments, **named)
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            modes.append(stat.S_IMODE(os.fstat(handle).st_mode))
        return handle

    monkeypatch.setattr(os, "open", watched)
    private_directory(tmp_path / "keys")
    write_private(tmp_path / "keys" / "a", b"secret")
    write_private(tmp_path / "keys" / "a", b"other", replace=True)
    assert modes == [0o600, 0o600]
    assert mode(tmp_path / "keys") == 0o700
    assert mode(tmp_path / "keys" / "a") == 0o600
    assert read_private(tmp_path / "keys" / "a", 5) == b"other"
    assert names(tmp_path / "keys") == ["a"]


def test_what_is_there_is_never_overwritten_unasked(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (kept, tmp_path / "link"):
        with pytest.raises(ConfigError, match="is there already, and is never overwritten"):
            write_private(path, b"new")
    assert kept.read_text() == "kept"
    assert names(tmp_path) == ["kept", "link"]


def test_links_are_not_followed_when_writing(tmp_path: Path) -> None:
    """Neither one in the file's own place nor one that lies where the unfinished file goes."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    home = tmp_path / "home"
    home.mkdir(0o700)
    for name in ("file", ".file.partial"):
        (home / name).symlink_to(victim)
    write_private(home / "file", b"new", replace=True)
    assert victim.read_text() == "kept"
    assert not (home / "file").is_symlink()
    assert names(home) == ["file"]


def test_what_a_kill_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".identity.pem.partial").write_text("half a key")
    (tmp_path / "identity.pem").write_text("a key")
    sweep(tmp_path)
    assert names(tmp_path) == ["identity.pem"]


@pytest.mark.parametrize("replace_it", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, replace_it: bool) -> None:
    if replace_it:
        (tmp_path / "file").write_text("kept")
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom common.private_files import *\n"
        "from common.errors import StorageError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n    write_private(Path(sys.argv[1]) / 'file', b'secret' * 100, sys.argv[2] == 'True')\n"
        "except StorageError as error:\n    sys.exit(f'refused: {error}')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, str(tmp_path), str(replace_it)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "refused: cannot write" in done.stderr, done.stderr
    assert "File too large. Free space or choose a writable directory" in done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({"file": "kept"} if replace_it else {})


def test_directories_that_others_can_enter_are_refused_with_the_remedy(tmp_path: Path) -> None:
    loose = tmp_path / "a place"
    loose.mkdir()
    for bits in (0o755, 0o710, 0o701, 0o770, 0o777):
        loose.chmod(bits)
        with pytest.raises(ConfigError, match=rf"found mode {bits:04o}; run: chmod 700 '{re.escape(str(loose))}'$"):
            private_directory(loose)
        assert mode(loose) == bits
    loose.chmod(0o700)
    private_directory(loose)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="expected a directory"):
        private_directory(tmp_path / "file")
    with pytest.raises(StorageError, match="cannot write"):
        private_directory(tmp_path / "file" / "below")


def test_private_files_that_others_can_read_are_refused_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "a key"
    file.write_bytes(b"secret")
    for bits in (0o640, 0o604, 0o644, 0o620, 0o602, 0o610, 0o777):
        file.chmod(bits)
        with pytest.raises(ConfigError, match=rf"found mode {bits:04o}; run: chmod 600 '{re.escape(str(file))}'"):
            read_private(file, 100)
    for bits in (0o600, 0o400):
        file.chmod(bits)
        assert read_private(file, 100) == b"secret"
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(ConfigError, match="expected a plain file, found a link"):
        read_private(tmp_path / "link", 100)


def test_files_of_another_user_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"secret")
    file.chmod(0o600)
    me = os.geteuid()
    for now, owner, refused in ((1000, 1001, True), (1000, 1000, False), (1000, 0, False), (0, 1001, False)):
        found = os.fstat

        def seen(handle: int, owner: int = owner, found: Callable[[int], os.stat_result] = found) -> os.stat_result:
            real = list(found(handle))
            real[stat.ST_UID] = owner
            return os.stat_result(real)

        with monkeypatch.context() as patched:
            patched.setattr(os, "geteuid", lambda now=now: now)
            patched.setattr(os, "fstat", seen)
            if refused:
                with pytest.raises(ConfigError, match=f"expected user {now} or root as its owner, found user {owner}"):
                    read_private(file, 100)
            else:
                assert read_private(file, 100) == b"secret"
    assert os.geteuid() == me


NOBODY = 2**32 - 1
SYSTEMD = ((0x01, 4, NOBODY), (0x02, 4, os.geteuid()), (0x04, 0, NOBODY), (0x10, 4, NOBODY), (0x20, 0, NOBODY))


def access_list(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@pytest.mark.parametrize(
    ("access", "alone"),
    [
        pytest.param(access_list(*SYSTEMD), True, id="as systemd gives it to a service"),
        pytest.param(access_list(*SYSTEMD[:1], (0x02, 4, 4711), *SYSTEMD[2:]), False, id="another user"),
        pytest.param(access_list(*SYSTEMD, (0x02, 4, 4711)), False, id="another user besides"),
        pytest.param(access_list(*SYSTEMD[:2], (0x04, 4, NOBODY), *SYSTEMD[3:]), False, id="the group"),
        pytest.param(access_list(*SYSTEMD, (0x08, 4, 100)), False, id="a group"),
        pytest.param(access_list(*SYSTEMD[:4], (0x20, 4, NOBODY)), False, id="everyone"),
        pytest.param(b"", False, id="no list"),
        pytest.param(access_list(*SYSTEMD)[:-1], False, id="a cut list"),
        pytest.param(b"\x03" + access_list(*SYSTEMD)[1:], False, id="a list of another form"),
    ],
)
def test_systemd_s_access_lists_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access: bytes, alone: bool
) -> None:
    """The mode shows the list's mask, 0440, in the group's place."""
    file = tmp_path / "credential"
    file.write_bytes(b"secret")
    file.chmod(0o440)
    monkeypatch.setattr(os, "getxattr", lambda handle, name: access)
    if alone:
        assert read_private(file, 100) == b"secret"
    else:
        with pytest.raises(ConfigError, match="found mode 0440"):
            read_private(file, 100)


def test_one_at_a_time(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom common.private_files import locked\n"
        "file = Path(sys.argv[1]) / 'count'\n"
        "for _ in range(20):\n"
        "    with locked(Path(sys.argv[1])):\n"
        "        found = int(file.read_text())\n        time.sleep(0.002)\n        file.write_text(str(found + 1))\n"
    )
    (tmp_path / "count").write_text("0")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, str(tmp_path)]
    running = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "60"


def test_a_lock_is_let_go_when_something_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        assert mode(tmp_path / ".lock") == 0o600


# --- Passphrases -----------------------------------------------------------------------------------------------------


def pipe(data: bytes) -> int:
    there, here = os.pipe()
    os.write(here, data)
    os.close(here)
    return there


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_passphrase_comes_over_a_file_descriptor(end: bytes) -> None:
    assert read_passphrase(pipe(SECRET + end), None) == SECRET
    assert read_passphrase(None, None) is None


@pytest.mark.parametrize("said", [b"", b"\n", SECRET + b"\nmore", b"\n" + SECRET, b"x" * 1025, b"a\0b", b"x" * 60_000])
def test_what_is_no_passphrase_is_refused(said: bytes) -> None:
    with pytest.raises(ConfigError, match="expected as passphrase one line") as refused:
        read_passphrase(pipe(said), None)
    assert SECRET.decode() not in str(refused.value)


def test_a_passphrase_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_bytes(SECRET)
    for bits, right in ((0o600, True), (0o400, True), (0o640, False), (0o604, False)):
        file.chmod(bits)
        with file.open("rb") as handle:
            if right:
                assert read_passphrase(handle.fileno(), None) == SECRET
            else:
                with pytest.raises(ConfigError, match=rf"found mode {bits:04o}; run: chmod 600"):
                    read_passphrase(handle.fileno(), None)


@pytest.mark.parametrize("descriptor", [-1, 999, 2**31, 2**70])
def test_a_file_descriptor_that_is_not_open_is_refused(descriptor: int) -> None:
    with pytest.raises(ConfigError, match="expected an open file descriptor"):
        read_passphrase(descriptor, None)


def test_a_passphrase_comes_as_a_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ConfigError, match="LoadCredential="):
        read_passphrase(None, "silotune")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    file = tmp_path / "silotune"
    file.write_bytes(SECRET + b"\n")
    file.chmod(0o400)
    assert read_passphrase(None, "silotune") == SECRET
    file.chmod(0o444)
    with pytest.raises(ConfigError, match="found mode 0444"):
        read_passphrase(None, "silotune")
    with pytest.raises(StorageError, match="cannot be read"):
        read_passphrase(None, "missing")
    for name in ("", ".", "..", "../secret", "/etc/hostname", "a\0b"):
        with pytest.raises(ConfigError, match="expected the name of a credential"):
            read_passphrase(None, name)
    with pytest.raises(ConfigError, match="found both"):
        read_passphrase(0, "silotune")


def test_new_keys_are_not_protected_by_a_short_passphrase() -> None:
    check_new_passphrase(None)
    check_new_passphrase(b"x" * 16)
    with pytest.raises(ConfigError, match="at least 16 bytes") as refused:
        check_new_passphrase(b"hunter2")
    assert "hunter2" not in str(refused.value)


# --- Keys ------------------------------------------------------------------------------------------------------------

KINDS = {"identity": (keep_identity_key, read_identity_key), "node": (keep_curve_key, read_curve_key)}


def material(key: Any) -> set[str]:
    """The private parts of a key, as somebody might show them."""
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    if isinstance(key, Ed25519PrivateKey):
        raw = key.private_bytes_raw()
    else:
        raw = key.private_numbers().private_value.to_bytes(48, "big")
    numbers = {str(int.from_bytes(raw, "big")), str(list(raw))}
    return {raw.hex(), repr(raw), base64.b64encode(raw).decode()[:-4], base64.b64encode(der).decode()[20:60]} | numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passphrase", [None, SECRET])
def test_a_key_is_made_once(tmp_path: Path, kind: str, passphrase: bytes | None) -> None:
    keep, read = KINDS[kind]
    file = tmp_path / "key.pem"
    made = keep(file, passphrase)
    assert mode(file) == 0o600
    before = file.read_bytes()
    assert (b"BEGIN ENCRYPTED PRIVATE KEY" in before) == (passphrase is not None)
    for again in (keep(file, passphrase), read(file, passphrase)):
        assert material(again) == material(made)
    assert file.read_bytes() == before
    loaded = serialization.load_pem_private_key(before, passphrase)  # PKCS8, which every tool reads
    assert material(loaded) == material(made)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_passphrase_is_told_from_a_missing_one(tmp_path: Path, kind: str) -> None:
    keep, read = KINDS[kind]
    keep(tmp_path / "locked.pem", SECRET)
    keep(tmp_path / "open.pem", None)
    for name, passphrase, told in (
        ("locked.pem", None, "expected a passphrase for this key, found none; give --passphrase-fd"),
        ("locked.pem", b"another passphrase", "expected the passphrase of this key, found another"),
        ("open.pem", SECRET, "expected no passphrase, since this key has none"),
    ):
        for call in (keep, read):
            with pytest.raises(ConfigError, match=told) as refused:
                call(tmp_path / name, passphrase)
            assert SECRET.decode() not in str(refused.value)
            assert "another passphrase" not in str(refused.value)


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    keep_identity_key(tmp_path / "identity.pem", None)
    keep_curve_key(tmp_path / "node.pem", None)
    small = ec.generate_private_key(ec.SECP256R1())
    write_private(tmp_path / "small.pem", small.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for read, name in (
        (read_identity_key, "node.pem"),
        (read_curve_key, "identity.pem"),
        (read_curve_key, "small.pem"),
        (read_identity_key, "small.pem"),
    ):
        with pytest.raises(ConfigError, match="found one of another kind"):
            read(tmp_path / name, None)


def leaks(error: BaseException, key: Any) -> set[str]:
    """Private parts in anything that could be shown of an error, what led to it included."""
    told, seen = "", error
    while seen is not None:
        told += f"{seen}{seen!r}{seen.args}"
        seen = seen.__cause__  # type: ignore[assignment]
    return {part for part in material(key) if part in told}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passphrase", [None, SECRET])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda pem: b"", id="empty"),
        pytest.param(lambda pem: pem[: len(pem) // 2], id="cut"),
        pytest.param(lambda pem: b"\xff\x00" * 50, id="binary"),
        pytest.param(lambda pem: pem.replace(b"M", b"N", 3), id="changed"),
        pytest.param(lambda pem: pem[:60] + b"\n" + pem[61:], id="broken"),
        pytest.param(lambda pem: pem * 200, id="huge"),
        pytest.param(lambda pem: pem.replace(b"PRIVATE", b"PUBLIC"), id="called public"),
    ],
)
def test_damaged_keys_are_refused_without_showing_them(
    tmp_path: Path, kind: str, passphrase: bytes | None, damage: Callable[[bytes], bytes]
) -> None:
    keep, read = KINDS[kind]
    file = tmp_path / "key.pem"
    key = keep(file, passphrase)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SilotuneError, match=r"expected.*found") as refused:
        read(file, passphrase)
    assert leaks(refused.value, key) == set()
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_a_missing_key_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"key\.pem: cannot be read: No such file"):
        read_identity_key(tmp_path / "key.pem", None)


def test_times_are_in_utc() -> None:
    assert enrolment.timestamp(NOW + timedelta(seconds=0.9)) == WHEN
    assert enrolment.timestamp(NOW.astimezone(timezone(timedelta(hours=5)))) == WHEN
